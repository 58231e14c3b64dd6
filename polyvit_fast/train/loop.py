"""The training loop. It reads top to bottom: start (fresh or resumed), steps along the plan, log, evaluate, save, finish."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch

from polyvit_fast.config import Plan, Train
from polyvit_fast.data.stream import Batch, DataError, Interrupted, Loader, prefetch, training_jobs
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.randomness import key
from polyvit_fast.train import checkpoint
from polyvit_fast.train.evaluate import evaluate, on_device
from polyvit_fast.train.log import Log, Result
from polyvit_fast.train.record import describe_run, resume_differences, to_json
from polyvit_fast.train.schedule import count_steps, learning_rate, make_plan
from polyvit_fast.train.step import Step, TaskCounters

RNG_LAW = "weights, schedule, sample order, augmentation, dropout: hashes of (seed, purpose, task, step)"


class NonFiniteError(RuntimeError):
    """Too many steps in a row with a loss or gradient that is not finite."""


@dataclass
class Stop:
    """Which signal asked the run to save and end; 0: none."""

    signal: int = 0


class _Stopped(Exception):  # noqa: N818 - no error
    """Leaves an evaluation that a signal cut short."""


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    signal: int
    metrics: dict[str, dict[str, float]]
    """Of each task, at the last evaluation."""
    results: list[Result]
    """The same as the lines of a table."""


@dataclass
class Run:
    """Everything that a run holds on to."""

    config: Train
    plan: Plan
    step: Step
    loaders: dict[str, Loader]
    validation: dict[str, Loader]
    log: Log
    done: int = 0
    """Steps behind us."""
    metrics_step: int = -1
    """Steps that were behind us at the last evaluation."""
    saved: int = -1
    """Steps that were behind us at the last checkpoint."""
    best_step: int | None = None
    best_score: float = float("-inf")
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    interval_seconds: dict[str, float] = field(default_factory=dict)
    """Time that each task took since the last log line."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each task took in the whole run, waiting for its data included."""


def train(config: Train, experiment: str, argv: list[str]) -> Outcome:
    """Train `config` in its run folder, from the newest checkpoint there when it agrees.

    Raises ValueError for a configuration or data list that cannot work, DataError, NonFiniteError, CheckpointError.
    """
    plan = make_plan(config)
    with on_device(config), _opened(config, plan, experiment, argv) as run, _stop_on_signals(run) as stop:
        jobs = training_jobs(run.loaders, plan, run.done)
        batches = prefetch(jobs, depth=config.prefetch, timeout_seconds=config.decode_timeout_seconds, stop=lambda: stop.signal)
        while run.done < len(plan) and not stop.signal:
            try:
                _one_step(run, batches)
            except Interrupted:
                break
            if run.done % config.log_every_steps == 0 or run.done == len(plan):
                _log_interval(run)
            evaluated = config.eval_every_steps and run.done % config.eval_every_steps == 0 and _evaluate(run, stop)
            if (evaluated or run.done % config.save_every_steps == 0) and run.done < len(plan):
                _save(run)
        if run.saved < run.done:
            _save(run, must=True)
        if run.metrics_step < run.done and not stop.signal and _evaluate(run, stop):
            _save(run, must=True)
        return Outcome(run.done, stop.signal, run.metrics, _results(run))


def _results(run: Run) -> list[Result]:
    steps, results = count_steps(run.plan[: run.done]), []
    for name, row in run.metrics.items():
        task = run.config.tasks[name]
        speed = steps[name] * task.batch / run.seconds[name] if run.seconds[name] else float("nan")
        results.append(Result(name, task.modality.name, task.metric, row[task.metric], steps[name], speed))
    return results


def _one_step(run: Run, batches: Iterator[tuple[str, Batch]]) -> None:
    started, step, config = time.monotonic(), run.done, run.config
    names = run.plan[step]
    torch.manual_seed(key(config.seed, "step", step) >> 1)
    for _ in names:
        name, batch = next(batches)
        run.step.forward_backward(name, batch, 1 / len(names))
    run.step.update(names, learning_rate(config, run.plan, step), step)
    run.done += 1
    seconds = (time.monotonic() - started) / len(names)
    for name in names:
        run.interval_seconds[name] += seconds
        run.seconds[name] += seconds
        run.log.tick(run.done, name)


def _log_interval(run: Run) -> None:
    counters = run.step.read_counters()
    rows = {}
    for name, row in counters.items():
        if row.steps:
            speed = row.steps * run.config.tasks[name].batch / max(run.interval_seconds[name], 1e-9)
            rows[name] = {"loss": row.loss, "accuracy": row.matches, "examples_per_second": speed, "steps": row.steps}
            rows[name] |= {"skipped": row.skipped, "broken_files": len(run.loaders[name].broken)}
            run.interval_seconds[name] = 0.0
    run.log.interval(run.done, learning_rate(run.config, run.plan, run.done - 1), rows)
    _check_patience(run, counters)


def _check_patience(run: Run, counters: dict[str, TaskCounters]) -> None:
    for name, row in counters.items():
        if row.skipped_in_a_row >= run.config.nonfinite_patience:
            batch = count_steps(run.plan[: row.last_skipped_step])[name]
            files = [sample.media.name for sample in run.loaders[name].step_samples(batch)]
            raise NonFiniteError(
                f"task {name}: the loss or gradient was not finite in {row.skipped_in_a_row} of its steps in a row, the last one step "
                f"{row.last_skipped_step} on {len(files)} files ({', '.join(files[:3])}, …). The weights are those before the first of "
                f"them. Lower optim.lr or tasks.{name}.lr_scale, lengthen optim.warmup_steps, or look at these files; take another --out"
            )


