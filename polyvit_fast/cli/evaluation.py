"""The command eval."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from polyvit_fast.cli.arguments import load_run, split_run


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate a checkpoint of a run on the validation files of its tasks."""

    checkpoint: str = "newest"
    """newest, best, or the step of a checkpoint."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks to evaluate. None: all."""
    device: Literal["as trained", "cpu", "cuda"] = "as trained"
    """Where the model computes."""


def run_eval(arguments: list[str]) -> int:
    """Evaluate a checkpoint of a run."""
    folder, options = split_run(EvalOptions, arguments, "eval")
    config = load_run(folder).config
    config = config if options.device == "as trained" else replace(config, device=options.device)
    from polyvit_fast.train.evaluate import evaluate_run
    from polyvit_fast.train.output.log import print_evaluation, show_evaluation_progress

    with show_evaluation_progress() as progress:
        rows = evaluate_run(folder, config, options.checkpoint, options.tasks, progress)
    if rows:  # under torchrun the first process has them
        print_evaluation(config, rows)
    return 0
