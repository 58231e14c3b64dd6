"""Our own form: the names of a `PolyViT`, in a safetensors file whose header says the rest. `export` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from polyvit_fast.config import Model
from polyvit_fast.model.pretrained.weights import HeadWeights, Pretrained, Tensors, TokenizerWeights, select, select_trunk

KEY = "polyvit_fast"
"""Under which the header has the description, as JSON."""
SETTINGS = tuple(field.name for field in fields(TokenizerWeights) if field.name != "tensors")


def describe(weights: Pretrained) -> dict[str, Any]:
    """What tensors cannot say: the model's record, each tokenizer's settings, each head's modality and class names."""
    return {
        "model": asdict(weights.model),
        "tokenizers": {name: {key: getattr(one, key) for key in SETTINGS} for name, one in weights.tokenizers.items()},
        "heads": {name: {"modality": head.modality, "class_names": head.class_names} for name, head in weights.heads.items()},
    }


def recognise(tensors: Tensors) -> bool:
    """Whether these are the names of a `PolyViT`."""
    return any(name.startswith("tokenizers.") for name in tensors)


def convert(tensors: Tensors, config: Mapping[str, Any], source: str) -> Pretrained:
    """The weights in our form. `config` has the file's header under "metadata"."""
    text = (config.get("metadata") or {}).get(KEY)
    if text is None:
        raise ValueError(
            f"{source}: it holds a PolyViT's tensors, but its header does not describe the model; of a run, name the folder (runs/mine), "
            "or take what `polyvit-fast export RUN --to safetensors` writes"
        )
    try:
        described = json.loads(text)
        model = Model(**described["model"])
        tokenizers = {
            name: TokenizerWeights.from_json(select(tensors, f"tokenizers.{name}."), {key: one[key] for key in SETTINGS})
            for name, one in described["tokenizers"].items()
        }
        heads = {name: _read_head(select(tensors, f"heads.{name}."), one) for name, one in described["heads"].items()}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source}: the description in its header is broken: {error!r}") from error
    trunk = select_trunk(tensors, model.num_adaptor_layers)
    return Pretrained(source=source, kind="PolyViT", model=model, tokenizers=tokenizers, trunk=trunk, heads=heads)


def _read_head(tensors: Tensors, described: Mapping[str, Any]) -> HeadWeights:
    names = described["class_names"]
    return HeadWeights(modality=described["modality"], tensors=tensors, class_names=None if names is None else tuple(names))