def _evaluate(run: Run, stop: Stop) -> bool:
    def progress(task: str, done: int, total: int) -> None:
        if stop.signal:
            raise _Stopped
        run.log.evaluating(task, done, total)

    try:
        with run.step.optimizer.averaged():
            run.metrics, run.metrics_step = evaluate(run.step.model, run.config, run.validation, progress), run.done
    except _Stopped:
        return False
    run.log.evaluation(run.done, run.metrics)
    values = [run.metrics[name][task.metric] for name, task in run.config.tasks.items()]
    score = sum(value for value in values if not math.isnan(value)) / len(values)
    if score > run.best_score:
        run.best_step, run.best_score = run.done, score
    return True


def _save(run: Run, *, must: bool = False) -> None:
    step, done = run.step, run.done
    tensors = {"model": step.parameters.named(step.parameters.values), "optimizer": step.optimizer.tensors()}
    if step.optimizer.ema is not None:
        tensors["ema"] = step.parameters.named(step.optimizer.ema)
    state = {
        "step": done,
        "counters": step.counters.tolist(),
        "rng": {"seed": run.config.seed, "law": RNG_LAW},
        "best_step": run.best_step,
        "best_score": None if run.best_step is None else run.best_score,
        "metrics": run.metrics,
        "metrics_step": run.metrics_step,
        "seconds": run.seconds,
        "interval_seconds": run.interval_seconds,
        "samples": {name: loader.fingerprint() for name, loader in run.loaders.items()},
    }
    try:
        keep, config = run.config.keep, to_json(run.config)
        checkpoint.save(run.config.folder, done, tensors, state, config, keep=keep, best_step=run.best_step)
        run.saved = done
    except checkpoint.CheckpointError as error:
        if must:
            raise
        run.log.message(f"step {done}: {error}. Training goes on; the next try is in {run.config.save_every_steps} steps", "error")


@contextmanager
def _opened(config: Train, plan: Plan, experiment: str, argv: list[str]) -> Iterator[Run]:
    """The run, fresh or resumed, with its log open."""
    if not config.out:
        raise ValueError("out is empty: it must name the run folder")
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the run folder {config.folder} cannot be made: {error.strerror}; choose another with --out") from error
    found = checkpoint.newest(config.folder)
    _check_resume(config, found)
    model = PolyViT.from_config(config).to(config.device).train()
    step = Step(model, config)
    describe_run(config.folder, experiment, argv, config)
    first_step = found.step if found else 0
    totals = dict(count_steps(plan))
    with Log(config.folder, totals, len(plan), first_step, done=count_steps(plan[:first_step])) as log:
        log.message(
            f"{experiment}: {_size(model)} parameters, {len(plan):,} steps, tasks: {', '.join(config.tasks)}; run folder {config.folder}"
        )
        loaders = {name: Loader(name, config, train=True, report=log.message) for name in totals}
        validation = {name: Loader(name, config, train=False, report=log.message) for name in config.tasks}
        run = Run(
            config,
            plan,
            step,
            loaders,
            validation,
            log,
            interval_seconds=dict.fromkeys(config.tasks, 0.0),
            seconds=dict.fromkeys(config.tasks, 0.0),
        )
        if found:
            _restore(run, found)
            log.message(f"resumed from step {found.step} of {len(plan)} ({found.path})")
        try:
            yield run
        except (DataError, NonFiniteError) as error:
            if run.saved < run.done:
                _save(run)
            log.note(f"error: {error}")  # who catches it tells it on the terminal
            raise


def _check_resume(config: Train, found: checkpoint.Checkpoint | None) -> None:
    if found is None:
        if checkpoint.any_left(config.folder):
            raise ValueError(f"{config.folder} holds checkpoints, but not a single whole one; move it away, or choose another --out")
        return
    if not config.resume:
        raise ValueError(f"{config.folder} holds a run already (step {found.step}) and resume is off; choose another --out or move it away")
    different = resume_differences(found.config, to_json(config))
    if different:
        raise ValueError(
            f"{config.folder} holds a checkpoint of another configuration; it differs in: {'; '.join(different)}. "
            "Choose another --out, or set these fields back to resume"
        )


def _restore(run: Run, found: checkpoint.Checkpoint) -> None:
    step = run.step
    for name, loader in run.loaders.items():
        before, now = found.state["samples"].get(name), loader.fingerprint()
        if before != now:
            raise ValueError(
                f"task {name}: its training files are not those of {found.path} (names and labels: {before}; now {now}), so their order "
                "would change. Put them back to resume, or choose another --out"
            )
    step.parameters.load(step.parameters.values, found.load_tensors("model"))
    step.optimizer.load(found.load_tensors("optimizer"))
    if step.optimizer.ema is not None:
        step.parameters.load(step.optimizer.ema, found.load_tensors("ema"))
    step.counters.copy_(torch.tensor(found.state["counters"], dtype=torch.float64))
    run.done, run.metrics, run.metrics_step = found.step, found.state["metrics"], found.state["metrics_step"]
    run.saved = run.done
    run.seconds.update(found.state["seconds"])
    run.interval_seconds.update(found.state["interval_seconds"])
    if found.state["best_step"] is not None:
        run.best_step, run.best_score = found.state["best_step"], found.state["best_score"]


def _size(model: PolyViT) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM only ask to stop; the step at hand ends, a checkpoint is written."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
        if stop.signal:
            name = signal.Signals(stop.signal).name
            run.log.message(f"stopped by {name} after step {run.done}; the checkpoint is saved, the same command goes on from there")
    finally:
        for number, old in before.items():
            signal.signal(number, old)
