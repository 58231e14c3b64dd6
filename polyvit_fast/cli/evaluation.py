"""The command eval."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polyvit_fast.cli.arguments import load_run, split_run
from polyvit_fast.cli.help import show_options
from polyvit_fast.cli.locations import change_locations, split_locations
from polyvit_fast.cli.results import record_results
from polyvit_fast.config import Train
from polyvit_fast.signals import stop_on_signals

if TYPE_CHECKING:
    from polyvit_fast.inference.answers import TaskAnswers


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate a checkpoint of a run on the validation files of its tasks, or on its test files.

    $ polyvit-fast eval runs/demo
    $ polyvit-fast eval runs/demo --checkpoint best --tasks shapes --per-class
    $ polyvit-fast eval runs/demo --tasks motion --views 4x3
    $ polyvit-fast eval runs/demo --split test --predictions answers.csv
    $ polyvit-fast eval /read-only/run --out results.jsonl

    Where files have moved: --tasks.NAME.val.path FOLDER, or another field of a task's train, val or test.
    """

    checkpoint: str = "newest"
    """newest, best, or the step of a checkpoint."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks to evaluate. None: all that have files of the split."""
    split: Literal["val", "test", "train"] = "val"
    """Which files. test: those of Task.test, which no run looks at."""
    views: str = ""
    """Evaluation views instead of those that the run has: 4x3 are four clips of a video with three crops each, 4 are four clips of a video
    or sound."""
    per_class: bool = False
    """Print a line for each class, and draw which classes are taken for which (confusion-TASK.png, of tasks with one label a file)."""
    predictions: str = ""
    """File for a table (.csv or .parquet) with the five most probable classes of each sample, and its labels."""
    max_bad_ratio: float | None = None
    """Largest fraction of a task's files that may be broken. They are left out. None: as in the run."""
    out: str = ""
    """File to which a line of JSON with the metrics is added; pictures are drawn next to it. Empty: evaluations.jsonl in the run folder."""
    device: Literal["as trained", "cpu", "cuda"] = "as trained"
    """Where the model computes."""


def run_eval(arguments: list[str]) -> int:
    """Evaluate a checkpoint of a run."""
    show_options(arguments, "eval RUN [--option value ...]", EvalOptions.__doc__ or "", EvalOptions)
    locations, arguments = split_locations(arguments)
    folder, options = split_run(EvalOptions, arguments, "eval")
    recorded = load_run(folder, options.checkpoint)
    config = change_locations(recorded.config, locations, f"eval {folder}")
    from polyvit_fast.inference.answers import ANSWER_COLUMNS, Answers
    from polyvit_fast.inference.loading import move_to
    from polyvit_fast.inference.tables import check_table_file, open_table
    from polyvit_fast.train.evaluate import evaluate_run
    from polyvit_fast.train.output.bars import show_evaluation_progress
    from polyvit_fast.train.output.log import print_evaluation

    config = config if options.device == "as trained" else move_to(config, options.device)
    if options.max_bad_ratio is not None:
        config = replace(config, data=replace(config.data, max_bad_ratio=options.max_bad_ratio))
    config = _change_views(config, options.tasks, options.views) if options.views else config
    table, out = Path(options.predictions), Path(options.out or folder / "evaluations.jsonl")
    if options.predictions:
        check_table_file(table)
    if options.out and out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, such as {out / 'evaluations.jsonl'}")
    with stop_on_signals(), ExitStack() as stack:
        # Of several processes only the first has answers, so only that one may open the table.
        answers = Answers((lambda: stack.enter_context(open_table(table, ANSWER_COLUMNS))) if options.predictions else None)
        keep = {"keep": answers} if options.predictions or options.per_class else {}
        progress = stack.enter_context(show_evaluation_progress(list(config.tasks)))
        evaluation = evaluate_run(
            folder, config, options.checkpoint, options.tasks, progress, split=options.split, remark=recorded.remark, **keep
        )
    if not evaluation.rows:  # under torchrun the first process has them
        return 0
    print_evaluation(config, evaluation.rows)
    if options.predictions:
        print(f"written: {options.predictions}")
    if options.per_class:
        for name, found in answers.tasks.items():
            _print_classes(name, found)
    with record_results(out, is_asked_for=bool(options.out)):
        evaluation.append_to(out)
        if options.per_class:
            _draw_confusions(out.parent, folder.name, options.split, list(config.tasks), answers.tasks)
    return 0


def _change_views(config: Train, tasks: tuple[str, ...], views: str) -> Train:
    """The configuration with other evaluation views of these tasks, or of all."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", views):
        raise ValueError(f"--views {views} is no number of clips, such as 4, or of clips and crops, such as 4x3")
    changed = {}
    for name in tasks or config.tasks:
        if name in config.tasks:  # the evaluation names those which are not there
            try:
                modality = config.tasks[name].modality.with_views(*map(int, views.split("x")))
            except ValueError as error:
                advice = "" if tasks else "; choose the tasks that --views is for with --tasks"
                raise ValueError(f"task {name}: --views {views}: {error}{advice}") from error
            changed[name] = replace(config.tasks[name], modality=modality)
    return replace(config, tasks=config.tasks | changed)


def _print_classes(name: str, answers: TaskAnswers) -> None:
    """A line for each class, the least known first."""
    from rich.console import Console

    from polyvit_fast.train.output.table import build_table

    further = ["average precision"] if answers.several else []
    table = build_table([name], ["files", "recall", "precision", *further])
    results = answers.summarise()
    for result in sorted(results, key=lambda one: (math.isnan(one.recall), one.recall)):
        numbers = [result.recall, result.precision, *([result.average_precision] if result.average_precision is not None else [])]
        cells = ["-" if math.isnan(number) else f"{number:.1%}" for number in numbers]
        table.add_row(result.name, f"{result.num_files:,}", *cells)
    Console().print(table)


def _draw_confusions(out: Path, run: str, split: str, names: Sequence[str], answers: Mapping[str, TaskAnswers]) -> None:
    """A picture of each task with one label a file, in its colour; `names` are those of all tasks."""
    from polyvit_fast.inference.confusion import plot_confusion
    from polyvit_fast.train.output.colours import task_colour

    for name, found in answers.items():
        if not found.several:
            path = out / f"confusion-{name}{'' if split == 'val' else f'-{split}'}.png"
            colour = task_colour(names.index(name))
            plot_confusion(path, f"{run}, {name}, {split} files", found.classes, found.confusion, colour=colour)
            print(f"drawn: {path}")
