"""What all GPU decoders need: their stream, copies to the GPU, and the fallback to the CPU's decoder for what the GPU refuses."""

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

PATIENCE = 3  # batches in a row that the GPU refuses and the CPU decodes, before all go to the CPU


class GpuDecoder(ABC):
    """Grids on `device`, equal to those of `on_cpu` except for rounding: the same random numbers are drawn in the same order.

    A batch that the GPU refuses or has no memory for falls back to `on_cpu` (None where the GPU decodes no files), which either decodes
    it or says which file is broken. The result of a call is complete, so any stream may use it; a stream other than the default one needs
    PyTorch's `record_stream` before the result is freed. `device` may be the CPU, where tests run the same code without streams.
    """

    note: str = ""
    """What the user should read once: that files go through the CPU, and why. A call may set it."""

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
            refusal = error.with_traceback(None)  # its stack frames hold tensors, whose memory the CPU's grids may need
        for rng, state in zip(rngs, states, strict=True):
            rng.bit_generator.state = state
        grid = send(on_cpu(media, rngs), self.device)
        self._count_refusal(refusal)
        return grid

    def _count_refusal(self, error: Exception) -> None:
        self.refused = PATIENCE if isinstance(error, UnavailableError) else self.refused + 1
        if self.refused >= PATIENCE or not self.note:
            what = "from now on its files go" if self.refused >= PATIENCE else "a batch went"
            self.note = f"{what} through the CPU, because the GPU's decoder refused: {error}"

    def borrow(self, output: Any) -> Tensor:
        """A PyTorch tensor in the memory of a DALI output, which DALI may write to again after this call of the decoder."""
        tensor = torch.from_dlpack(output)
        self._borrowed.append(tensor)  # if it were freed before the stream is done, DALI would write to memory that is still read
        return tensor

    def count(self, content: int, decoded: int) -> None:
        """Remember the largest run of a graph: the bytes of its files and of what they decode to."""
        self.content_bytes, self.decoded_bytes = max(self.content_bytes, content), max(self.decoded_bytes, decoded)

    def memory_bytes(self) -> tuple[int, int]:
        """Memory (on the host, on the device): the most that DALI held for one run, and PyTorch's for the stream of all decoders.

        DALI keeps the memory of a run for the next one of any task. NVDEC's own sessions belong to the driver and are not counted.
        """
        if self.device.type == "cpu":
            return self.content_bytes + self.decoded_bytes, 0
        stream = _stream(self.device).cuda_stream
        segments = [s["total_size"] for s in torch.cuda.memory_snapshot() if s["stream"] == stream and s["device"] == self.device.index]
        return self.content_bytes, self.decoded_bytes + sum(segments)

    def release(self) -> None:
        """Give back what an idle decoder holds: DALI's graphs, which the next call builds anew, and the memory that DALI keeps."""
        for graph in self.graphs:
            graph.release()
        self.backend.ReleaseUnusedMemory()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made on the current stream without waiting for it; on the CPU the tensor itself."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # PyTorch keeps pinned memory until the copy is done


def send_array(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, as `send` copies it."""
    return send(torch.from_numpy(array), device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all decoders of a GPU: PyTorch keeps free memory per stream, so idle tasks hold none of their own."""
    return torch.cuda.Stream(device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run PyTorch's work inside on the decoders' stream, in whichever thread, and wait for it at the end. On the CPU, do nothing."""
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
