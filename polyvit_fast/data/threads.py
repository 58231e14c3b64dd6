"""A function over many items on a few threads, for work that releases Python's lock (decoding by FFmpeg does)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


def map_in_threads(function: Callable[[Any], Any], items: Sequence[Any], num_threads: int) -> list[Any]:
    """The results of `function` for `items`, in order. Raises what the first failing item raised, after all have ended."""
    if num_threads < 1:
        raise ValueError(f"num_threads = {num_threads} must be at least 1")
    results: list[Any] = [None] * len(items)
    errors: dict[int, BaseException] = {}
    waiting = iter(range(len(items)))  # next() on a range iterator is atomic under Python's lock

    def work() -> None:
        for i in waiting:
            try:
                results[i] = function(items[i])
            except BaseException as error:
                errors[i] = error

    # Daemon threads instead of an executor: Python joins an executor's threads at exit, so a hung decoder would hang the exit too.
    threads = [threading.Thread(target=work, daemon=True, name="decode") for _ in range(min(num_threads, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return results
