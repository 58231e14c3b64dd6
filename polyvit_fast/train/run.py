"""A run with everything that it holds: opened fresh or from its newest checkpoint, and saved."""

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
from polyvit_fast.files import write_atomically
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.apply import LoadReport
from polyvit_fast.train.clock import Clock, Span, TaskTime
from polyvit_fast.train.distributed.process_group import PeerLost, World
from polyvit_fast.train.output.log import Log, PeerLog
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.config_json import to_json
from polyvit_fast.train.run_folder.earlier_versions import is_older_than_0_5
from polyvit_fast.train.run_folder.initial_weights import describe_tokenizers, load_initial_weights
from polyvit_fast.train.run_folder.lock import hold
from polyvit_fast.train.run_folder.record import describe_run, record_classes, resume_differences
from polyvit_fast.train.schedule import LearningRates, check_warmup, compute_warmup_steps, count_steps
from polyvit_fast.train.step import PendingCounters, Step

RANDOM_NUMBERS = "weights, schedule, sample order, augmentation, dropout: hashes of (seed, purpose, task, step)"

STUCK_SECONDS = 30.0


class NonFiniteError(RuntimeError):
    """Too many steps in a row with a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Interval:
    """What is to be logged after `step` steps, as soon as the device has come that far."""

    step: int
    lr: float
    counters: PendingCounters
    spans: list[Span]


@dataclass
class Run:
    """Everything that a run holds."""

    config: Train
    plan: StepPlan
    world: World
    step: Step
    loaders: dict[str, Loader]
    validation: dict[str, Loader]
    log: Log | PeerLog
    clock: Clock
    fingerprints: dict[str, Fingerprint]
    """Of the training files when the run was opened, as rank 0 saw them."""
    validation_fingerprints: dict[str, Fingerprint]
    rates: LearningRates
    done: int = 0
    """Steps done so far."""
    metrics_step: int = -1
    """Steps done at the last evaluation."""
    saved: int = -1
    """Steps done at the last checkpoint."""
    best_step: int | None = None
    best_score: float = float("-inf")
    evaluations_since_best: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    intervals: deque[Interval] = field(default_factory=deque)
    """Those that are not logged yet."""
    interval_times: dict[str, TaskTime] = field(default_factory=dict)
    """Of each task since the last log line."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each task took in the whole run, waiting for its data included."""

    @property
    def has_stopped_early(self) -> bool:
        """Whether steps are left to be done, but the metrics have not risen for as many evaluations as `early_stop_evaluations` allows."""
        return self.done < len(self.plan) and 0 < self.config.log.early_stop_evaluations <= self.evaluations_since_best

    @property
    def has_ended(self) -> bool:
        """Whether no step is left to be done."""
        return self.done >= len(self.plan) or self.has_stopped_early

    def count_time(self, spans: list[Span]) -> None:
        """Add minibatches that have ended on the device to the tasks' times."""
        for name, time_taken in self.clock.add_up(spans, self.config.tasks).items():
            self.interval_times[name].seconds += time_taken.seconds
            self.interval_times[name].waited += time_taken.waited
            self.seconds[name] += time_taken.seconds


@contextmanager
def open_run(config: Train, plan: StepPlan, world: World, experiment: str, argv: list[str]) -> Iterator[Run]:
    """The run, fresh or resumed, with its log open. Raises ValueError when the run folder, the data or the device cannot be used."""
    if not config.out:
        raise ValueError("out is empty: it must name the run folder")
    with _hold_folder(config, world):
        found = _find_checkpoint(config, world)
        _check_resume(config, found)
        model = PolyViT.from_config(config)
        reports = [] if found else load_initial_weights(model, config)
        step = Step(model.train(), config, world)
        if world.rank == 0:
            describe_run(config.folder, experiment, argv, config)
        with _open_log(config, plan, world, found) as log:
            _log_start(log, config, plan, step, experiment)
            _log_initial_weights(log, config, reports, world)
            run = _build_run(config, plan, step, log)
            if found:
                _restore(run, found)
                log.message(f"resumed from step {found.step} of {len(plan)} ({found.path})")
            if world.rank == 0:
                record_classes(config.folder, {name: loader.classes for name, loader in run.validation.items()})
            with _save_on_error(run):
                yield run


@contextmanager
def _hold_folder(config: Train, world: World) -> Iterator[None]:
    """Inside, the run folder exists and no other run writes to it: rank 0, which alone writes, holds its lock."""
    with ExitStack() as stack:
        with world.rank0_first():
            try:
                config.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"the run folder {config.folder} cannot be made: {error.strerror}; choose another with --out") from error
            if world.rank == 0:
                stack.enter_context(hold(config.folder))
        yield


def _open_log(config: Train, plan: StepPlan, world: World, found: checkpoint.Checkpoint | None) -> Log | PeerLog:
    if world.rank:
        return PeerLog(world.rank)
    first_step = found.step if found else 0
    return Log(config.folder, dict(count_steps(plan)), len(plan), first_step, done=count_steps(plan[:first_step]))


