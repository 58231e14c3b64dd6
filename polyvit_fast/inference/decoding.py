"""Inputs become grids, batch by batch, by the decoder of their task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from polyvit_fast.config import Decoder, Task, Train
from polyvit_fast.data.dali import UnavailableError
from polyvit_fast.data.decoder_messages import decode_or_forget, describe_messages
from polyvit_fast.data.decoders import build_decoder, build_task_decoder
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import NO_FILES_FAULT, DataError, evaluation_size
from polyvit_fast.data.threads import count_decoding_threads
from polyvit_fast.inference.inputs import Item, Skip, list_items
from polyvit_fast.media import DEFECTS, Media, printable
from polyvit_fast.randomness import generator

_logger = logging.getLogger(__name__)


@dataclass
class GridReader:
    """Reads the inputs of one task, as an evaluation reads its files: the same decoder, views and batch."""

    name: str
    config: Train
    decoder: Decoder | None = None
    """Built for the first input that has to be decoded."""
    reported: set[str] = field(default_factory=set)
    """Kinds of files about whose damage libraries have written, and which were named."""

    @property
    def task(self) -> Task:
        """The task's record."""
        return self.config.tasks[self.name]

    def read(self, inputs: Any, skip: Skip) -> Iterator[tuple[list[str], Tensor]]:
        """Names and grids `[input, view, frames, rows, columns, channels]` of all inputs, in order. A broken one is given to `skip`."""
        items, position = list_items(inputs, self.task.modality, skip), 0
        while batch := list(islice(items, evaluation_size(self.task))):
            for _, alike in groupby(batch, _form):
                group = list(alike)
                names, grids = self._read_group(group, position, skip)
                position += len(group)
                if names:
                    yield names, grids

    def _read_group(self, items: Sequence[Item], position: int, skip: Skip) -> tuple[list[str], Tensor]:
        """The good ones of items that are all media, or all grids of one size."""
        names, grids = [item.name for item in items], [item.content for item in items if isinstance(item.content, Tensor)]
        if grids:
            return names, torch.stack(grids)
        self.decoder = decoder = self.decoder or self._build_decoder()
        try:
            return names, self._decode(decoder, items, position)
        except NO_FILES_FAULT:
            raise
        except Exception:
            good = []
            for number, item in enumerate(items):
                try:
                    grids.append(self._decode(decoder, [item], position + number))
                    good.append(item.name)
                except NO_FILES_FAULT:
                    raise
                except Exception as error:
                    skip(item.name, error)
            return good, torch.cat(grids) if grids else torch.empty(0)

    def _decode(self, decoder: Decoder, items: Sequence[Item], position: int) -> Tensor:
        media = [item.content for item in items if isinstance(item.content, Media)]
        rngs = [generator(self.config.seed, "augment", self.name, position + number) for number in range(len(media))]
        try:
            grids = decode_or_forget(decoder, media, rngs)
        except UnavailableError as error:
            raise DataError(f"task {self.name}: {error}") from error
        except DEFECTS as error:
            names = ", ".join(printable(item.name) for item in items)
            error.add_note(f"task {self.name}: while decoding {names}. It is a bug in the decoder, not a broken file: please report it")
            raise
        for text in describe_messages(self.reported, media, lambda row: decoder([media[row]], [rngs[row]])):
            _logger.warning("task %s: %s", self.name, text)
        return grids

    def _build_decoder(self) -> Decoder:
        task, data = self.task, self.config.data
        on_gpu = self.config.device == "cuda" and data.decoding != "cpu"
        options: dict[str, Any] = {"batch": evaluation_size(task), "train": False, "num_threads": count_decoding_threads(data.num_threads)}
        options["device"] = "cuda" if on_gpu else "cpu"
        try:
            if isinstance(task.val, Synthetic):  # its decoder makes grids up
                return build_decoder(task.modality, **options)
            return build_task_decoder(task.val, task, **options)
        except UnavailableError as error:
            raise DataError(f"task {self.name}: {error}") from error


def _form(item: Item) -> tuple[object, ...]:
    """What items that are read together have in common."""
    return (item.content.shape, item.content.dtype) if isinstance(item.content, Tensor) else ()
