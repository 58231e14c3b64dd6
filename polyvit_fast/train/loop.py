"""The training loop. It reads top to bottom: start (fresh or resumed), steps along the plan, log, evaluate, save, finish."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from polyvit_fast.config import Train
from polyvit_fast.data.decoder_messages import catch_decoder_messages
from polyvit_fast.data.device import GpuDecoder
from polyvit_fast.data.stream import DataError, Interrupted, prefetch, request_batches
from polyvit_fast.extras import TRAINING, require
from polyvit_fast.signals import Stop, stop_on_signals
from polyvit_fast.train.capture import CapturedStep, capture
from polyvit_fast.train.distributed.process_group import process_group
from polyvit_fast.train.evaluate import evaluate, use_device
from polyvit_fast.train.feed import InputBuffers, Inputs, feed, pin
from polyvit_fast.train.hardware import choose_hardware
from polyvit_fast.train.output.log import Result
from polyvit_fast.train.run import Interval, NonFiniteError, Run, open_run, save
from polyvit_fast.train.schedule import count_steps
from polyvit_fast.train.step import Step, TaskCounters

GIB = 1 << 30
DIVERGED, FAILED = 1000, 1001
"""What a process sends to the others when too many steps in a row were skipped, and when its data failed.

The numbers of signals, which it sends too, are smaller.
"""


class _EvaluationStopped(Exception):  # noqa: N818 - no error
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
    rank: int = 0
    """Of this process."""


def train(config: Train, experiment: str, argv: list[str]) -> Outcome:
    """Train `config` in its run folder, from the newest checkpoint there if it fits. Under torchrun, all processes train together.

    Raises ValueError for a configuration or data list that cannot work or a run folder in use, DataError, NonFiniteError, CheckpointError,
    PeerLost; Stopped, a KeyboardInterrupt, for a signal before the first step.
    """
    require("training", *TRAINING)
    hardware = choose_hardware(config, resumes=True)
    config = hardware.config
    with (
        stop_on_signals() as stop,
        process_group(config.device) as world,
        use_device(config, world),
        catch_decoder_messages(),
        open_run(config, world, experiment, argv) as run,
    ):
        run.log.message(hardware.describe_all(world))
        stop.at_once = False  # from here on a signal lets the current step end and a checkpoint be written
        step, batches = _prepare(run, stop)
        run.clock.restart()
        resumed_at = run.done
        while not run.has_ended:
            try:
                _train_step(run, step, batches, stop)
            except Interrupted:
                break
            if run.done % config.log.log_every_steps == 0 or run.done == len(run.plan):
                _begin_interval(run)
            _log_intervals(run, wait=False)
            evaluated = config.log.eval_every_steps and run.done % config.log.eval_every_steps == 0 and _evaluate(run, stop)
            if (evaluated or run.done % config.log.save_every_steps == 0) and run.done < len(run.plan):
                _save(run)
        if run.saved < run.done:
            _save(run, must=True)
        if run.metrics_step < run.done and not _check_all(run, stop) and _evaluate(run, stop):
            _save(run, must=True)
        if run.has_stopped_early:
            _log_early_stop(run, resumed=run.done == resumed_at)
        if run.step.device.type == "cuda":
            _log_memory(run)
        if stop.signal:
            run.log.message(f"stopped by {stop.name} after step {run.done}; the checkpoint is saved, the same command goes on from there")
        del step, batches  # NCCL waits until no captured graph needs it any more
        return Outcome(run.done, stop.signal, run.metrics, _list_results(run), world.rank)


def _prepare(run: Run, stop: Stop) -> tuple[Step | CapturedStep, Iterator[tuple[str, Inputs]]]:
    """The step, captured where that is possible, and the batches of the plan on the device, the next ones decoded ahead."""
    config, step, requests = run.config, run.step, request_batches(run.loaders, run.plan, run.done)
    ahead = {"depth": config.data.prefetch, "timeout_seconds": config.data.decode_timeout_seconds, "stop": lambda: stop.signal}
    if step.device.type == "cpu":
        return step, ((name, Inputs.from_batch(batch)) for name, batch in prefetch(requests, **ahead))
    dtypes = {name: loader.grid_dtype() for name, loader in run.loaders.items()}
    buffers, captured = InputBuffers(config, dtypes, step.device, run.world.size), step
    if config.compute.capture and not config.distributed.sharded and not run.has_ended:
        run.log.message("capturing the steps as CUDA graphs")
        captured = capture(step, buffers, run.plan[run.done :], lambda text: run.log.message(text, "warning"))
    return captured, feed(prefetch(pin(requests), **ahead), buffers)


def _train_step(run: Run, step: Step | CapturedStep, batches: Iterator[tuple[str, Inputs]], stop: Stop) -> None:
    names, clock = run.plan[run.done], run.clock
    counters = run.step.counters.clone() if len(names) > 1 else run.step.counters
    step.begin(names, run.rates[run.done], run.done, run.rates.weigh(run.done))
    try:
        for number, _ in enumerate(names, 1):
            name, inputs = _next_inputs(run, batches, stop)
            clock.mark_data_ready()
            step.forward_backward(name, inputs, last=number == len(names))
            if number == len(names):
                step.update()
                run.watched.append((run.done, run.step.watch_counters()))
            clock.end(name)
    except (Interrupted, DataError):
        run.step.counters.copy_(counters)  # a resume begins with this update's first minibatch, which would count twice
        raise
    run.done += 1
    run.log.tick(run.done, names)


def _next_inputs(run: Run, batches: Iterator[tuple[str, Inputs]], stop: Stop) -> tuple[str, Inputs]:
    """The next batch, when every process has its own. Raises Interrupted when one was asked to stop, DataError when one has none."""
    error, found = None, None
    try:
        found = next(batches)
    except DataError as failure:
        error = failure
    except Interrupted:
        pass
    stopped = _check_all(run, stop, FAILED if error else DIVERGED if _find_divergence(run) else 0)
    if stopped == DIVERGED:
        _check_patience(run)
    if stopped == FAILED:
        reasons = run.world.broadcast(run.world.gather(error and str(error)))
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        raise error or DataError(f"process {rank}: {reason}")
    if stopped or found is None:
        raise Interrupted
    return found


def _check_all(run: Run, stop: Stop, status: int = 0) -> int:
    """The signal that any process got, or a larger `status` of one of them; 0: go on. All processes call it."""
    largest = run.world.all_reduce_max(max(status, stop.signal))
    if 0 < largest < DIVERGED:
        stop.signal = largest
    return largest


def _begin_interval(run: Run) -> None:
    run.intervals.append(Interval(run.done, run.rates[run.done - 1], run.step.read_counters(), run.clock.lap()))


def _find_divergence(run: Run, *, wait: bool = False) -> NonFiniteError | None:
    """The error of the first step that was one skipped step too many, of those whose counters have arrived, or with `wait` of all.

    Counters arrive without the host waiting for the device: on a GPU a step or two after theirs.
    """
    while run.watched and (wait or run.watched[0][1].is_ready()):
        step, counters = run.watched[0]
        for name, row in counters.wait().items():
            if row.skipped_in_a_row >= run.config.compute.nonfinite_patience and row.last_skipped_step == step:
                return NonFiniteError(_describe_divergence(run, name, row))
        run.watched.popleft()
    return None


def _check_patience(run: Run) -> None:
    """Raise NonFiniteError, in all processes alike, when a task has had too many skipped steps in a row. Waits for the device."""
    error = _find_divergence(run, wait=True)
    if error:
        _log_intervals(run, wait=True)
        raise error


def _log_intervals(run: Run, *, wait: bool) -> None:
    """Log the intervals that the devices of all processes have finished; with `wait`, all of them."""
    while run.intervals and (wait or not run.world.all_reduce_max(int(not run.intervals[0].counters.is_ready()))):
        interval = run.intervals.popleft()
        counters = interval.counters.wait()
        run.count_time(interval.spans)
        rows = {name: _summarise(run, interval.step, name, row) for name, row in counters.items() if row.steps}
        run.log.log_interval(interval.step, interval.lr, rows)
        for advice in run.advisor.advise(rows, run.config, run.loaders, run.world.local_size):
            run.log.message(advice)


def _summarise(run: Run, done: int, name: str, counters: TaskCounters) -> dict[str, int | float]:
    """A task's line of the log after `done` steps; its times start again."""
    times = run.interval_times[name]
    seconds = max(times.seconds, 1e-9)
    last = next(step for step in reversed(range(done)) if name in run.plan[step])
    row: dict[str, int | float] = {
        "loss": counters.loss,
        "accuracy": counters.matches,
        "steps": counters.steps,
        "examples_per_second": counters.steps * run.config.tasks[name].batch / seconds,
        "data_wait_ratio": times.waited / seconds,
        "skipped": counters.skipped,
        "broken_files": len(run.loaders[name].broken),
        "lr": run.rates[last],
    }
    if counters.updates:
        row["grad_norm"] = counters.grad_norm
        if run.config.optim.clip_norm:
            row["clipped_ratio"] = counters.clipped
    times.seconds = times.waited = 0.0
    return row