def _log_start(log: Log | PeerLog, config: Train, plan: StepPlan, step: Step, experiment: str) -> None:
    world = step.world
    parameters = list(step.model.parameters())
    num_parameters, num_trained = (sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad]))
    trained = f" ({num_trained:,} trained)" if num_trained < num_parameters else ""
    processes = f", {world.size} processes" if world.size > 1 else ""
    log.message(
        f"{experiment}: {num_parameters:,} parameters{trained}, {len(plan):,} steps, tasks: {', '.join(config.tasks)}{processes}; "
        f"run folder {config.folder}"
    )
    warning = check_warmup(config, len(plan))
    if warning and world.rank == 0:
        log.message(warning, "warning")


def _log_initial_weights(log: Log | PeerLog, config: Train, reports: list[LoadReport], world: World) -> None:
    """A sentence for each source on the terminal, and a line for each tensor in init.txt."""
    if world.rank or not reports:
        return
    for report in reports:
        log.message(f"initial weights: {report.summarise()}")
        for remark in report.remarks:
            log.message(f"initial weights: {remark}", "warning")
    texts = [f"{report.source} ({report.kind})\n" + "".join(f"  {line}\n" for line in report.lines()) for report in reports]
    write_atomically(config.folder / "init.txt", "\n".join(texts), durable=True)


def _build_run(config: Train, plan: StepPlan, step: Step, log: Log | PeerLog) -> Run:
    world = step.world
    report = log.message if world.rank == 0 else partial(log.message, level="warning")
    process = {"report": report, "rank": world.rank, "world_size": world.size, "local_size": world.local_size}
    with world.rank0_first():  # only one process makes the demo's files and the indexes of shards
        loaders = {name: Loader(name, config, train=True, **process) for name in dict(count_steps(plan))}
        validation = {name: Loader(name, config, train=False, **process) for name in config.tasks}
    seen = [_take_fingerprints(loaders), _take_fingerprints(validation)] if world.rank == 0 else []
    fingerprints, validation_fingerprints = world.broadcast(seen)
    rates = LearningRates(config, plan)
    run = Run(config, plan, world, step, loaders, validation, log, Clock(step.device), fingerprints, validation_fingerprints, rates)
    run.interval_times = {name: TaskTime() for name in config.tasks}
    run.seconds = dict.fromkeys(config.tasks, 0.0)
    return run


def _take_fingerprints(loaders: dict[str, Loader]) -> dict[str, Fingerprint]:
    return {name: loader.fingerprint() for name, loader in loaders.items()}


@contextmanager
def _save_on_error(run: Run) -> Iterator[None]:
    """Inside, an error that the run foresees saves a checkpoint where that is possible, and goes on with advice."""
    try:
        yield
    except (DataError, NonFiniteError, PeerLost, torch.OutOfMemoryError) as error:
        # Without that process, its shards are missing, or all-reduces that wait for it may hold the GPU.
        lost = isinstance(error, PeerLost) and (run.config.distributed.sharded or _is_stuck(run.step))
        if run.saved < run.done and not lost:
            with suppress(checkpoint.CheckpointError):  # the first error is the one to report
                _write_checkpoint(run)
        run.log.note(f"error: {error}")  # whoever catches it prints it
        if isinstance(error, PeerLost):
            raise PeerLost(f"{_describe_position(run)}: {error}. The same command goes on from the newest checkpoint") from error
        if isinstance(error, torch.OutOfMemoryError):
            reason = str(error).partition(". ")[0]
            raise ValueError(
                f"the GPU's memory is too small ({reason}): give the largest task more micro_batches, or set --recompute; "
                "`polyvit-fast plan` estimates what fits"
            ) from error
        raise


def _describe_position(run: Run) -> str:
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
        _write_checkpoint(run)
    except checkpoint.CheckpointError as failure:
        error = failure
    failed = run.world.all_reduce_max(int(error is not None))
    run.saved = -1 if failed else run.done
    if failed and must:
        raise error or checkpoint.CheckpointError(f"step {run.done}: process 0 could not write the checkpoint")
    if error:
        run.log.message(f"step {run.done}: {error}. Training goes on; the next try is in {run.config.log.save_every_steps} steps", "error")
    run.clock.restart()


def _write_checkpoint(run: Run) -> None:
    """Write a checkpoint on rank 0, to which the other processes send their shards."""
    step, done = run.step, run.done
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    run.count_time(run.clock.lap())
    tensors = {"model": step.parameters.state_dict(), "optimizer": step.optimizer.state_dict()}
    ema = step.optimizer.ema_state_dict()
    if ema is not None:
        tensors["ema"] = ema
    if run.world.rank:
        return
    state = {
        "step": done,
        "counters": step.counters.tolist(),
        "rng": {"seed": run.config.seed, "rule": RANDOM_NUMBERS},
        "warmup_steps": compute_warmup_steps(run.config, len(run.plan)),
        "best_step": run.best_step,
        "best_score": None if run.best_step is None else run.best_score,
        "evaluations_since_best": run.evaluations_since_best,
        "metrics": run.metrics,
        "metrics_step": run.metrics_step,
        "seconds": run.seconds,
        "interval_times": {name: (times.seconds, times.waited) for name, times in run.interval_times.items()},
        "samples": run.fingerprints,
        "validation_samples": run.validation_fingerprints,
        "classes": {name: loader.classes for name, loader in run.validation.items()},
        "tokenizers": describe_tokenizers(run.config.modalities),
        "modality_of": {name: task.modality.name for name, task in run.config.tasks.items()},
    }
    keep, config = run.config.log.keep, to_json(run.config)
    checkpoint.save(run.config.folder, done, tensors, state, config, keep=keep, best_step=run.best_step)


