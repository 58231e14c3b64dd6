"""Fast kernels in a Vision Transformer that somebody else wrote: `fuse` changes the one object it is given, `unfuse` changes it back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyvit_fast.drop_in.adapters import row_of
from polyvit_fast.drop_in.parts import MARK, Attention, Block, Mlp, Norm, Part, Row, full_name, fused_row
from polyvit_fast.drop_in.verify import Batch, Check, compare, table
from polyvit_fast.model.modules import add_branch, is_plain
from polyvit_kernels import ops
from polyvit_kernels.ops.attention import check_backend
from polyvit_kernels.ops.dtypes import matmul_dtype
from polyvit_kernels.ops.gradients import find_factors, keep_factors


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
        if not self.replaced and all(entry.why.startswith(_UNKNOWN) for entry in self.left):
            return "\n".join([_NOTHING_KNOWN, *(_lines("left", self.left) if self.left else [])])
        return "\n".join([*_lines("replaced", self.replaced), *_lines("left", self.left)])


def fuse(model: nn.Module, verify: Batch | Mapping[str, Any] | None = None, *, attention: ops.AttentionBackend = "auto") -> Report:
    """Let the blocks, attention, MLPs and norms of `model` run on the kernels; tells which do, and why the others do not.

    Only the `forward` of single objects changes: no class, no other model, no parameter, hook or name in the state dict. Parameters are
    read at each call; layers that have been replaced, hooked or parametrised are called. Where a call asks for more than a module's plain
    value (masks, attention weights, dropout in training, export, tracing), the module's own `forward` runs.
    `attention` says what computes attention on a GPU: see `polyvit_kernels.attention`.
    Call it before `torch.compile` and before the model is sharded or wrapped. `torch.jit.script`, second derivatives and `torch.func`'s
    transforms need `unfuse` first, and so does `torch.nn.DataParallel`, whose replicas would run the first device's modules.

    With a batch as `verify` (a tensor, a tuple of arguments or a dict of keyword arguments for the model) all replaced modules and the
    model are run forward and backward both ways, in evaluation mode and under the autocast that is on, and the comparison is printed. It
    takes memory for a copy of the model in fp64, which is the truth. RuntimeError, and the model is restored, when the fused one is
    further from the truth than rounding explains; ValueError when the original's own values are not finite. Gradients, buffers, modes
    and the random state stay as they are; no other thread may use the model meanwhile.
    """
    _refuse_other_types(model, "fuse")
    check_backend(attention, "cuda")  # the model may move there later
    batch = None if verify is None else _as_batch(verify)
    _refuse_wrapped(model)
    unfuse(model)
    replaced, left = _replace(model, attention)
    if batch is None:
        return Report(replaced, left)
    if not replaced:
        print("verify compares nothing, as nothing has been replaced")
        return Report(replaced, left)
    try:
        with _counted(model) as ran:
            checks = compare(model, [entry.path for entry in replaced], batch)
    except BaseException:
        unfuse(model)
        raise
    idle = [entry for entry in replaced if not any(entry.path == path or _is_within(entry.path, path) for path in ran)]
    print("\n".join([table(checks), *(_lines(_NOT_RUN, tuple(idle)) if idle else [])]))
    noted = (replace(entry, why="; ".join(filter(None, (entry.why, _NOT_RUN)))) if entry in idle else entry for entry in replaced)
    return Report(tuple(noted), left, checks)


def unfuse(model: nn.Module) -> None:
    """Give every module of `model` its own `forward` back. ValueError when something else has wrapped a fused one."""
    _refuse_other_types(model, "unfuse")
    marked = [(path, module) for path, module in model.named_modules() if MARK in module.__dict__]
    for path, module in marked:
        if "forward" in module.__dict__ and not fused_row(module):
            raise ValueError(f"the forward of {path or 'the model'} was wrapped after fuse: remove the wrapper, then unfuse")
    for _, module in marked:
        module.__dict__.pop("forward", None)
        del module.__dict__[MARK]


def _refuse_other_types(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} needs a model (torch.nn.Module), not {type(model).__name__}")


def _as_batch(verify: Any) -> Batch:
    if isinstance(verify, Mapping):  # such as what the processors of transformers give
        return dict(verify)
    if isinstance(verify, Tensor | tuple):
        return verify
    needed = "a tensor, a tuple of arguments or a dict of keyword arguments for the model"
    raise TypeError(f"verify must be {needed}, not {type(verify).__name__}")


def _refuse_wrapped(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"{path or 'the model'} is a torch.nn.DataParallel, whose replicas would run the first device's modules: "
                "fuse its .module, and wrap that in DistributedDataParallel instead"
            )
        if full_name(module) == "torch._dynamo.eval_frame.OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(f"{path or 'the model'} has been compiled: call fuse before torch.compile")


def _replace(model: nn.Module, attention: ops.AttentionBackend) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """The modules that now run on the kernels, and those that do not."""
    fused: list[tuple[Entry, float, str]] = []
    left: list[Entry] = []
    rotary = any(getattr(module, "rope", None) is not None for module in model.modules())
    for path, module in reversed(list(model.named_modules())):  # a block's parts before the block
        row, what = row_of(module), type(module).__name__
        reason = _reason_to_leave(module, row, rotary)
        if row is not None and not reason:
            chosen = row if attention == "auto" else replace(row, read=partial(_read, row.read, attention))
            module.__dict__["forward"] = partial(_forward, module, chosen)
            module.__dict__[MARK] = True
            rate = max((drop.rate for drop in row.read(module).drops), default=0.0)
            fused.append((Entry(path, what), rate, row.note(module)))
        elif reason:
            left.append(Entry(path, what, reason))
    highest: dict[tuple[str, str], float] = {}
    for entry, rate, _ in fused:
        highest[_kind(entry)] = max(rate, highest.get(_kind(entry), 0.0))
    replaced = [replace(entry, why=_exceptions(highest[_kind(entry)] if rate else 0.0, note)) for entry, rate, note in fused]
    return tuple(reversed(replaced)), tuple(reversed(left))


def _read(read: Callable[[Any], Part], attention: ops.AttentionBackend, module: Any) -> Part:
    """A part that attends by the given backend."""
    part = read(module)
    if isinstance(part, Block):
        return part._replace(attention=part.attention._replace(backend=attention))
    return part._replace(backend=attention) if isinstance(part, Attention) else part


@contextmanager
def _counted(model: nn.Module) -> Iterator[set[str]]:
    """The paths of the modules of `model` that have run on the kernels since."""
    ran: set[str] = set()
    fused = {path: (module, module.__dict__["forward"]) for path, module in model.named_modules() if fused_row(module)}

    def counted(path: str) -> Callable[..., Any]:
        def forward(module: nn.Module, row: Row, *args: Any, **kwargs: Any) -> Any:
            if _fit(module, row, args, kwargs):
                ran.add(path)
            return _forward(module, row, *args, **kwargs)

        return forward

    try:
        for path, (module, forward) in fused.items():
            module.__dict__["forward"] = partial(counted(path), *forward.args)
        yield ran
    finally:
        for module, forward in fused.values():
            module.__dict__["forward"] = forward


def _is_within(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.") if outer else bool(path)


_UNKNOWN = "fuse does not know"
_NOT_RUN = "not run by this batch"
_NOTHING_KNOWN = "nothing here that fuse knows: it replaces layer norms, attention, MLPs and blocks of Vision Transformers"


_EXPECTED = re.compile(r"attention|mlp|ffn|feedforward|glu$|norm|block|layer$", re.IGNORECASE)


def _reason_to_leave(module: nn.Module, row: Row | None, rotary: bool) -> str:
    """Empty for what is fit, and for classes that nobody would look for in the report."""
    name = full_name(module)
    if row is None:
        if name.startswith("polyvit_fast."):
            return "it runs on the kernels without fuse"
        return f"{_UNKNOWN} {name}" if _EXPECTED.search(type(module).__name__) and not name.startswith("torch.nn.") else ""
    if "forward" in module.__dict__:
        return "something else has replaced its forward"
    return "it is given rotary positions" if rotary and row.rotary else row.unknown(module) or row.unfit(module)


def _exceptions(rate: float, note: str) -> str:
    training = f"in training, where it drops with up to {rate:g}" if rate else ""
    when = [time for time in (training, note) if time]
    return f"its own forward runs {', and '.join(when)}" if when else ""


def _kind(entry: Entry) -> tuple[str, str]:
    """What the modules that share a line of the report have in common."""
    return re.sub(r"\d+", "*", entry.path) or "(the model)", entry.what


def _lines(title: str, entries: tuple[Entry, ...]) -> list[str]:
    counts: dict[tuple[str, str, str], int] = {}
    for entry in entries:
        line = (*_kind(entry), entry.why)
        counts[line] = counts.get(line, 0) + 1
    paths, classes = (max((len(line[column]) for line in counts), default=0) for column in (0, 1))
    lines = [f"  {path:{paths}}  {count:3} × {what:{classes}}  {why}".rstrip() for (path, what, why), count in counts.items()]
    return [f"{title}: {len(entries)} modules", *lines]


def _forward(module: nn.Module, row: Row, *args: Any, **kwargs: Any) -> Any:
    """What stands in a fused module's `forward`."""
    fit = _fit(module, row, args, kwargs)
    return _FUSED[row.kind](*fit) if fit else type(module).forward(module, *args, **kwargs)


