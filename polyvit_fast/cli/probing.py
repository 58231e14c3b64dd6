"""The command probe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polyvit_fast import experiments
from polyvit_fast.cli.arguments import parse_options, split_subject
from polyvit_fast.cli.help import show_options
from polyvit_fast.cli.locations import change_locations, split_locations
from polyvit_fast.signals import stop_on_signals

if TYPE_CHECKING:
    from polyvit_fast.probe.probing import ProbeResult


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Train heads on the features of a frozen model, on tasks that it was not trained on: how much does it know?

    SOURCE is a run folder (runs/mine, runs/mine@best), a file or folder of weights of timm, Hugging Face, torchvision or JAX, or a name
    on Hugging Face's hub; or PART=SOURCE,..., a part being trunk or a modality: the others are random. Features are computed once and kept. A penalty is chosen on a fifth of the training files, never on those that
    are reported. Intervals are of 95 %.

    $ polyvit-fast probe runs/demo --experiment birds.py --random
    $ polyvit-fast probe timm/vit_small_patch16_224.augreg_in21k --experiment birds.py --heads linear few-shot

    Where files have moved: --tasks.NAME.train.path FOLDER, or another field of a task's train or val.
    """

    experiment: str
    """A name from `polyvit-fast list`, or the path of your own .py file: its tasks are probed, with their modalities and sources."""
    tasks: tuple[str, ...] = ()
    """Names of some of its tasks. None: all."""
    heads: tuple[Literal["linear", "attentive", "few-shot"], ...] = ("linear", "attentive", "few-shot")
    """linear: logistic regression on what heads read. attentive: on what learned queries read of all tokens.
    few-shot: ridge regression to a few examples of each class, ten draws."""
    shots: tuple[int, ...] = (1, 5, 20)
    """Examples of each class for few-shot."""
    random: bool = False
    """Probe the same model with random weights too."""
    out: str = ""
    """Folder of probe.json and the features. Empty: probe/ in the run folder, or next to the file of weights."""
    device: Literal["as in the experiment", "cpu", "cuda"] = "as in the experiment"
    """Where the model computes."""

    def __post_init__(self) -> None:
        if not self.heads or min(self.shots, default=0) < 1:
            raise ValueError("heads must name one at least, and shots must be 1 or more")


def run_probe(arguments: list[str]) -> int:
    """Probe a frozen model."""
    show_options(arguments, "probe SOURCE --experiment EXPERIMENT [--option value ...]", ProbeOptions.__doc__ or "", ProbeOptions)
    locations, arguments = split_locations(arguments)
    source, flags = split_subject(arguments, "probe SOURCE --experiment EXPERIMENT")
    options = parse_options(ProbeOptions, flags, "probe SOURCE")
    config = change_locations(experiments.load(options.experiment), locations, f"probe {source}")
    config = config if options.device == "as in the experiment" else replace(config, device=options.device)
    from polyvit_fast.data.decoder_messages import catch_decoder_messages
    from polyvit_fast.probe.probing import ProbePlan, probe
    from polyvit_fast.train.output.bars import show_evaluation_progress

    plan = ProbePlan(
        source=source,
        config=config,
        tasks=options.tasks,
        heads=options.heads,
        shots=options.shots,
        compares_random=options.random,
        folder=Path(options.out) if options.out else _choose_folder(source),
    )
    with stop_on_signals(), catch_decoder_messages(), show_evaluation_progress(list(config.tasks)) as progress:
        results = probe(plan, print, progress)
    _print_results(results, list(config.tasks))
    print(f"written: {plan.folder / 'probe.json'}")
    return 0


def _choose_folder(source: str) -> Path:
    source = source.partition(",")[0].rpartition("=")[2]  # of PART=SOURCE,... the first
    path = Path(source.partition("@")[0])
    if path.is_dir():
        return path / "probe"
    return path.with_name("probe") if path.is_file() else Path("probe") / source.replace("/", "--")


def _print_results(results: list[ProbeResult], tasks: list[str]) -> None:
    """A line for each head of each task, with random weights next to the others where they were probed."""
    from rich.console import Console

    from polyvit_fast.train.output.table import build_table, task_cell
    from polyvit_fast.train.output.words import break_words, shorten

    sources = list(dict.fromkeys(row.weights for row in results))
    estimates = {(row.task, row.head, row.weights): row.estimate for row in results}
    names = ["\n".join(break_words(shorten(Path(source).name, 32), 16)) for source in sources]
    table = build_table(["task", "head", "metric"], names, title="values with their 95 % confidence intervals")
    for row in results:
        if row.weights == sources[0]:
            values = [str(estimates[row.task, row.head, source]) for source in sources]
            if len(sources) > 1:  # intervals below the values, for 80 columns have no room for more
                values = [value.replace(" ", "\n", 1) for value in values]
            table.add_row(task_cell(row.task, tasks.index(row.task)), row.head, row.metric, *values)
    Console().print(table)
