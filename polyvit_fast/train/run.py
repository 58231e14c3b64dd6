"""A run with everything that it holds: opened fresh or from its newest checkpoint, and saved."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import torch

from polyvit_fast.config import StepPlan, Train
from polyvit_fast.data.sources.fingerprint import Fingerprint
from polyvit_fast.data.stream import DataError, Loader
from polyvit_fast.files import make_folder, write_atomically
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.apply import LoadReport
from polyvit_fast.train.clock import Clock, Span, TaskTime
from polyvit_fast.train.distributed.process_group import PeerLost, World
from polyvit_fast.train.output.advice import WaitAdvisor
from polyvit_fast.train.output.log import Log, PeerLog
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.config_json import to_json
from polyvit_fast.train.run_folder.initial_weights import describe_tokenizers, load_initial_weights
from polyvit_fast.train.run_folder.lock import hold
from polyvit_fast.train.run_folder.record import describe_run, record_classes
from polyvit_fast.train.run_folder.resume import Steps, check_resume, compare_data, list_lengths, open_data
from polyvit_fast.train.schedule import LearningRates, check_warmup, compute_warmup_steps, count_steps, make_step_plan, set_steps
from polyvit_fast.train.step import PendingCounters, Step

RANDOM_NUMBERS = "weights, schedule, sample order, augmentation, dropout: hashes of (seed, purpose, task, step)"

STUCK_SECONDS = 30.0
CPU_MEMORY = "DefaultCPUAllocator"
"""In the message of PyTorch's error where there is no memory left."""
Level = Literal["info", "warning", "error"]


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
    lengths: list[Steps] = field(default_factory=list)
    """The steps of each task, before the run was lengthened, each time, and now."""
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
    advisor: WaitAdvisor = field(default_factory=WaitAdvisor)
    watched: deque[tuple[int, PendingCounters]] = field(default_factory=deque)
    """Steps whose counters have not been looked at yet."""
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
def open_run(config: Train, world: World, experiment: str, argv: list[str]) -> Iterator[Run]:
    """The run, fresh or resumed, with its log open. Raises ValueError when the run folder, the data or the device cannot be used.

    All that can be wrong is looked at before anything is written: a start that fails leaves no run folder behind.
    """
    if not config.out:
        raise ValueError("out is empty: it must name the run folder")
    with _hold_folder(config, world):
        found = _find_checkpoint(config, world)
        lengths = check_resume(config, found)
        plan = make_step_plan(config, lengths[:-1])
        step, reports = _build_step(config, world, found)
        messages = _Messages()
        data = open_data(config, list(count_steps(plan)), world, messages.message)
        if found:
            compare_data(config, found, data, messages.message)
        world.all_reduce_max(0)  # no process has an error
        if world.rank == 0:
            describe_run(config.folder, experiment, argv, config)
            record_classes(config.folder, {name: loader.classes for name, loader in data.val.items()})
        with _open_log(config, plan, world, found) as log:
            rates, clock = LearningRates(config, plan), Clock(step.device)
            run = Run(config, plan, world, step, data.train, data.val, log, clock, data.train_fingerprints, data.val_fingerprints, rates)
            run.lengths = lengths
            run.interval_times = {name: TaskTime() for name in config.tasks}
            run.seconds = dict.fromkeys(config.tasks, 0.0)
            _log_start(run, experiment, reports)
            messages.pass_on(log)
            if found:
                _restore(run, found)
            with _save_on_error(run):
                yield run