def _describe_divergence(run: Run, name: str, row: TaskCounters) -> str:
    batch = count_steps(run.plan[: row.last_skipped_step])[name]
    files = [sample.media.name for sample in run.loaders[name].step_samples(batch)]
    return (
        f"task {name}: the loss or gradient was not finite in {row.skipped_in_a_row} of its steps in a row, the last one step "
        f"{row.last_skipped_step} on {len(files)} files ({', '.join(files[:3])}, …). None of them has changed the weights. Lower optim.lr "
        f"or tasks.{name}.lr_scale, lengthen optim.warmup_steps, or look at these files; take another --out"
    )


def _save(run: Run, *, must: bool = False) -> None:
    _log_intervals(run, wait=True)
    _check_patience(run)
    save(run, must=must)


def _evaluate(run: Run, stop: Stop) -> bool:
    """Evaluate all tasks; False when a signal cut it short."""

    def progress(task: str, done: int, total: int) -> None:
        if _check_all(run, stop):
            raise _EvaluationStopped
        run.log.show_evaluation(task, done, total)

    _log_intervals(run, wait=True)
    _check_patience(run)
    try:
        with run.step.optimizer.use_ema():
            run.metrics = evaluate(run.step.model, run.config, run.validation, progress, run.world)
    except _EvaluationStopped:
        return False
    run.metrics_step = run.done
    run.log.log_evaluation(run.done, run.metrics)
    values = [run.metrics[name][task.metric] for name, task in run.config.tasks.items()]
    score = sum(value for value in values if not math.isnan(value)) / len(values)
    if score > run.best_score:
        run.best_step, run.best_score, run.evaluations_since_best = run.done, score, 0
    else:
        run.evaluations_since_best += 1
    run.clock.restart()
    return True


