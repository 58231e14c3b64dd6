"""Fast kernels in a Vision Transformer that somebody else wrote: `fuse` changes the one object it is given, `unfuse` changes it back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyvit_fast.model.foreign import row_of
from polyvit_fast.model.modules import is_plain
from polyvit_fast.model.parts import Attention, Block, Mlp, Norm, Part, Row, full_name, fused_row
from polyvit_fast.model.verify import Batch, Check, compare, table
from polyvit_kernels import ops
from polyvit_kernels.ops.dtypes import matmul_dtype


@dataclass(frozen=True)
class Entry:
    """A module of the model: where it is and its class; why it was left, or when its own `forward` still runs."""

    path: str
    what: str
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `fuse` did to a model. As text it is a table in which modules whose paths differ in numbers alone share a line."""

    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]
    checks: tuple[Check, ...] = ()
    """How far the fused and the original model are from the truth; empty without `verify`."""

    def __str__(self) -> str:
        return "\n".join([*_lines("replaced", self.replaced), *_lines("left", self.left)])


def fuse(model: nn.Module, verify: Batch | None = None) -> Report:
    """Let the blocks, attention, MLPs and norms of `model` run on the kernels; tells which do, and why the others do not.

    Only the `forward` of single objects changes: no class, no other model, no parameter, hook or name in the state dict. Parameters are
    read at each call; layers that have been replaced, hooked or parametrised are called. Where a call asks for more than a module's plain
    value (masks, attention weights, dropout or drop path in training, export, tracing), the module's own `forward` runs.
    Call it before `torch.compile` and before the model is sharded or wrapped. `torch.nn.DataParallel`, `torch.jit.script`, second
    derivatives and `torch.func`'s transforms need `unfuse` first.

    With a batch as `verify` (a tensor, a tuple of arguments or a dict of keyword arguments for the model) all replaced modules and the
    model are run forward and backward both ways, under the autocast that is on, and the comparison is printed. RuntimeError, and the
    model is restored, when the fused one is further from the truth than rounding explains. Gradients, buffers, modes and the random
    state stay as they are; no other thread may use the model meanwhile.
    """
    _refuse_compiled(model)
    unfuse(model)
    replaced, left = _replace(model)
    if verify is None:
        return Report(replaced, left)
    try:
        checks = compare(model, [entry.path for entry in replaced], verify)
    except BaseException:
        unfuse(model)
        raise
    print(table(checks))
    return Report(replaced, left, checks)


def unfuse(model: nn.Module) -> None:
    """Give every module of `model` its own `forward` back. ValueError when something else has wrapped a fused one."""
    for path, module in model.named_modules():
        if fused_row(module):
            del module.__dict__["forward"]
        elif any(isinstance(value, partial) and value.func is _forward for value in module.__dict__.values()):
            raise ValueError(f"the forward of {path} was wrapped after fuse: remove the wrapper, then unfuse")


def _refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if full_name(module) == "torch._dynamo.eval_frame.OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(f"{path or 'the model'} has been compiled: call fuse before torch.compile")


def _replace(model: nn.Module) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """The modules that now run on the kernels, and those that do not."""
    replaced, left = [], []
    rotary = any(getattr(module, "rope", None) is not None for module in model.modules())
    for path, module in reversed(list(model.named_modules())):  # a block's parts before the block
        row, what = row_of(module), type(module).__name__
        reason = _reason_to_leave(module, row, rotary)
        if row is not None and not reason:
            module.__dict__["forward"] = partial(_forward, module, row)
            replaced.append(Entry(path, what, _exceptions(module, row)))
        elif reason:
            left.append(Entry(path, what, reason))
    return tuple(reversed(replaced)), tuple(reversed(left))


_EXPECTED = re.compile(r"attention|mlp|ffn|feedforward|glu$|norm|block|layer$", re.IGNORECASE)


def _reason_to_leave(module: nn.Module, row: Row | None, rotary: bool) -> str:
    """Empty for what is fit, and for classes that nobody would look for in the report."""
    name = full_name(module)
    if row is None:
        if name.startswith("polyvit_fast."):
            return "it runs on the kernels without fuse"
        return f"fuse does not know {name}" if _EXPECTED.search(type(module).__name__) and not name.startswith("torch.nn.") else ""
    if "forward" in module.__dict__:
        return "something else has replaced its forward"
    return "it is given rotary positions" if rotary and row.rotary else row.unknown(module) or row.unfit(module)


def _exceptions(module: nn.Module, row: Row) -> str:
    rates = sorted({drop.rate for drop in row.read(module).drops if drop.rate})
    training = f"in training, where it drops with {', '.join(f'{rate:g}' for rate in rates)}" if rates else ""
    when = [time for time in (training, row.note(module)) if time]
    return f"its own forward runs {' and '.join(when)}" if when else ""


def _lines(title: str, entries: tuple[Entry, ...]) -> list[str]:
    counts: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        line = (re.sub(r"\d+", "*", entry.path) or "(the model)", entry.what, entry.why)
        counts[line] = counts.get(line, 0) + 1
    paths, classes = (max((len(line[column]) for line in counts), default=0) for column in (0, 1))
    lines = [f"  {path:{paths}}  {count:3} × {what:{classes}}  {why}".rstrip() for (path, what, why), count in counts.items()]
    return [f"{title}: {len(entries)} modules", *lines]


def _forward(module: nn.Module, row: Row, *args: Any, **kwargs: Any) -> Any:
    """What stands in a fused module's `forward`."""
    x = row.sole_input(module, args, kwargs)
    if _is_computable(x) and not row.unfit(module):
        part: Any = row.read(module)
        if _has_own_dtype(part, x) and not any(drop.rate and drop.training for drop in part.drops):
            return _FUSED[row.kind](part, x)
    return type(module).forward(module, *args, **kwargs)


def _is_computable(x: Any) -> bool:
    """Whether `x` is a plain tensor on a device of ours, and nobody writes torch's operators down for another runtime."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and x.is_floating_point()
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] - documented, and missing in torch's list of exports
    )


def _has_own_dtype(part: Part, x: Tensor) -> bool:
    """Whether it takes no rule for mixed dtypes to tell what torch's norm would give, and `x` has a batch and tokens to attend to."""
    if isinstance(part, Norm):
        return x.dtype is part.weight.dtype and (x.dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type))
    return (isinstance(part, Mlp) or x.ndim == 3) and (not isinstance(part, Block) or _has_own_dtype(part.norm1, x))


def _normalise(norm: Norm, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, out_dtype)


def _mix(attention: Attention, x: Tensor) -> Tensor:
    return ops.attention(attention.pack(x).unflatten(-1, (3, attention.num_heads, -1))).flatten(2)


def _attend(attention: Attention, x: Tensor) -> Tensor | tuple[Tensor, None]:
    y = attention.proj(_mix(attention, x))
    return (y, None) if attention.gives_pair else y


def _pass_mlp(mlp: Mlp, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return ops.mlp(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, mlp.gelu, residual)


def _pass_block(block: Block, x: Tensor) -> Tensor:
    dtype = matmul_dtype(x)
    proj: Any = block.attention.proj
    mixed = _mix(block.attention, _normalise(block.norm1, x, dtype))
    x = ops.linear_add(mixed, proj.weight, proj.bias, x) if is_plain(proj) else x + proj(mixed)
    return _pass_mlp(block.mlp, _normalise(block.norm2, x, dtype), x)


_FUSED: dict[type[Part], Callable[[Any, Tensor], Any]] = {Norm: _normalise, Attention: _attend, Mlp: _pass_mlp, Block: _pass_block}
