"""DALI graphs on the CPU that are run batch by batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyvit_fast.media import MediaError


def new_pipeline(batch: int, num_threads: int) -> tuple[Any, Any, Any]:
    """An empty graph that runs when it is called and not ahead (the stream of batches does that), and DALI's `fn` and `types`."""
    from nvidia.dali import fn, pipeline, types

    return pipeline.Pipeline(batch_size=batch, num_threads=num_threads, device_id=None, prefetch_queue_depth=1), fn, types


def run(pipeline: Any, failure: str, **inputs: list[np.ndarray]) -> Any:
    """The outputs for one batch. Raises MediaError, `failure` with DALI's reason, when a sample cannot be decoded; the next run works."""
    try:
        return pipeline.run(**inputs)
    except RuntimeError as error:
        detail = str(error).rpartition("encountered:")[2].partition("Current pipeline")[0].partition("C++ context")[0]
        raise MediaError(f"{failure} ({' '.join(detail.split()).rstrip(' :.')})") from error
