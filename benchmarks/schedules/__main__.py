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
from runner import RunPool
from tables import StageResults, build_tables, insert_tables

from polyvit_fast.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "schedules"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Compare the five schedules, and models of one task, over several seeds.

    Run it in the folder that holds schedules-data/ (python -m polyvit_fast.experiments.schedules_data makes it). A stopped call goes on:
    runs that have results are not run again.
    """

    form: Literal["tiny", "small", "full"] = "small"
    """tiny: 1 seed, a fiftieth of the steps, to see that all works. small: 2 seeds, half the steps, the learning rates that the full form
    chose. full: 5 seeds, rates by sweeps on val."""
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


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Draw the figures and write the tables of results, without running anything."""

    results: str = str(COMMITTED / "full")
    """Folder with a folder of results for each stage."""
    out: str = ""
    """Folder of the figures and tables.md. Empty: that of the results."""
    document: str = ""
    """A Markdown file whose tables are written anew, between <!-- table NAME --> and <!-- end -->; docs/schedules.md is one."""


def report(options: ReportOptions) -> int:
    """Write what there are results for."""
    folder = Path(options.results)
    results = StageResults(**{stage: read_runs(folder / stage) for stage in STAGES})
    if not results.table and not results.sweep:
        print(f"{folder} holds no results: a folder for each stage, with a JSONL file for each run", file=sys.stderr)
        return 2
    out = Path(options.out or folder)
    out.mkdir(parents=True, exist_ok=True)
    tables = build_tables(results)
    text = "".join(f"## {name}\n\n{table}\n" for name, table in tables.items())
    write_atomically(out / "tables.md", text)
    print(text)
    if options.document:
        document = Path(options.document)
        write_atomically(document, insert_tables(document.read_text(), tables))
    from figures import draw_all

    for path in draw_all(results, out):
        print(f"drawn: {path}")
    return 0


def run(options: RunOptions) -> int:
    """Run what is missing. The exit code is 0 when nothing failed."""
    form = FORMS[options.form]
    names = [name for name in load_experiment().tasks if Path(f"schedules-data/{name}/train.csv").is_file()]
    if not names:
        print("there is no schedules-data/ here: python -m polyvit_fast.experiments.schedules_data makes it", file=sys.stderr)
        return 2
    workers = options.workers or (4 if options.device == "cuda" else len(os.sched_getaffinity(0)))
    runner = RunPool(options.form, options.device, Path(options.out), Path(options.work), workers)
    failed = 0
    for stage in [stage for stage in STAGES if stage in (options.stages or form.stages)]:
        swept = Path(options.out) / options.form if form.sweeps else COMMITTED / "full"
        best = choose_rates(read_runs(swept / "sweep"))
        if form.sweeps and stage != "sweep":
            unknown = [spec.name for spec in list_runs(form, "sweep", names, {}) if not (swept / "sweep" / f"{spec.name}.jsonl").is_file()]
            if unknown:  # a rate that was never compared would decide what the table says
                print(
                    f"stage {stage}: the sweep lacks {len(unknown)} runs, such as {unknown[0]}; run --stages sweep first", file=sys.stderr
                )
                return 1
        failed += len(runner.run_all(list(list_runs(form, stage, names, best)), f"{options.form}, {stage}"))
    return int(failed > 0)


def main(arguments: list[str]) -> int:
    """Run or report."""
    commands = {"run": run, "report": report}
    if not arguments or arguments[0] not in (*commands, "-h", "--help"):
        print(f"python benchmarks/schedules run | report, each with --help{f'; not {arguments[0]}' if arguments else ''}", file=sys.stderr)
        return 2
    if arguments[0] not in commands:
        print(f"{__doc__}\n\npython benchmarks/schedules run --help\npython benchmarks/schedules report --help")
        return 0
    kind = {"run": RunOptions, "report": ReportOptions}[arguments[0]]
    return commands[arguments[0]](tyro.cli(kind, args=arguments[1:], prog=f"python benchmarks/schedules {arguments[0]}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