def _log_early_stop(run: Run, *, resumed: bool) -> None:
    folder, fraction = run.config.folder, math.prod(run.rates.of_run.find(run.done - 1))
    begin = "this run has stopped early before," if resumed else "stopped early"
    run.log.message(
        f"{begin} after step {run.done:,} of {len(run.plan):,}: the mean metric was {run.best_score:.4f} after step {run.best_step:,}, "
        f"and not above that in the {run.evaluations_since_best} evaluations since. The best checkpoint is kept: polyvit-fast eval "
        f"{folder} --checkpoint best. The learning rate was still {fraction:.0%} of its peak, for its cosine was made for all steps. "
        "To go on, start the same command with --early-stop-evaluations 0, or with a larger number"
    )


def _log_memory(run: Run) -> None:
    decoders = [loader.decoder for loader in run.loaders.values() if isinstance(loader.decoder, GpuDecoder)]
    held = max((decoder.memory_bytes()[1] for decoder in decoders), default=0)
    run.log.message(
        f"peak GPU memory {torch.cuda.max_memory_reserved() / GIB:.1f} GiB by PyTorch; the decoder that needs the most takes "
        f"{held / GIB:.1f} GiB"
    )


def _list_results(run: Run) -> list[Result]:
    steps, results = count_steps(run.plan[: run.done]), []
    for name, row in run.metrics.items():
        task = run.config.tasks[name]
        speed = steps[name] * task.batch / run.seconds[name] if run.seconds[name] else float("nan")
        results.append(Result(name, task.modality.name, task.metric, row[task.metric], steps[name], speed))
    return results
