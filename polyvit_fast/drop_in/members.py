"""What adapters ask about a foreign module: its members, dropouts, LayerScale and GELU, and the one tensor that it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from polyvit_fast.drop_in.parts import Drop
from polyvit_kernels.layers import PLAIN, is_plain, is_untouched
from polyvit_kernels.ops import Gelu


def full_name(thing: object) -> str:
    """Module and name of the class of `thing`."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def first_argument(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call; None when another one asks for anything."""
    if len(args) == 1 and not kwargs:
        return args[0]
    rest = [*args[1:], *kwargs.values()]
    return args[0] if args and all(value is None or value is False for value in rest) else None


def hugging_face_input(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument, also by its name, and when hidden states are asked for.

    Hooks on the blocks collect these, whoever computes the blocks.
    """
    named = [kwargs["hidden_states"]] if "hidden_states" in kwargs else []
    others = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "output_hidden_states")}
    return first_argument(m, (*named, *args), others)


def hugging_face_block_input(m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same of a block; None where its activations are to be recomputed, which is part of the class's own `forward`."""
    return None if m.gradient_checkpointing and m.training else hugging_face_input(m, args, kwargs)


def unknown_members(module: Any, required: str, optional: str = "") -> str:
    """Why the module may compute something else than we know: its class in another version may have a member that changes the value."""
    # Private attributes: named_children() and its like name a member once only that is there under two names.
    present = {name for members in (module._modules, module._parameters, module._buffers) for name in members if members[name] is not None}
    missing, extra = set(required.split()) - present, present - set(required.split()) - set(optional.split())
    if missing:
        return f"another version of the class: it lacks {', '.join(sorted(missing))}"
    return f"another version of the class: it has {', '.join(sorted(extra))}" if extra else ""


def not_identity(module: Any, meaning: str, *names: str) -> str:
    """Says the `meaning` of those members that are there and compute something."""
    for name in names:
        member = getattr(module, name, None)
        if member is not None and not (type(member) is nn.Identity and is_untouched(member)):
            return f"{meaning} ({name} is a {type(member).__name__})"
    return ""


def not_plain(linear: Any, name: str) -> str:
    """Why an operation may not read the layer's parameters instead of calling it."""
    return "" if is_plain(linear) else f"{name} ({type(linear).__name__}) is more than a linear layer with a bias, or less"


DROP_PATH = "timm.layers.drop.DropPath"

_RATES: dict[str, Callable[[Any], float]] = {
    "torch.nn.modules.linear.Identity": lambda _: 0.0,
    "torch.nn.modules.dropout.Dropout": lambda m: m.p,
    DROP_PATH: lambda m: m.drop_prob or 0.0,
    "transformers.models.dinov2.modeling_dinov2.Dinov2DropPath": lambda m: m.drop_prob,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersDropPath": lambda m: m.drop_prob,
}


def unfit_drops(module: Any, *names: str) -> str:
    """Why those members are no dropouts that we know."""
    for name in names:
        member = getattr(module, name)
        if full_name(member) not in _RATES or not is_untouched(member):
            return f"{name} ({type(member).__name__}) is no plain dropout"
    return ""


def read_drops(module: Any, *names: str) -> tuple[Drop, ...]:
    """Those members, which are dropouts."""
    members = [getattr(module, name) for name in names]
    return tuple(Drop(_RATES[full_name(member)](member), member.training) for member in members)


_LAYER_SCALES = {
    "timm.layers.layer_scale.LayerScale": "gamma",
    "timm.models.vision_transformer.LayerScale": "gamma",  # where older versions have it
    "transformers.models.dinov2.modeling_dinov2.Dinov2LayerScale": "lambda1",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayerScale": "lambda1",
}
"""Modules that multiply each feature of a branch by a parameter, and what they call it."""


def unfit_scales(module: Any, *names: str) -> str:
    """Why those members, if they are there, are no LayerScale that we know."""
    for name in names:
        if not_identity(module, "scaled", name) and type(read_scale(module, name)) not in PLAIN:
            return f"{name} ({type(getattr(module, name)).__name__}) is no plain LayerScale"
    return ""


def read_scale(module: Any, name: str) -> Tensor | None:
    """What the member multiplies each feature by, which may be the member itself; None where it is not there, or does nothing."""
    member = getattr(module, name, None)
    if isinstance(member, nn.Module):
        return getattr(member, _LAYER_SCALES[full_name(member)]) if full_name(member) in _LAYER_SCALES and is_untouched(member) else None
    return member


_GELUS: dict[str, Callable[[Any], Gelu]] = {
    "torch.nn.modules.activation.GELU": lambda m: "tanh" if m.approximate == "tanh" else "erf",
    "timm.layers.activations.GELU": lambda _: "erf",
    "timm.layers.activations.GELUTanh": lambda _: "tanh",
    "transformers.activations.GELUActivation": lambda _: "erf",
    "transformers.activations.GELUTanh": lambda _: "tanh",
    "transformers.activations.NewGELUActivation": lambda _: "tanh",
    "transformers.activations.FastGELUActivation": lambda _: "tanh",  # sqrt(2 / pi) to ten digits
    "transformers.activations.AccurateGELUActivation": lambda _: "tanh",
    "timm.layers.activations.QuickGELU": lambda _: "quick",
    "transformers.activations.QuickGELUActivation": lambda _: "quick",
}


def unfit_gelu(activation: Any) -> str:
    """Why it is no GELU that we know."""
    if full_name(activation) not in _GELUS or not is_untouched(activation):
        return f"its activation {type(activation).__name__} is no GELU that fuse knows, or has hooks"
    return ""


def read_gelu(activation: Any) -> Gelu:
    """Its form."""
    return _GELUS[full_name(activation)](activation)
