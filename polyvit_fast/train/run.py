"""A run with all that it holds on to: opened fresh or from its newest checkpoint, and saved."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from polyvit_fast.config import StepPlan, Train
from polyvit_fast.data.sources.classes import first_difference
from polyvit_fast.data.sources.fingerprint import Fingerprint, find_changes, find_newer, fingerprint_names
from polyvit_fast.data.stream import DataError, Loader
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.clock import Clock, Span, TaskTime
from polyvit_fast.train.distributed.process_group import PeerLost, World
from polyvit_fast.train.output.log import Log, PeerLog
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.config_json import to_json
from polyvit_fast.train.run_folder.earlier_versions import is_older_than_0_5
from polyvit_fast.train.run_folder.lock import hold
from polyvit_fast.train.run_folder.record import describe_run, record_classes, resume_differences
from polyvit_fast.train.schedule import count_steps, warmup_length, warmup_note
from polyvit_fast.train.step import Reading, Step

RNG_LAW = "weights, schedule, sample order, augmentation, dropout: hashes of (seed, purpose, task, step)"


STUCK_SECONDS = 30.0


class NonFiniteError(RuntimeError):
    """Too many steps in a row with a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Interval:
    """What is to be logged after `step` steps, as soon as the device has come that far."""

    step: int
    lr: float
    reading: Reading
    spans: list[Span]


@dataclass
class Run:
    """Everything that a run holds on to."""

    config: Train
    plan: StepPlan
    world: World
    step: Step
    loaders: dict[str, Loader]
    validation: dict[str, Loader]
    log: Log | PeerLog
    clock: Clock
    fingerprints: dict[str, Fingerprint]
    """Of the training files when the run was opened, as the first process saw them."""
    validation_fingerprints: dict[str, Fingerprint]
    done: int = 0
    """Steps behind us."""
    metrics_step: int = -1
    """Steps that were behind us at the last evaluation."""
    saved: int = -1
    """Steps that were behind us at the last checkpoint."""
    best_step: int | None = None
    best_score: float = float("-inf")
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    intervals: deque[Interval] = field(default_factory=deque)
    """Those that are not logged yet."""
    interval_times: dict[str, TaskTime] = field(default_factory=dict)
    """Of each task since the last log line."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each task took in the whole run, waiting for its data included."""

    def count_time(self, spans: list[Span]) -> None:
        """Add minibatches that have ended on the device to the tasks' times."""
        for name, taken in self.clock.total(spans, self.config.tasks).items():
            self.interval_times[name].seconds += taken.seconds
            self.interval_times[name].waited += taken.waited
            self.seconds[name] += taken.seconds


@contextmanager
def opened(config: Train, plan: StepPlan, world: World, experiment: str, argv: list[str]) -> Iterator[Run]:
    """The run, fresh or resumed, with its log open. Raises ValueError when the run folder, the data or the device cannot be used."""
    if not config.out:
        raise ValueError("out is empty: it must name the run folder")
    with _own_folder(config, world), _opened(config, plan, world, experiment, argv) as run:
        yield run


@contextmanager
def _own_folder(config: Train, world: World) -> Iterator[None]:
    """Inside, the run folder is there and no other run writes to it: its first process, which alone writes, holds it."""
    with ExitStack() as stack:
        with world.first_first():
            try:
                config.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"the run folder {config.folder} cannot be made: {error.strerror}; choose another with --out") from error
            if world.rank == 0:
                stack.enter_context(hold(config.folder))
        yield


