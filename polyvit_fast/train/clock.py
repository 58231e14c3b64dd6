"""How long the device computes for each task, and how long it waits for the task's data, without ever waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Span:
    """A minibatch on the device: `before` is the end of the one before it, `ready` the time when its data was there, `end` its own end."""

    task: str
    before: Any
    ready: Any
    end: Any


@dataclass
class TaskTime:
    """Seconds of a task in all, and those of them in which the device waited for data."""

    seconds: float = 0.0
    waited: float = 0.0


class Clock:
    """Time stamps of the device itself: events of its stream on a GPU, the host's time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.spans: list[Span] = []
        self.last = self.ready = self._mark()

    def restart(self) -> None:
        """Start again after other work, such as an evaluation, whose time belongs to no task."""
        self.last = self._mark()

    def mark_data_ready(self) -> None:
        """From here on the device computes: call it when the work that waits for the data has been queued."""
        self.ready = self._mark()

    def end(self, task: str) -> None:
        """The task's minibatch ends here."""
        end = self._mark()
        self.spans.append(Span(task, self.last, self.ready, end))
        self.last = end

    def lap(self) -> list[Span]:
        """The minibatches since the last call; on a GPU they may still be under way."""
        spans, self.spans = self.spans, []
        return spans

    def add_up(self, spans: Iterable[Span], tasks: Iterable[str]) -> dict[str, TaskTime]:
        """The time of each task in `spans`, which must have ended on the device."""
        times = {task: TaskTime() for task in tasks}
        for span in spans:
            times[span.task].seconds += self._between(span.before, span.end)
            times[span.task].waited += self._between(span.before, span.ready)
        return times

    def _mark(self) -> Any:
        if not self.is_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.is_cuda else end - start
