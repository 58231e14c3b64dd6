"""`python benchmarks/schedules`: all runs of the comparison of schedules, and the tables and figures of docs/schedules.md."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from conditions import FORMS, STAGES, Stage, list_runs, load_experiment
from results import choose_rates, read_runs
from runner import Runner

ROOT = Path(__file__).resolve().parent.parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "schedules"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the five schedules, and models of one task, over several seeds.

    Run it in the folder that holds schedules-data/ (python -m polyvit_fast.experiments.schedules_data makes it). A stopped call goes on:
    runs that have results are not run again.
    """

    form: Literal["small", "full"] = "small"
    """small: 2 seeds, half the steps, the learning rates that the full form chose. full: 5 seeds, rates by sweeps on val."""
    stages: tuple[Stage, ...] = ()
    """Some of the form's stages. None: all. sweep: peak learning rates. table: schedules and single tasks. knobs: SGD and AdamW, mean and
    sum, coast and rest. transfer: trunks of one modality, probed on tasks that are held out."""
    out: str = "schedules-results"
    """Folder of the results: a JSONL file for each run. benchmarks/results/schedules of this repository has the published ones."""
    work: str = "schedules-runs"
    """Folder of run folders and logs."""
    workers: int = 0
    """Runs at once, each with one thread. 0: as many as there are cores, and on a GPU 4."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models compute."""


def main(options: Options) -> int:
    """Run what is missing. The exit code is 0 when nothing failed."""
    form = FORMS[options.form]
    names = [name for name in load_experiment().tasks if Path(f"schedules-data/{name}/train.csv").is_file()]
    if not names:
        print("there is no schedules-data/ here: python -m polyvit_fast.experiments.schedules_data makes it", file=sys.stderr)
        return 2
    workers = options.workers or (4 if options.device == "cuda" else len(os.sched_getaffinity(0)))
    runner = Runner(options.form, options.device, Path(options.out), Path(options.work), workers)
    failed = 0
    for stage in [stage for stage in STAGES if stage in (options.stages or form.stages)]:
        swept = Path(options.out) / options.form if form.sweeps else COMMITTED / "full"
        best = choose_rates(read_runs(swept / "sweep"))
        failed += len(runner.run_all(list(list_runs(form, stage, names, best)), f"{options.form}, {stage}"))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python benchmarks/schedules")))
