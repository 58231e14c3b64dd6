"""The commands predict and features."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from polyvit_fast.cli.arguments import split_run
from polyvit_fast.cli.help import show_options
from polyvit_fast.signals import stop_on_signals

if TYPE_CHECKING:
    from polyvit_fast.inference.files import FoundFiles
    from polyvit_fast.inference.results import Features, Prediction, Skipped
    from polyvit_fast.inference.trained_model import TrainedModel

NOTHING_WORKED = 65
"""The exit code when not one file could be used."""
CHUNK_BATCHES = 4
"""Batches from one row of the progress bar, and of the table that is written, to the next."""
Files = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES"), tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Predict the classes of files with a trained run.

    $ polyvit-fast predict runs/demo a.jpg b.png clip.mp4
    $ polyvit-fast predict runs/demo photos/ --task shapes --top 3
    $ polyvit-fast predict runs/demo photos/ sounds/ --out classes.csv

    Files in folders, and in folders in them, count by their names, as in a training folder. Broken files are named on standard error and
    left out; the exit code is 0 if any file worked, else 65.
    """

    files: Files
    """Files and folders, of any modality of the run."""
    task: tuple[str, ...] = ()
    """Names of the tasks. None: every task of whose modality a file is, by its name."""
    top: int = 5
    """How many of the most probable classes."""
    out: str = ""
    """File for the table, .csv or .parquet (which needs pyarrow), with a row for each file, task and class. Empty: print it."""
    checkpoint: str = "newest"
    """newest, best, or the step of a checkpoint."""
    weights: Literal["auto", "model", "ema"] = "auto"
    """Which weights. auto: their moving average if the run has one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes. auto: on a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Write the features that a trained run gives to files.

    $ polyvit-fast features runs/demo photos/ --modality image --out features.npz
    $ polyvit-fast features runs/demo *.wav --task tones --layer 2 --pool mean --out features.parquet

    In Python: numpy.load("features.npz") has "features" [file, feature] and "names". Broken files are named on standard error and left
    out; the exit code is 0 if any file worked, else 65.
    """

    files: Files
    """Files and folders, of one modality."""
    out: str
    """File to write: .npz (NumPy), or .parquet (which needs pyarrow)."""
    modality: str = ""
    """The modality of the files. Empty: the run's only one."""
    task: str = ""
    """Read the files like those of this task. Empty: the first task of the modality."""
    layer: int | None = None
    """Features after so many blocks; 0: the tokenizer's. None: after all blocks and the last norm."""
    pool: Literal["cls", "mean", "none"] = "cls"
    """cls: the class token. mean: the mean of all other tokens. none: all tokens, [file, view, token, feature] (only .npz)."""
    checkpoint: str = "newest"
    """newest, best, or the step of a checkpoint."""
    weights: Literal["auto", "model", "ema"] = "auto"
    """Which weights. auto: their moving average if the run has one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes. auto: on a GPU if there is one."""


def run_predict(arguments: list[str]) -> int:
    """Predict the classes of files."""
    show_options(arguments, "predict RUN FILES ... [--option value ...]", PredictOptions.__doc__ or "", PredictOptions)
    folder, options = split_run(PredictOptions, arguments, "predict")
    from polyvit_fast.data.decoder_messages import catch_decoder_messages
    from polyvit_fast.inference.files import find_files
    from polyvit_fast.inference.loading import load
    from polyvit_fast.inference.tables import PREDICTION_COLUMNS, open_table
    from polyvit_fast.train.evaluate import use_device

    if options.top < 1:
        raise ValueError(f"--top {options.top} must be at least 1")
    _check_files(options.files, "predict")
    model = load(folder, options.checkpoint, device=options.device, weights=options.weights)
    found = find_files(options.files, model.config, [model.find_task(task) for task in options.task])
    with stop_on_signals(), catch_decoder_messages(), use_device(model.config):
        if not options.out:
            return _print_predictions(model, found, options.top)
        with open_table(Path(options.out), PREDICTION_COLUMNS) as add, _show_progress(found) as report:
            num_good = 0
            for rows in _predict(model, found, options.top, report):
                num_good += len(rows)
                for task, row in rows:
                    pairs = zip(row.classes, row.probabilities, strict=True)
                    add((row.name, task, rank, name, probability) for rank, (name, probability) in enumerate(pairs, 1))
    print(f"written: {options.out}, {num_good:,} predictions")
    return 0 if num_good else NOTHING_WORKED