def _fit(module: nn.Module, row: Row, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor] | None:
    """What to compute and of what; None when the module's own `forward` has to run."""
    x = row.sole_input(module, args, kwargs)
    if _is_computable(x) and not row.unfit(module):
        part: Any = row.read(module)
        if _has_own_dtype(part, x) and not any(drop.rate and drop.training for drop in part.drops):
            return part, x
    return None


def _is_computable(x: Any) -> bool:
    """Whether `x` is a plain tensor on a device of ours, and nobody writes torch's operators down for another runtime."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and x.is_floating_point()
        and not getattr(torch.compiler, "_is_exporting_flag", False)  # is_exporting() is true in all that torch 2.11 compiles
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] - documented, and missing in torch's list of exports
    )


def _has_own_dtype(part: Part, x: Tensor) -> bool:
    """Whether it takes no rule for mixed dtypes to tell what torch's norm would give, and `x` has a batch and tokens to attend to."""
    if isinstance(part, Norm):
        return x.dtype is part.weight.dtype and (x.dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type))
    return (isinstance(part, Mlp) or x.ndim == 3) and (not isinstance(part, Block) or _has_own_dtype(part.norm1, x))


def _normalise(norm: Norm, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, out_dtype)


def _normalise_beside(norm: Norm, x: Tensor, out_dtype: torch.dtype, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    return ops.layer_norm_residual(x, norm.weight, norm.bias, norm.eps, out_dtype, factors)


def _mix(attention: Attention, x: Tensor) -> Tensor:
    return ops.attention(attention.pack(x, (3, attention.num_heads, -1)), attention.backend).flatten(2)


def _attend(attention: Attention, x: Tensor) -> Tensor | tuple[Tensor, None]:
    y = attention.proj(_mix(attention, x))
    return (y, None) if attention.gives_pair else y


def _pass_mlp(mlp: Mlp, x: Tensor, residual: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    return ops.mlp(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, mlp.gelu, residual, factors)


def _pass_block(block: Block, x: Tensor) -> Tensor:
    dtype = matmul_dtype(x)
    proj: Any = block.attention.proj
    first, second = (_draw_factors(path, x, dtype) for path in block.drop_paths)
    x, normal = _normalise_beside(block.norm1, x, dtype, find_factors(x))
    mixed = _mix(block.attention, normal)
    x = ops.linear_add(mixed, proj.weight, proj.bias, x, first) if is_plain(proj) else add_branch(x, proj(mixed), first)
    x, normal = _normalise_beside(block.norm2, x, dtype, first)
    return keep_factors(_pass_mlp(block.mlp, normal, x, second), second)


def _draw_factors(drop_path: nn.Module | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What drop path multiplies the examples of a branch in `dtype` by, drawn and rounded by itself."""
    if drop_path is None:
        return None
    ones = torch.ones(len(x), 1, 1, dtype=dtype, device=x.device)
    return drop_path(ones).flatten().to(torch.promote_types(x.dtype, torch.float32))


_FUSED: dict[type[Part], Callable[[Any, Tensor], Any]] = {Norm: _normalise, Attention: _attend, Mlp: _pass_mlp, Block: _pass_block}
