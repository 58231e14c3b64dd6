"""The forms in which a task can be taken away: which files each is, how they are loaded, and what they then compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from polyvit_fast import strict_json
from polyvit_fast.model import pretrained
from polyvit_fast.model.export import hugging_face, programs, timm
from polyvit_fast.model.export.graph import describe_layout, lay_out
from polyvit_fast.model.export.plain import Converted, PlainViT, make_contiguous
from polyvit_fast.model.pretrained import polyvit
from polyvit_fast.model.pretrained.weights import Pretrained

WEIGHTS, CONFIG = "model.safetensors", "config.json"
GRAPHS = {"torch.export": "model.pt2", "onnx": "model.onnx"}


@dataclass(frozen=True)
class Subject:
    """What is exported."""

    task: str
    weights: Pretrained
    """Of the task alone."""
    vit: PlainViT
    """The same as a plain model."""
    origin: dict[str, Any]
    """What files have to say of the task and of the run: class names, preprocessing, versions."""


@dataclass(frozen=True)
class ExportTarget:
    """One of the forms."""

    library: str
    """That loads it: the name of its package, and of its module."""
    write: Callable[[Subject, Path], list[str]]
    """Write the files into a folder. Returns what is not as it was, in sentences; raises ValueError that says why it cannot be."""
    usage: Callable[[Subject, Path, str], str]
    """The lines of Python that load the first folder when it is called as the text says."""
    compute: Callable[[Subject, Path, Tensor], Tensor]
    """The logits of the files in a folder, by that library, for grids. Raises ImportError without it."""
    dtype: torch.dtype = torch.float64
    """In which `compute` computes."""


def _write_converted(converted: Converted, folder: Path) -> list[str]:
    save_file(converted.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, content in converted.configs.items():
        (folder / name).write_text(strict_json.dumps(content, indent=2) + "\n")
    return converted.remarks


def _normalise(vit: PlainViT, grids: Tensor) -> Tensor:
    """Grids as other libraries' models take them: normalised in fp64 by the numbers in fp32, one channel where all are copies of it."""
    mean, std = (torch.tensor(values) for values in vit.grid.normalisation)
    normalised = (grids.double() - mean) / std
    return normalised[..., :1] if vit.preprocessing.is_mono else normalised


def _write_timm(subject: Subject, folder: Path) -> list[str]:
    return _write_converted(timm.convert(subject.vit), folder)


def _use_timm(subject: Subject, folder: Path, name: str) -> str:
    lines = ["import timm", "", f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()']
    if subject.vit.preprocessing.timm:
        lines.append("transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))")
    return "\n".join(lines)


def _compute_timm(subject: Subject, folder: Path, grids: Tensor) -> Tensor:
    import timm  # pyright: ignore[reportMissingImports]

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().double()
    return model(_normalise(subject.vit, grids)[:, 0].permute(0, 3, 1, 2))


def _write_hugging_face(subject: Subject, folder: Path) -> list[str]:
    return _write_converted(hugging_face.convert(subject.vit), folder)


def _read_class(folder: Path) -> str:
    return json.loads((folder / CONFIG).read_text())["architectures"][0]


def _use_hugging_face(subject: Subject, folder: Path, name: str) -> str:
    kind, processor = _read_class(folder), subject.vit.preprocessing.hugging_face
    if not processor:
        return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}")'
    loader, thing, flags = "AutoImageProcessor", "picture" if subject.vit.grid.sizes[0] == 1 else "frames", ""
    inputs = '**processor({0}, return_tensors="pt"{1})'
    if "feature_extractor_type" in processor:
        loader, thing, flags = "AutoFeatureExtractor", "wave", f", sampling_rate={processor['sampling_rate']}"
        if kind != hugging_face.AST.classifier:
            inputs = 'processor({0}, return_tensors="pt"{1})["input_values"][:, None]'
    return (
        f"from transformers import {loader}, {kind}\n\n"
        f'processor, model = {loader}.from_pretrained("{name}"), {kind}.from_pretrained("{name}")\n'
        f"logits = model({inputs.format(thing, flags)}).logits"
    )


