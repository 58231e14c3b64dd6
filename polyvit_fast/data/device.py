"""What decoders for a GPU share: their stream, the way to the GPU and back off it, and the CPU form for what the GPU refuses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyvit_fast.config import Decoder
from polyvit_fast.data.dali import Graph, UnavailableError
from polyvit_fast.media import Media, MediaError

PATIENCE = 3  # batches in a row that the GPU refuses and the CPU decodes, before the GPU is asked no more


class DeviceDecoder(ABC):
    """Grids on `device`, equal to those of `on_cpu` but for rounding: random numbers are drawn from the same generators in the same order.

    A batch that the GPU refuses or has no memory for goes through `on_cpu` (None: it decodes nothing), which decodes it too or says why a
    file is broken. What a call gives back is complete: any stream may use it, but those other than the default one must be told to PyTorch
    (`record_stream`) before it is freed. On the CPU, where tests run the same code, there are no streams.
    """

    note: str = ""
    """What the user should know once: that, and why, files go through the CPU. A call may set it."""

    def __init__(self, on_cpu: Decoder | None, device: torch.device) -> None:
        from nvidia.dali import backend

        self.on_cpu, self.device, self.backend = on_cpu, device, backend
        self.graphs: list[Graph] = []
        self.refused, self.decoded_bytes, self.content_bytes = 0, 0, 0
        self._borrowed: list[Tensor] = []

    @abstractmethod
    def decode(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Tensor:
        """The grids of a batch, perhaps not yet complete on the current stream."""

    def __call__(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Tensor:
        """Grids `[sample, view, frames, rows, columns, channels]`. Raises MediaError on a broken file; the next call works."""
        try:
            with own_stream(self.device):
                grid = self.decode(media, rngs) if self.on_cpu is None else self._decode_or_fall_back(self.on_cpu, media, rngs)
        finally:
            self._borrowed.clear()
        if self.device.type == "cuda":
            grid.record_stream(torch.cuda.default_stream(self.device))
        return grid

    def _decode_or_fall_back(self, on_cpu: Decoder, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Tensor:
        if self.refused >= PATIENCE:
            return send(on_cpu(media, rngs), self.device)
        states = [rng.bit_generator.state for rng in rngs]
        try:
            grid = self.decode(media, rngs)
            self.refused = 0
            return grid
        except (MediaError, UnavailableError, torch.OutOfMemoryError) as error:
            refusal = error.with_traceback(None)  # its frames hold tensors, whose memory the CPU's grids may need
        for rng, state in zip(rngs, states, strict=True):
            rng.bit_generator.state = state
        grid = send(on_cpu(media, rngs), self.device)
        self._count_refusal(refusal)
        return grid

    def _count_refusal(self, error: Exception) -> None:
        self.refused = PATIENCE if isinstance(error, UnavailableError) else self.refused + 1
        if self.refused >= PATIENCE or not self.note:
            what = "from now on its files go" if self.refused >= PATIENCE else "a batch went"
            self.note = f"{what} through the CPU, for the GPU's decoder refused: {error}"

    def borrow(self, output: Any) -> Tensor:
        """A tensor of DALI as one of PyTorch that shares its memory, which stays DALI's and is good until this call's end."""
        tensor = torch.from_dlpack(output)
        self._borrowed.append(tensor)  # freed before the stream is done, the memory would be written to while it is read
        return tensor

    def count(self, content: int, decoded: int) -> None:
        """Remember the largest run of a graph: the bytes that go in and those that are decoded."""
        self.content_bytes, self.decoded_bytes = max(self.content_bytes, content), max(self.decoded_bytes, decoded)

    def memory_bytes(self) -> tuple[int, int]:
        """(on the host, on the device): the most that DALI held for one run, and PyTorch's memory for the stream that all decoders share.

        DALI keeps what a run needed, for all tasks' next runs; NVDEC's own sessions belong to the driver and are not counted.
        """
        if self.device.type == "cpu":
            return self.content_bytes + self.decoded_bytes, 0
        stream = _stream(self.device).cuda_stream
        segments = [s["total_size"] for s in torch.cuda.memory_snapshot() if s["stream"] == stream and s["device"] == self.device.index]
        return self.content_bytes, self.decoded_bytes + sum(segments)

    def release(self) -> None:
        """Give back what an idle decoder holds: DALI's graphs, which the next call builds anew, and the memory that DALI kept."""
        for graph in self.graphs:
            graph.release()
        self.backend.ReleaseUnusedMemory()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made on the current stream without waiting for it. The CPU's own memory is not copied."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # PyTorch keeps pinned memory until the copy is done


def send_array(array: np.ndarray, device: torch.device) -> Tensor:
    """As `send`."""
    return send(torch.from_numpy(array), device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all decoders of a GPU, for PyTorch keeps free memory by stream: an idle task holds none of its own."""
    return torch.cuda.Stream(device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """PyTorch's work inside runs on the decoders' stream, in whichever thread, and is complete at the end. On the CPU: nothing."""
    if device.type == "cpu":
        yield
        return
    stream = _stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):  # a new thread's current device is the first GPU, not its process's
        try:
            yield
        finally:
            done = torch.cuda.Event(blocking=True)  # sleeps; spinning would take a core from the decoders
            done.record(stream)
            done.synchronize()