@contextmanager
def _opened(config: Train, plan: StepPlan, world: World, experiment: str, argv: list[str]) -> Iterator[Run]:
    found = _newest_checkpoint(config, world)
    _check_resume(config, found)
    model = PolyViT.from_config(config).train()
    step = Step(model, config, world)
    first_step = found.step if found else 0
    totals = dict(count_steps(plan))
    if world.rank == 0:
        describe_run(config.folder, experiment, argv, config)
        log = Log(config.folder, totals, len(plan), first_step, done=count_steps(plan[:first_step]))
    else:
        log = PeerLog(world.rank)
    with log:
        shares = f", {world.size} processes" if world.size > 1 else ""
        log.message(
            f"{experiment}: {_size(model)} parameters, {len(plan):,} steps, tasks: {', '.join(config.tasks)}{shares}; "
            f"run folder {config.folder}"
        )
        endless = warmup_note(config, len(plan))
        if endless and world.rank == 0:
            log.message(endless, "warning")
        report = log.message if world.rank == 0 else partial(log.message, level="warning")
        place = {"report": report, "rank": world.rank, "world_size": world.size}
        with world.first_first():  # files that the demo makes, indexes of shards: one process makes them
            loaders = {name: Loader(name, config, train=True, **place) for name in totals}
            validation = {name: Loader(name, config, train=False, **place) for name in config.tasks}
        times = {name: TaskTime() for name in config.tasks}
        seen = [_take_fingerprints(loaders), _take_fingerprints(validation)] if world.rank == 0 else []
        trained, held_out = world.from_first(seen)
        run = Run(config, plan, world, step, loaders, validation, log, Clock(step.device), trained, held_out, interval_times=times)
        run.seconds = dict.fromkeys(config.tasks, 0.0)
        if found:
            _restore(run, found)
            log.message(f"resumed from step {found.step} of {len(plan)} ({found.path})")
        if world.rank == 0:
            record_classes(config.folder, {name: loader.classes for name, loader in validation.items()})
        try:
            yield run
        except (DataError, NonFiniteError, PeerLost, torch.OutOfMemoryError) as error:
            # Where a process is lost, its shards are needed, or sums that wait for it may hold the GPU.
            lost = isinstance(error, PeerLost) and (config.distributed.sharded or _is_stuck(step))
            if run.saved < run.done and not lost:
                with suppress(checkpoint.CheckpointError):  # the error at hand is the one to tell
                    _write(run)
            log.note(f"error: {error}")  # who catches it tells it on the terminal
            if isinstance(error, PeerLost):
                raise PeerLost(f"{_place(run)}: {error}. The same command goes on from the newest checkpoint") from error
            if isinstance(error, torch.OutOfMemoryError):
                reason = str(error).partition(". ")[0]
                raise ValueError(
                    f"the GPU's memory is too small ({reason}): give the largest task more micro_batches, or set --recompute; "
                    "`polyvit-fast plan` estimates what fits"
                ) from error
            raise


def _take_fingerprints(loaders: dict[str, Loader]) -> dict[str, Fingerprint]:
    return {name: loader.fingerprint() for name, loader in loaders.items()}


def _place(run: Run) -> str:
    tasks = ", ".join(run.plan[run.done]) if run.done < len(run.plan) else "none left"
    return f"process {run.world.rank}, step {run.done} (task {tasks})"


def _is_stuck(step: Step) -> bool:
    """Whether the GPU does not come to the end of its work in a while, as when it waits for a process that is gone."""
    deadline = time.monotonic() + STUCK_SECONDS
    while step.device.type == "cuda" and not torch.cuda.current_stream().query():
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False


def save(run: Run, *, must: bool = False) -> None:
    """Save a checkpoint. When that fails, training goes on after a message, or with `must` CheckpointError is raised, in all processes."""
    error = None
    try:
        _write(run)
    except checkpoint.CheckpointError as failure:
        error = failure
    failed = run.world.agree(int(error is not None))
    run.saved = -1 if failed else run.done
    if failed and must:
        raise error or checkpoint.CheckpointError(f"step {run.done}: the first process could not write the checkpoint")
    if error:
        run.log.message(f"step {run.done}: {error}. Training goes on; the next try is in {run.config.log.save_every_steps} steps", "error")
    run.clock.restart()


def _write(run: Run) -> None:
    """Write a checkpoint in the first process; the others give it their parts of what is sharded."""
    step, done = run.step, run.done
    run.count_time(_ended(run.clock.lap(), step))
    tensors = {"model": step.parameters.tensors(), "optimizer": step.optimizer.tensors()}
    average = step.optimizer.average_tensors()
    if average is not None:
        tensors["ema"] = average
    if run.world.rank:
        return
    state = {
        "step": done,
        "counters": step.counters.tolist(),
        "rng": {"seed": run.config.seed, "law": RNG_LAW},
        "warmup_steps": warmup_length(run.config, len(run.plan)),
        "best_step": run.best_step,
        "best_score": None if run.best_step is None else run.best_score,
        "metrics": run.metrics,
        "metrics_step": run.metrics_step,
        "seconds": run.seconds,
        "interval_times": {name: (taken.seconds, taken.waited) for name, taken in run.interval_times.items()},
        "samples": run.fingerprints,
        "validation_samples": run.validation_fingerprints,
        "classes": {name: loader.classes for name, loader in run.validation.items()},
    }
    keep, config = run.config.log.keep, to_json(run.config)
    checkpoint.save(run.config.folder, done, tensors, state, config, keep=keep, best_step=run.best_step)


def _ended(spans: list[Span], step: Step) -> list[Span]:
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    return spans