def _compute_hugging_face(subject: Subject, folder: Path, grids: Tensor) -> Tensor:
    import transformers

    kind = _read_class(folder)
    with _without_progress():
        model = getattr(transformers, kind).from_pretrained(folder).eval().double()
    inputs = _normalise(subject.vit, grids)
    if kind == hugging_face.AST.classifier:
        return model(inputs[:, 0, :, :, 0]).logits
    one_frame = subject.vit.grid.sizes[0] == 1 and kind != hugging_face.VIDEO_MAE.classifier
    return model(inputs[:, 0].permute(0, 3, 1, 2) if one_frame else inputs.permute(0, 1, 4, 2, 3)).logits


@contextmanager
def _without_progress() -> Iterator[None]:
    """Inside, transformers draws no bars."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _write_safetensors(subject: Subject, folder: Path) -> list[str]:
    header = {polyvit.KEY: strict_json.dumps(polyvit.describe(subject.weights) | subject.origin), "format": "pt"}
    save_file(make_contiguous(subject.weights.state_dict()), folder / WEIGHTS, metadata=header)
    return []


def _use_safetensors(subject: Subject, folder: Path, name: str) -> str:
    return (
        f'import polyvit_fast as pf\n\nmodel = pf.pretrained.load("{name}")\n'
        f'logits = model(grids, "{subject.task}")  # or start a run from it: --init {name}'
    )


def _compute_safetensors(subject: Subject, folder: Path, grids: Tensor) -> Tensor:
    return pretrained.load(str(folder)).double()(grids, subject.task)


def _write_torch_export(subject: Subject, folder: Path) -> list[str]:
    programs.write_torch_export(subject.vit, folder / GRAPHS["torch.export"], strict_json.dumps(subject.origin))
    return subject.vit.describe_merging()


def _use_torch_export(subject: Subject, folder: Path, name: str) -> str:
    vit = subject.vit
    return (
        f'import torch\n\nmodel = torch.export.load("{name}/{GRAPHS["torch.export"]}").module()\n'
        f"logits = model({vit.preprocessing.input_name})  # {vit.preprocessing.dtype} {describe_layout(vit)}"
    )


def _compute_torch_export(subject: Subject, folder: Path, grids: Tensor) -> Tensor:
    return torch.export.load(folder / GRAPHS["torch.export"]).module()(lay_out(subject.vit, grids))


def _write_onnx(subject: Subject, folder: Path) -> list[str]:
    texts = {key: value if isinstance(value, str) else strict_json.dumps(value) for key, value in subject.origin.items()}
    programs.write_onnx(subject.vit, folder / GRAPHS["onnx"], texts)
    return subject.vit.describe_merging()


def _use_onnx(subject: Subject, folder: Path, name: str) -> str:
    vit = subject.vit
    return (
        f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}/{GRAPHS["onnx"]}")\n'
        f'[logits] = session.run(None, {{"{vit.preprocessing.input_name}": array}})'
        f"  # {vit.preprocessing.dtype} {describe_layout(vit)}"
    )


def _compute_onnx(subject: Subject, folder: Path, grids: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / GRAPHS["onnx"]), providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {subject.vit.preprocessing.input_name: lay_out(subject.vit, grids).contiguous().numpy()})
    return torch.from_numpy(logits)


TARGETS = {
    "timm": ExportTarget("timm", _write_timm, _use_timm, _compute_timm),
    "hf": ExportTarget("transformers", _write_hugging_face, _use_hugging_face, _compute_hugging_face),
    "safetensors": ExportTarget("polyvit_fast", _write_safetensors, _use_safetensors, _compute_safetensors),
    "torch.export": ExportTarget("torch", _write_torch_export, _use_torch_export, _compute_torch_export, torch.float32),
    "onnx": ExportTarget("onnxruntime", _write_onnx, _use_onnx, _compute_onnx, torch.float32),
}
"""By the name that the command line gives them."""
