"""Fast kernels in a Vision Transformer that somebody else wrote: `fuse` changes the one object it is given, `unfuse` changes it back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyvit_fast.drop_in.adapters import adapter_of
from polyvit_fast.drop_in.fuse_report import UNKNOWN, FuseReport, ModuleEntry, lines
from polyvit_fast.drop_in.fused import MARK, fused_adapter
from polyvit_fast.drop_in.gains import gains, measured
from polyvit_fast.drop_in.members import full_name
from polyvit_fast.drop_in.parts import Adapter, AttentionPart, BlockPart, Part, accepts, compute
from polyvit_fast.drop_in.verify import VerifyBatch, compare, table
from polyvit_kernels import ops
from polyvit_kernels.ops.attention import check_backend


def fuse(
    model: nn.Module, verify: VerifyBatch | Mapping[str, Any] | None = None, *, attention: ops.AttentionBackend = "auto"
) -> FuseReport:
    """Let the blocks, attention, MLPs and norms of `model` run on the kernels; reports which do, and why the others do not.

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
        return FuseReport(replaced, left)
    if not replaced:
        print("verify compares nothing, as nothing has been replaced")
        return FuseReport(replaced, left)
    try:
        with _watch(model) as ran:
            comparisons = compare(model, [entry.path for entry in replaced], batch)
    except BaseException:
        unfuse(model)
        raise
    idle = [entry for entry in replaced if not any(entry.path == path or _is_within(entry.path, path) for path in ran)]
    print("\n".join([table(comparisons), *(lines(_NOT_RUN, tuple(idle)) if idle else [])]))
    noted = (replace(entry, why="; ".join(filter(None, (entry.why, _NOT_RUN)))) if entry in idle else entry for entry in replaced)
    return FuseReport(tuple(noted), left, comparisons)


def unfuse(model: nn.Module) -> None:
    """Give every module of `model` its own `forward` back. ValueError when something else has wrapped a fused one."""
    _refuse_other_types(model, "unfuse")
    marked = [(path, module) for path, module in model.named_modules() if MARK in module.__dict__]
    for path, module in marked:
        if "forward" in module.__dict__ and not fused_adapter(module):
            raise ValueError(f"the forward of {path or 'the model'} was wrapped after fuse: remove the wrapper, then unfuse")
    for _, module in marked:
        module.__dict__.pop("forward", None)
        del module.__dict__[MARK]


def _refuse_other_types(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} needs a model (torch.nn.Module), not {type(model).__name__}")


def _as_batch(verify: Any) -> VerifyBatch:
    if isinstance(verify, Mapping):  # such as what the feature extractors of transformers give
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
        # Private: up to torch 2.13 there is no public way to ask whether Module.compile() has been called.
        if full_name(module) == "torch._dynamo.eval_frame.OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(f"{path or 'the model'} has been compiled: call fuse before torch.compile")


def _replace(model: nn.Module, attention: ops.AttentionBackend) -> tuple[tuple[ModuleEntry, ...], tuple[ModuleEntry, ...]]:
    """The modules that now run on the kernels, and those that do not."""
    fused: list[tuple[ModuleEntry, float, str]] = []
    left: list[ModuleEntry] = []
    rotary = any(getattr(module, "rope", None) is not None for module in model.modules())
    for path, module in reversed(list(model.named_modules())):  # a block's parts before the block
        adapter, what = adapter_of(module), type(module).__name__
        reason = _reason_to_leave(module, adapter, rotary)
        if adapter is not None and not reason:
            chosen = adapter if attention == "auto" else replace(adapter, read=partial(_read, adapter.read, attention))
            module.__dict__["forward"] = partial(_forward, module, chosen)
            module.__dict__[MARK] = True
            part = adapter.read(module)
            rate = max((drop.rate for drop in part.drops), default=0.0)
            fused.append((ModuleEntry(path, what, gains=gains(part), measured=measured(part)), rate, adapter.note(module)))
        elif reason:
            left.append(ModuleEntry(path, what, reason))
    highest: dict[tuple[str, str], float] = {}
    for entry, rate, _ in fused:
        highest[entry.kind] = max(rate, highest.get(entry.kind, 0.0))
    replaced = [replace(entry, why=_exceptions(highest[entry.kind] if rate else 0.0, note)) for entry, rate, note in fused]
    return tuple(reversed(replaced)), tuple(reversed(left))


def _read(read: Callable[[Any], Part], attention: ops.AttentionBackend, module: Any) -> Part:
    """A part that attends by the given backend."""
    part = read(module)
    if isinstance(part, BlockPart):
        return part._replace(attention=part.attention._replace(backend=attention))
    return part._replace(backend=attention) if isinstance(part, AttentionPart) else part


@contextmanager
def _watch(model: nn.Module) -> Iterator[set[str]]:
    """The paths of the modules of `model` that have run on the kernels since."""
    ran: set[str] = set()
    fused = {path: (module, module.__dict__["forward"]) for path, module in model.named_modules() if fused_adapter(module)}

    def watched(path: str) -> Callable[..., Any]:
        def forward(module: nn.Module, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
            if _fit(module, adapter, args, kwargs):
                ran.add(path)
            return _forward(module, adapter, *args, **kwargs)

        return forward

    try:
        for path, (module, forward) in fused.items():
            module.__dict__["forward"] = partial(watched(path), *forward.args)
        yield ran
    finally:
        for module, forward in fused.values():
            module.__dict__["forward"] = forward


def _is_within(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.") if outer else bool(path)


_NOT_RUN = "not run by this batch"
_EXPECTED = re.compile(r"attention|mlp|ffn|feedforward|glu$|norm|block|layer$", re.IGNORECASE)


def _reason_to_leave(module: nn.Module, adapter: Adapter | None, rotary: bool) -> str:
    """Empty for what is fit, and for classes that nobody would look for in the report."""
    name = full_name(module)
    if adapter is None:
        if name.startswith("polyvit_fast."):
            return "it runs on the kernels without fuse"
        return f"{UNKNOWN} {name}" if _EXPECTED.search(type(module).__name__) and not name.startswith("torch.nn.") else ""
    if "forward" in module.__dict__:
        return "something else has replaced its forward"
    return "it is given rotary positions" if rotary and adapter.rotary else adapter.unknown(module) or adapter.unfit(module)


def _exceptions(rate: float, note: str) -> str:
    training = f"in training, where it drops with up to {rate:g}" if rate else ""
    when = [time for time in (training, note) if time]
    return f"its own forward runs {', and '.join(when)}" if when else ""


def _forward(module: nn.Module, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a fused module."""
    fit = _fit(module, adapter, args, kwargs)
    return compute(*fit) if fit else type(module).forward(module, *args, **kwargs)


def _fit(module: nn.Module, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Part, Tensor] | None:
    """What to compute and of what; None when the module's own `forward` has to run."""
    x = adapter.sole_input(module, args, kwargs)
    if _is_computable(x) and not adapter.unfit(module):
        part = adapter.read(module)
        if accepts(part, x) and not any(drop.rate and drop.training for drop in part.drops):
            return part, x
    return None


def _is_computable(x: Any) -> bool:
    """Whether `x` is a plain tensor on a device of ours, and nobody writes torch's operators down for another runtime."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and x.is_floating_point()
        # Private: torch.compiler.is_exporting() is true in all that torch 2.11 compiles; it will do once 2.13 is the oldest supported.
        and not getattr(torch.compiler, "_is_exporting_flag", False)
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] - documented, and missing in torch's list of exports
    )
