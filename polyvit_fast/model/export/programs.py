"""A task as a file that holds its graph: `torch.export`'s .pt2, for PyTorch alone, and ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from polyvit_fast.extras import require
from polyvit_fast.model.export.graph import trace
from polyvit_fast.model.export.plain import PlainViT

DESCRIPTION = "polyvit_fast.json"
"""The extra file in a .pt2 that describes the model."""
OPSET = 20
"""Of ONNX: the first with GELU as one operation."""
LARGEST_FILE = 1 << 31
"""Of protobuf, in bytes; what is larger keeps its weights in a file of its own."""


def write_torch_export(vit: PlainViT, path: Path, description: str) -> None:
    """Write a .pt2; `torch.export.load(path).module()` computes the logits."""
    torch.export.save(trace(vit), path, extra_files={DESCRIPTION: description})


def write_onnx(vit: PlainViT, path: Path, properties: Mapping[str, str]) -> None:
    """Write an ONNX model with the input `preprocessing.input_name` and the output logits; `properties` become its metadata.

    Raises MissingExtraError without the packages that write it.
    """
    require("an export to ONNX", "onnx", "onnxscript")
    program, inputs = trace(vit), [vit.preprocessing.input_name]
    with _quiet():
        exported = torch.onnx.export(program, opset_version=OPSET, dynamo=True, verbose=False, input_names=inputs, output_names=["logits"])
    assert exported
    for node in exported.model.graph:
        node.metadata_props.clear()  # the lines of source files that it is from, a hundred times its own size
    exported.model.metadata_props.update(properties)
    exported.model.producer_name = "polyvit-fast"
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    exported.save(path, external_data=size > LARGEST_FILE * 0.9)  # the graph takes some bytes too


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter does not speak of packages that are not installed, nor of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
