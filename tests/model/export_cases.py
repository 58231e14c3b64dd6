"""Small models of all forms in canonical form, with weights so large that every part matters, and their grids."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from sources import as_source

from polyvit_fast.config import Model, Preprocessing
from polyvit_fast.model.export.plain import Converted, PlainViT, flatten
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.weights import Pretrained, TokenGrid

NAMES = ("cat", "dog", "newt")
SIZES = {"dim": 64, "depth": 3, "num_heads": 4, "mlp_dim": 130}


class MonoGrid(TokenGrid):
    """A grid whose channels are copies of one."""

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(input_name="spectrogram", is_mono=True)


def grid(sizes=(1, 32, 48, 3), tubelet=(1, 16, 16), strides=None, kind=TokenGrid, **tokens) -> TokenGrid:
    channels = sizes[3]
    numbers = {"mean": (100.0, 110.0, 90.0)[:channels], "std": (50.0, 60.0, 70.0)[:channels]}
    if kind is MonoGrid:
        numbers = {"mean": (-4.0,) * channels, "std": (9.0,) * channels}
    return kind(kind="m", sizes=sizes, tubelet_sizes=tubelet, strides=strides or tubelet, **numbers, **tokens)


CLIP = {"sizes": (8, 32, 48, 3)}
SOUND = {"sizes": (1, 64, 48, 1), "strides": (1, 10, 10), "num_class_tokens": 2, "pool": "class_tokens", "kind": MonoGrid}
TWO = {"num_class_tokens": 2}
CASES: dict[str, tuple[TokenGrid, Model]] = {
    "picture": (grid(), Model(**SIZES)),
    "picture, eps 1e-12": (grid(), Model(**SIZES, norm_eps=1e-12)),
    "picture, erf, adaptors": (grid(tubelet=(1, 16, 8)), Model(**SIZES, gelu="erf", num_adaptor_layers=2)),
    "picture, all adaptors": (grid(), Model(**SIZES, num_adaptor_layers=3)),
    "two tokens": (grid(**TWO), Model(**SIZES)),
    "mean of two tokens": (grid(**TWO, pool="class_tokens"), Model(**SIZES)),
    "mean": (grid(pool="mean"), Model(**SIZES)),
    "mean, no token": (grid(num_class_tokens=0, pool="mean"), Model(**SIZES, gelu="erf")),
    "fixed positions": (grid(positions="sinusoidal"), Model(**SIZES)),
    "clip, 4 frames": (grid(**CLIP, tubelet=(4, 16, 16)), Model(**SIZES, norm_eps=1e-12, num_adaptor_layers=1)),
    "clip, 2 frames": (grid(**CLIP, tubelet=(2, 16, 16)), Model(**SIZES, gelu="erf")),
    "masked clip": (
        grid(**CLIP, tubelet=(2, 16, 16), num_class_tokens=0, pool="mean", positions="sinusoidal"),
        Model(**SIZES, norm_eps=1e-12, last_norm_eps=1e-5),
    ),
    "sound": (grid(**SOUND), Model(**SIZES, norm_eps=1e-12, gelu="erf")),
    "sound, 3 channels": (grid(**SOUND | {"sizes": (1, 64, 48, 3)}), Model(**SIZES)),
    "plain sound": (grid((1, 64, 48, 3), kind=MonoGrid), Model(**SIZES)),
}
HEAD_NORMS = ("sound", "sound, 3 channels")


def build(name: str, dtype=torch.float64) -> tuple[PolyViT, Pretrained, PlainViT]:
    """A model, its weights as they are read, and as a plain ViT. The weights are numbers of fp32 in either dtype."""
    record, model = CASES[name]
    polyvit = PolyViT(model, {"m": record}, {"classes": ("m", len(NAMES))}, norm_heads=["classes"] if name in HEAD_NORMS else [])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in polyvit.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(1)
    polyvit = polyvit.to(dtype).eval()
    source = as_source(polyvit, model, {"m": record}, {"classes": NAMES})
    tokenizer = replace(source.tokenizers["m"], mean=record.mean, std=record.std, token_stride=record.strides)
    source = replace(source, tokenizers={"m": tokenizer})
    return polyvit, source, flatten(source, record)


def draw_levels(vit: PlainViT, count=2, seed=0, dtype=torch.float64) -> torch.Tensor:
    """Grids in the units of a decoder."""
    frames, rows, columns, channels = vit.grid.sizes
    drawn = torch.randn(count, frames, rows, columns, 1, generator=torch.Generator().manual_seed(seed))
    if not vit.preprocessing.is_mono:
        drawn = torch.randn(count, frames, rows, columns, channels, generator=torch.Generator().manual_seed(seed))
    mean, std = map(torch.tensor, vit.grid.normalisation)
    return (drawn * std + mean).to(dtype)


def normalise(vit: PlainViT, levels: torch.Tensor) -> torch.Tensor:
    mean, std = map(torch.tensor, vit.grid.normalisation)
    normalised = (levels - mean) / std
    return normalised[..., :1] if vit.preprocessing.is_mono else normalised


def without_head(name: str) -> tuple[PolyViT, PlainViT]:
    polyvit, source, _ = build(name)
    return polyvit, flatten(replace(source, heads={}), CASES[name][0])


def save(converted: Converted, folder: Path) -> dict[str, torch.Tensor]:
    """Write what was converted, and give the tensors as they are in the file."""
    save_file(converted.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file, content in converted.configs.items():
        (folder / file).write_text(json.dumps(content))
    return converted.tensors


def assert_same(back: PlainViT, vit: PlainViT, apart: tuple[str, ...] = ()) -> None:
    """To the bit, but for the tensors that are named."""
    assert vit.head
    assert back.head
    assert back.tensors.keys() == vit.tensors.keys()
    assert [name for name in vit.tensors if name not in apart and not torch.equal(back.tensors[name], vit.tensors[name])] == []
    assert back.head.tensors.keys() == vit.head.tensors.keys()
    assert all(torch.equal(back.head.tensors[key], tensor) for key, tensor in vit.head.tensors.items())
    assert (back.model, back.class_names, back.grid.pool) == (vit.model, vit.class_names, vit.grid.pool)