class _Messages:
    """What is said before the log is open, and then passed on to it."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Level]] = []
        self.log: Log | PeerLog | None = None

    def message(self, text: str, level: Level = "info") -> None:
        """As `Log.message`."""
        if self.log:
            self.log.message(text, level)
        else:
            self.kept.append((text, level))

    def pass_on(self, log: Log | PeerLog) -> None:
        """Let the log have all that was said, and what is said from now on."""
        self.log = log
        for text, level in self.kept:
            log.message(text, level)


@contextmanager
def _hold_folder(config: Train, world: World) -> Iterator[None]:
    """Inside, the run folder exists and no other run writes to it: rank 0, which alone writes, holds its lock."""
    with ExitStack() as stack:
        with world.rank0_first():
            if world.rank == 0:
                try:
                    stack.enter_context(make_folder(config.folder))
                except OSError as error:
                    fault = f"the run folder {config.folder} cannot be made: {error.strerror}; choose another with --out"
                    raise ValueError(fault) from error
                stack.enter_context(hold(config.folder))
        yield


def _build_step(config: Train, world: World, found: checkpoint.Checkpoint | None) -> tuple[Step, list[LoadReport]]:
    """The step with its weights, and what became of the initial ones. Raises ValueError when the memory is too small."""
    try:
        model = PolyViT.from_config(config)
        reports = [] if found else load_initial_weights(model, config)
        step = Step(model.train(), config, world)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and CPU_MEMORY not in str(error):
            raise
        device = "GPU" if config.device == "cuda" else "computer"
        raise ValueError(
            f"the {device}'s memory is too small for this model and its optimizer ({_name_reason(error)}): choose a smaller one "
            "(--model.dim, --model.depth, --model.mlp-dim), or divide it over several GPUs with --sharded; `polyvit-fast plan` estimates "
            "what fits"
        ) from error
    if found:
        step.parameters.load_state_dict(found.load_tensors("model"))
        step.optimizer.load_state_dict(found.load_tensors("optimizer"))
        if config.optim.ema_decay:
            step.optimizer.load_ema(found.load_tensors("ema"))
        step.load_counters(found.state["counters"])
    return step, reports


def _open_log(config: Train, plan: StepPlan, world: World, found: checkpoint.Checkpoint | None) -> Log | PeerLog:
    if world.rank:
        return PeerLog(world.rank)
    first_step = found.step if found else 0
    counts = count_steps(plan)
    totals = {name: counts[name] for name in config.tasks}
    return Log(config.folder, totals, len(plan), first_step, done=count_steps(plan[:first_step]))


def _log_start(run: Run, experiment: str, reports: list[LoadReport]) -> None:
    config, world = run.config, run.world
    parameters = list(run.step.model.parameters())
    num_parameters, num_trained = (sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad]))
    trained = f" ({num_trained:,} trained)" if num_trained < num_parameters else ""
    processes = f", {world.size} processes" if world.size > 1 else ""
    run.log.message(
        f"{experiment}: {num_parameters:,} parameters{trained}, {len(run.plan):,} steps, tasks: {', '.join(config.tasks)}{processes}; "
        f"run folder {config.folder}"
    )
    warning = check_warmup(config, len(run.plan))
    if warning and world.rank == 0:
        run.log.message(warning, "warning")
    if world.rank == 0 and reports:
        _log_initial_weights(run, reports)


def _log_initial_weights(run: Run, reports: list[LoadReport]) -> None:
    """A sentence for each source on the terminal, and a line for each tensor in init.txt."""
    for report in reports:
        run.log.message(f"initial weights: {report.summarise()}")
        for remark in report.remarks:
            run.log.message(f"initial weights: {remark}", "warning")
    texts = [f"{report.source} ({report.kind})\n" + "".join(f"  {line}\n" for line in report.lines()) for report in reports]
    write_atomically(run.config.folder / "init.txt", "\n".join(texts), durable=True)


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
            raise ValueError(
                f"the GPU's memory is too small ({_name_reason(error)}): start the same command again with --recompute, or, with another "
                "--out, give the largest task more micro_batches; `polyvit-fast plan` estimates what fits"
            ) from error
        raise


def _describe_position(run: Run) -> str:
    tasks = ", ".join(run.plan[run.done]) if run.done < len(run.plan) else "none left"
    return f"process {run.world.rank}, step {run.done} (task {tasks})"


def _name_reason(error: BaseException) -> str:
    """How much PyTorch could not allocate, as it says itself."""
    tried = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    return tried[0].lower() if tried else str(error).partition(". ")[0]


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
        fault = error or f"step {run.done}: process 0 could not write the checkpoint"
        raise checkpoint.CheckpointError(f"{fault}. Make room there, and start the same command again: it goes on from the newest one")
    if error:
        run.log.message(f"step {run.done:,}: {error}. Training goes on; the next try is {_describe_next_save(run)}", "error")
    run.clock.restart()


def _describe_next_save(run: Run) -> str:
    """When the training loop saves again: at the next multiple of an interval, after an evaluation, or at the end."""
    log, end = run.config.log, len(run.plan)
    intervals = [steps for steps in (log.save_every_steps, log.eval_every_steps) if steps]
    step = min(end, *((run.done // steps + 1) * steps for steps in intervals))
    return f"in {step - run.done:,} steps, {'at the end' if step == end else f'after step {step:,}'}"


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
        "lengths": run.lengths,
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


def _restore(run: Run, found: checkpoint.Checkpoint) -> None:
    """Continue from a checkpoint whose weights are loaded."""
    state = found.state
    run.done = run.saved = found.step
    run.metrics_step = state["metrics_step"]
    run.metrics = {name: _restore_nan(row) for name, row in state["metrics"].items()}
    run.seconds.update(state["seconds"])
    run.interval_times.update({name: TaskTime(*times) for name, times in state.get("interval_times", {}).items()})
    run.evaluations_since_best = state.get("evaluations_since_best", 0)
    if state["best_step"] is not None:
        run.best_step, run.best_score = state["best_step"], state["best_score"]
    run.log.message(f"resumed from step {found.step} of {len(run.plan)} ({found.path})")
    if run.lengths != list_lengths(found):
        _lengthen(run)
    elif run.done == len(run.plan) == run.metrics_step:
        run.log.message(
            "this run is finished: there is no step left to train. To lengthen it, give its tasks more steps (--tasks.NAME.steps)"
        )
    before = run.config.optim.warmup_steps
    is_older = "warmup_steps" not in state
    if is_older and run.world.rank == 0 and (found.step < before or compute_warmup_steps(run.config, len(run.plan)) != before):
        run.log.message(
            f"{found.path} is of an earlier version, whose warm-up began at a rate of 0 and took {before:,} steps "
            "in every schedule. The steps left have the rates that `polyvit-fast plot schedule` draws",
            "warning",
        )


def _lengthen(run: Run) -> None:
    """Say what becomes of the learning rate of a run that has more steps from now on."""
    *earlier, before, now = run.lengths
    config = set_steps(run.config, before)
    plan = make_step_plan(config, earlier)
    run.evaluations_since_best = 0  # who lengthens a run that has stopped early wants it to go on
    rates = LearningRates(config, plan)
    steps = ", ".join(f"{name} {before[name]:,} -> {now[name]:,}" for name in now if now[name] != before[name])
    there = f"{rates[run.done]:.3g} for the next step" if run.done < len(plan) else f"{rates[run.done - 1]:.3g} in the last step"
    warmup, lr = run.rates.of_run.warmup, run.config.optim.lr
    peak = f"after the warm-up of {warmup:,.0f} steps" if warmup else "at its start"
    over = ", which is over and not repeated" if 0 < warmup <= run.done else ""
    run.log.message(
        f"the run is lengthened from {len(plan):,} to {len(run.plan):,} steps ({steps}). What was planned stays as it was, and the "
        f"further steps come after it. From now on the learning rate is that of a run of {len(run.plan):,} steps, with its peak of "
        f"{lr:.3g} {peak}{over}: it was {there}, and is {run.rates[run.done]:.3g} now",
        "warning" if run.world.rank == 0 else "info",
    )


def _restore_nan(row: dict[str, float | None]) -> dict[str, float]:
    """A task's metrics as they were before JSON, which has no NaN."""
    return {name: math.nan if value is None else value for name, value in row.items()}
