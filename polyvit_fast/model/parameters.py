"""What the names of a model's parameters say: which are frozen, how deep they lie, which decay, which component they belong to."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from polyvit_fast.model.polyvit import PolyViT


def freeze(model: PolyViT, patterns: Sequence[str]) -> list[str]:
    """Let no parameter that one of the `patterns` matches have a gradient; gives their names.

    Raises ValueError for a pattern that matches none, and when a task would be left with nothing to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"optim.freeze: {pattern!r} matches no parameter; {_suggest(pattern, names)}")
    frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(names):
        raise ValueError(f"optim.freeze: {' '.join(patterns)} leaves nothing to train; leave out the heads, for example")
    for task in model.modality_of:
        if set(list_parameters(model, task)) <= set(frozen):
            raise ValueError(
                f"optim.freeze: {' '.join(patterns)} leaves task {task} nothing to train; leave out heads.{task}.*, or the task"
            )
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def _suggest(pattern: str, names: Sequence[str]) -> str:
    """Names and patterns that are near to one that matches nothing."""
    parts = [name.split(".") for name in names]
    prefixes = {f"{'.'.join(part[:end])}.*" for part in parts for end in range(1, len(part))}
    near = difflib.get_close_matches(pattern, [*sorted(prefixes, key=len), *names], 5)
    return f"near it are {', '.join(near)}" if near else f"there are {', '.join(sorted({f'{part[0]}.*' for part in parts}))}"


def decay_by_layer(model: PolyViT, decay: float) -> dict[str, float]:
    """The factor on each parameter's learning rate: `decay` to the power of the layers that lie above it (see `Optim.layer_decay`)."""
    return {name: decay ** (model.depth + 1 - _find_layer(model, name)) for name, _ in model.named_parameters()}


def _find_layer(model: PolyViT, name: str) -> int:
    """0 for a tokenizer, i + 1 for the i-th block that an input passes, adaptor or not, and the largest for the last norm and the heads."""
    match name.split("."):
        case ["tokenizers", _, "blocks", index, *_]:
            return int(index) + 1
        case ["tokenizers", *_]:
            return 0
        case ["blocks", index, *_]:
            return model.depth - len(model.blocks) + int(index) + 1
        case _:
            return model.depth + 1


def count_frozen_layers(model: PolyViT, task: str) -> int:
    """Layers that an input of `task` passes before the first that is trained: its tokenizer, the blocks, the last norm."""
    names = list_parameters(model, task)
    return min((_find_layer(model, name) + name.startswith("heads.") for name in names), default=model.depth + 2)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is subject to weight decay."""
    return parameter.ndim >= 2 and name.endswith("weight")


def find_component(name: str) -> str:
    """The component that a parameter belongs to: the tokenizer of a modality, the head of a task, or the trunk, which is ""."""
    kind, *others = name.split(".")
    return f"{kind}.{others[0]}" if kind in ("tokenizers", "heads") else ""


def list_components(model: PolyViT, task: str) -> tuple[str, str, str]:
    """The components of the model that a step of `task` computes with."""
    return "", f"tokenizers.{model.modality_of[task]}", f"heads.{task}"


def list_parameters(model: PolyViT, task: str) -> list[str]:
    """Names of the parameters that a step of `task` has gradients for: not those of other modalities and tasks, nor frozen ones."""
    components = list_components(model, task)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and find_component(name) in components]
