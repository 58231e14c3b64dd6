"""DALI graphs that are run batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from polyvit_fast.media import MediaError


class UnavailableError(Exception):
    """DALI cannot do something on this machine, whatever the file, for instance because a library is missing. The message is the reason."""


class Graph:
    """A DALI graph that is built when it first runs, so that a task that never runs takes no memory, and again after `release`.

    A `fragile` graph is built anew after a failed run: DALI then refuses further runs of a graph with GPU operators. A graph on the CPU
    goes on.
    """

    def __init__(self, build: Callable[[], Any], *, fragile: bool = False) -> None:
        self.build, self.fragile = build, fragile
        self.pipeline: Any = None

    def ready(self) -> Any:
        """The built graph. Raises UnavailableError when it cannot be built."""
        if self.pipeline is None:
            try:
                self.pipeline = self.build()
            except RuntimeError as error:
                raise UnavailableError(_reason(error)) from error
        return self.pipeline

    def run(self, failure: str, **inputs: list[np.ndarray]) -> Any:
        """The outputs for one batch, as the function `run`. Raises as that and as `ready`."""
        try:
            return run(self.ready(), failure, **inputs)
        except MediaError:
            if self.fragile:
                self.release()
            raise

    def release(self) -> None:
        """Give back threads and memory."""
        self.pipeline = None


def new_pipeline(batch: int, num_threads: int, device_id: int | None = None) -> tuple[Any, Any, Any]:
    """An empty graph, and DALI's `fn` and `types`. It runs when it is called and not ahead, as the stream of batches already prefetches.

    With a `device_id` it may contain operators for that GPU; its outputs are then complete when they are given back.
    """
    from nvidia.dali import fn, pipeline, types

    return pipeline.Pipeline(batch_size=batch, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=1), fn, types


def run(pipeline: Any, failure: str, **inputs: list[np.ndarray]) -> Any:
    """The outputs for one batch. Raises MediaError, `failure` with DALI's reason, when a sample cannot be decoded; the next run works."""
    try:
        return pipeline.run(**inputs)
    except RuntimeError as error:
        raise MediaError(f"{failure} ({_reason(error)})") from error


def split_by_size(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Chunks of consecutive samples whose sizes add up to at most `limit`; a sample that exceeds it alone is a chunk of its own."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            yield slice(start, i)
            start, total = i, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))


def _reason(error: RuntimeError) -> str:
    text = str(error)
    detail = text.rpartition("encountered:")[2].partition("Current pipeline")[0].partition("C++ context")[0]
    return " ".join(detail.split()).rstrip(" :.")