def _print_predictions(model: TrainedModel, found: FoundFiles, top: int) -> int:
    from rich.console import Console

    from polyvit_fast.inference.results import Predictions

    with _show_progress(found) as report:
        rows = [pair for chunk in _predict(model, found, top, report) for pair in chunk]
    for task in found.of_task:
        predictions = Predictions(task, [row for name, row in rows if name == task])
        if predictions.rows:
            Console().print(predictions.build_table(), "")
    return 0 if rows else NOTHING_WORKED


def _predict(model: TrainedModel, found: FoundFiles, top: int, report: Report) -> Iterator[list[tuple[str, Prediction]]]:
    """(task, prediction) of each good file, some at a time."""
    for task, files in _split(model, found):
        predictions = model.predict(files, task, top=top, on_error="skip")
        report(task, len(files), predictions.skipped)
        yield [(task, row) for row in predictions]


def run_features(arguments: list[str]) -> int:
    """Write the features of files."""
    show_options(arguments, "features RUN FILES ... --out FILE [--option value ...]", FeatureOptions.__doc__ or "", FeatureOptions)
    folder, options = split_run(FeatureOptions, arguments, "features")
    from polyvit_fast.data.decoder_messages import catch_decoder_messages
    from polyvit_fast.inference.files import find_files
    from polyvit_fast.inference.loading import load
    from polyvit_fast.inference.tables import check_features_file, write_features
    from polyvit_fast.train.evaluate import use_device

    out, pool = Path(options.out), None if options.pool == "none" else options.pool
    check_features_file(out, pool)
    _check_files(options.files, "features")
    model = load(folder, options.checkpoint, device=options.device, weights=options.weights)
    task = model.find_task_of(options.modality or None, options.task or None)
    found = find_files(options.files, model.config, [task])
    chunks: list[Features] = []
    with stop_on_signals(), catch_decoder_messages(), use_device(model.config), _show_progress(found) as report:
        for _, files in _split(model, found):
            chunks.append(model.features(files, task=task, layer=options.layer, pool=pool, on_error="skip"))
            report(task, len(files), chunks[-1].skipped)
        good = [chunk for chunk in chunks if chunk.names]
        if not good:
            return NOTHING_WORKED
        shape = write_features(out, good)
    print(f"written: {out}, features {list(shape)}")
    return 0


def _check_files(files: Files, command: str) -> None:
    if not files:
        raise ValueError(f"usage: polyvit-fast {command} RUN FILES ...: name files or folders after the run")


def _split(model: TrainedModel, found: FoundFiles) -> Iterator[tuple[str, Sequence[str]]]:
    """(task, some of its files) in whole batches, so that every file is computed in the batch of an evaluation."""
    from polyvit_fast.data.stream import evaluation_size

    for task, files in found.of_task.items():
        size = CHUNK_BATCHES * evaluation_size(model.tasks[task])
        for start in range(0, len(files), size):
            yield task, files[start : start + size]


Report = Callable[[str, int, "Sequence[Skipped]"], None]
"""Takes how many more files of a task are done, and which of them are broken."""


@contextmanager
def _show_progress(found: FoundFiles) -> Iterator[Report]:
    """Inside, a bar for each task on a terminal's standard error, and a line for each file that is left out."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from polyvit_fast.media import printable

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def say(text: str) -> None:
        with suppress(OSError):  # the terminal may be gone
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    said: set[Skipped] = set()
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        bars = {task: progress.add_task(task, total=len(files)) for task, files in found.of_task.items()}
        for name in found.unfit:
            say(f"skipped {printable(name)}: by its name it is no file of the run's tasks; name one with --task if it is")

        def report(task: str, count: int, skipped: Sequence[Skipped]) -> None:
            progress.advance(bars[task], count)
            for one in skipped:
                if one not in said:  # of another task with the same modality
                    said.add(one)
                    say(f"skipped {printable(one.name)}: {one.reason}")

        yield report