def _newest_checkpoint(config: Train, world: World) -> checkpoint.Checkpoint | None:
    """That of all processes. Raises ValueError where this one does not see the first one's."""
    found = checkpoint.newest(config.folder)
    step, first = found.step if found else None, world.from_first(found.step if found else None)
    if world.agree(step != first):
        raise ValueError(
            f"process {world.rank} sees the checkpoint of step {step} in {config.folder}, the first process that of step {first}; "
            "the run folder must be one that all of them share"
        )
    return found


def _check_resume(config: Train, found: checkpoint.Checkpoint | None) -> None:
    if found is None:
        if checkpoint.any_left(config.folder):
            raise ValueError(f"{config.folder} holds checkpoints, but not a single whole one; move it away, or choose another --out")
        return
    if not config.resume:
        raise ValueError(f"{config.folder} holds a run already (step {found.step}) and resume is off; choose another --out or move it away")
    different = resume_differences(found.config, to_json(config))
    if different:
        since = " (written before version 0.5, whose defaults changed)" if is_older_than_0_5(found.config) else ""
        raise ValueError(
            f"{config.folder} holds a checkpoint of another configuration{since}; it differs in: {'; '.join(different)}. "
            "Choose another --out, or set these fields back to resume"
        )


def _restore(run: Run, found: checkpoint.Checkpoint) -> None:
    step = run.step
    for name, names in found.state.get("classes", {}).items():
        difference = first_difference(names, run.validation[name].classes)
        if difference:
            raise ValueError(
                f"task {name}: its classes are not those of {found.path}: {difference}. Put them back to resume, or choose another --out"
            )
    for name, loader in run.loaders.items():
        _compare_files(run, found, name, loader)
    for name, loader in run.validation.items():
        before = found.state.get("validation_samples", {}).get(name)
        changes = find_changes(before, run.validation_fingerprints[name], loader.samples)[0] if before else ""
        if changes and run.world.rank == 0:
            told = f"task {name}: its validation files are not those of {found.path} ({changes}): its metrics are those of other files now"
            run.log.message(told, "warning")
    if run.world.rank == 0 and _had_other_rates(run, found):
        run.log.message(
            f"{found.path} is of an earlier version, whose warm-up began at a rate of 0 and took {run.config.optim.warmup_steps:,} steps "
            "in every schedule. The steps left have the rates that `polyvit-fast plot schedule` draws",
            "warning",
        )
    step.parameters.load(found.load_tensors("model"))
    step.optimizer.load(found.load_tensors("optimizer"))
    if run.config.optim.ema_decay:
        step.optimizer.load_average(found.load_tensors("ema"))
    step.counters.copy_(torch.tensor(found.state["counters"], dtype=torch.float64))
    run.done, run.metrics_step = found.step, found.state["metrics_step"]
    run.metrics = {name: _without_null(row) for name, row in found.state["metrics"].items()}
    run.saved = run.done
    run.seconds.update(found.state["seconds"])
    run.interval_times.update({name: TaskTime(*times) for name, times in found.state.get("interval_times", {}).items()})
    if found.state["best_step"] is not None:
        run.best_step, run.best_score = found.state["best_step"], found.state["best_score"]


def _had_other_rates(run: Run, found: checkpoint.Checkpoint) -> bool:
    """Whether the version that wrote this checkpoint would have given steps that are left another rate."""
    before = run.config.optim.warmup_steps
    return "warmup_steps" not in found.state and (found.step < before or warmup_length(run.config, len(run.plan)) != before)


def _without_null(row: dict[str, float | None]) -> dict[str, float]:
    """A task's metrics as they were before JSON, which has no NaN."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def _compare_files(run: Run, found: checkpoint.Checkpoint, name: str, loader: Loader) -> None:
    """Raise ValueError when a task's training files are not those that the checkpoint's steps saw."""
    before = found.state["samples"].get(name, "")
    now = run.fingerprints[name] | {"names": fingerprint_names(loader.samples)}
    changes, same_list = find_changes(before, now, loader.samples)
    told = f"task {name}: its training files are not those of {found.path} ({changes})"
    if not same_list:
        raise ValueError(f"{told}, so their order would change. Put them back to resume, or choose another --out")
    if changes and run.config.data.changed_files == "refuse":
        raise ValueError(f"{told}. Put them back to resume, allow the change with --changed-files allow, or choose another --out")
    if changes:
        run.log.message(f"{told}; the run goes on with them as they are now")
    elif isinstance(before, str):
        run.log.message(f"task {name}: {found.path} is of an earlier version, which kept the names of training files but not their sizes")
    elif before["times"] != now["times"]:
        run.log.message(
            f"task {name}: some of its training files were written or copied since {found.path}, but have the sizes of then: "
            f"{find_newer(before, now, loader.samples)}"
        )


def _size(model: PolyViT) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"