def _find_checkpoint(config: Train, world: World) -> checkpoint.Checkpoint | None:
    """The newest one. Raises ValueError where this process does not see the one that rank 0 sees."""
    found = checkpoint.find_newest(config.folder)
    step = found.step if found else None
    first = world.broadcast(step)
    if world.all_reduce_max(step != first):
        raise ValueError(
            f"process {world.rank} sees the checkpoint of step {step} in {config.folder}, process 0 that of step {first}; "
            "the run folder must be one that all processes see"
        )
    return found


def _check_resume(config: Train, found: checkpoint.Checkpoint | None) -> None:
    if found is None:
        if checkpoint.has_any(config.folder):
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
    """Continue from a checkpoint. Raises ValueError when its classes or training files are not those of now."""
    _compare_classes(run, found)
    for name, loader in run.loaders.items():
        _compare_files(run, found, name, loader)
    if run.world.rank == 0:
        _warn_of_changes(run, found)
    step, state = run.step, found.state
    step.parameters.load_state_dict(found.load_tensors("model"))
    step.optimizer.load_state_dict(found.load_tensors("optimizer"))
    if run.config.optim.ema_decay:
        step.optimizer.load_ema(found.load_tensors("ema"))
    step.counters.copy_(torch.tensor(state["counters"], dtype=torch.float64))
    run.done = run.saved = found.step
    run.metrics_step = state["metrics_step"]
    run.metrics = {name: _restore_nan(row) for name, row in state["metrics"].items()}
    run.seconds.update(state["seconds"])
    run.interval_times.update({name: TaskTime(*times) for name, times in state.get("interval_times", {}).items()})
    run.evaluations_since_best = state.get("evaluations_since_best", 0)
    if state["best_step"] is not None:
        run.best_step, run.best_score = state["best_step"], state["best_score"]


def _compare_classes(run: Run, found: checkpoint.Checkpoint) -> None:
    for name, names in found.state.get("classes", {}).items():
        difference = first_difference(names, run.validation[name].classes)
        if difference:
            raise ValueError(
                f"task {name}: its classes are not those of {found.path}: {difference}. Put them back to resume, or choose another --out"
            )


def _compare_files(run: Run, found: checkpoint.Checkpoint, name: str, loader: Loader) -> None:
    """Raise ValueError when a task's training files are not those that the checkpoint's steps saw."""
    before = found.state["samples"].get(name, "")
    now = run.fingerprints[name] | {"names": fingerprint_names(loader.samples)}
    changes, same_list = find_changes(before, now, loader.samples)
    difference = f"task {name}: its training files are not those of {found.path} ({changes})"
    if not same_list:
        raise ValueError(f"{difference}, so their order would change. Put them back to resume, or choose another --out")
    if changes and run.config.data.changed_files == "refuse":
        raise ValueError(f"{difference}. Put them back to resume, allow the change with --changed-files allow, or choose another --out")
    if changes:
        run.log.message(f"{difference}; the run goes on with them as they are now")
    elif isinstance(before, str):
        run.log.message(f"task {name}: {found.path} is of an earlier version, which kept the names of training files but not their sizes")
    elif before["times"] != now["times"]:
        run.log.message(
            f"task {name}: some of its training files were written or copied since {found.path}, but have the sizes of then: "
            f"{find_newer(before, now, loader.samples)}"
        )


def _warn_of_changes(run: Run, found: checkpoint.Checkpoint) -> None:
    """Changes that a run may resume with, but that its numbers will show: other validation files, other learning rates."""
    for name, loader in run.validation.items():
        before = found.state.get("validation_samples", {}).get(name)
        changes = find_changes(before, run.validation_fingerprints[name], loader.samples)[0] if before else ""
        if changes:
            difference = f"its validation files are not those of {found.path} ({changes})"
            run.log.message(f"task {name}: {difference}: its metrics are those of other files now", "warning")
    before = run.config.optim.warmup_steps
    is_older = "warmup_steps" not in found.state
    if is_older and (found.step < before or compute_warmup_steps(run.config, len(run.plan)) != before):
        run.log.message(
            f"{found.path} is of an earlier version, whose warm-up began at a rate of 0 and took {before:,} steps "
            "in every schedule. The steps left have the rates that `polyvit-fast plot schedule` draws",
            "warning",
        )


def _restore_nan(row: dict[str, float | None]) -> dict[str, float]:
    """A task's metrics as they were before JSON, which has no NaN."""
    return {name: math.nan if value is None else value for name, value in row.items()}
