"""A fused model against itself as it was: forward and backward, on its own weights and a batch of its user's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from polyvit_fast.drop_in.fused import original

VerifyBatch = Tensor | tuple[Any, ...] | dict[str, Any]
"""What a model is called with: one tensor, its arguments, or its keyword arguments."""

MODEL = "(the model)"

LEGEND = (
    "error: the largest distance from the truth, which is the model in fp64; original: the same of the model's own code; "
    "of allowed: how much of the error that the rule allows"
)

NOTHING = 1e-6
"""A tensor smaller than this fraction of the module's largest is zero in truth."""

_Measure = Callable[[Tensor], float]
_Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of one module, fused, against the truth in fp64.

    `error` is its largest difference, `original_error` that of the module's own `forward`; `used` is the fraction of the allowed error
    that is used up, above 1 when the rule of `compare` is broken; `cosine` and `norm_ratio` are between the fused tensor and the truth.
    """

    path: str
    tensor: str
    error: float
    original_error: float
    used: float
    cosine: float
    norm_ratio: float


@dataclass(frozen=True)
class _Call:
    """What a module was called with, and the gradient that came to its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    upstream: Tensor | None


def compare(model: nn.Module, paths: list[str], batch: VerifyBatch) -> tuple[Comparison, ...]:
    """Compare each of the fused modules at `paths`, on the inputs and gradients that it gets in the model, and the whole model.

    The rule, for every output and gradient: the root mean square of the fused error is at most twice that of the original's error, and
    no single value is off by more than four times the original's largest error; 1e-5 of the tensor's own size is always allowed. As a
    tensor may be exact by luck, the original's error counts for no less than its median relative error over the module's tensors; and
    where a gradient is zero in truth, as that of the keys' bias, it is the largest error of all. Everything runs in evaluation mode, where
    nothing is dropped. RuntimeError with the table where the rule is broken; ValueError where the original or the truth is not finite.
    """
    with _undisturbed(model):
        model.eval()
        batch = _map_tensors(batch, lambda tensor: tensor.detach().clone())
        calls = _first_calls(model, paths, batch)
        run = [path for path in paths if path in calls]
        comparisons = [found for path in run for found in _compare_module(path, model.get_submodule(path), calls[path])]
        comparisons += _compare_model(model, batch)
    wrong = [found for found in comparisons if found.used > 1]
    if wrong:
        where = "; ".join(f"{found.path}: {found.tensor}" for found in wrong[:5])
        raise RuntimeError(f"the fused model is not the original one, which has been restored. It differs in {where}\n{table(comparisons)}")
    return tuple(comparisons)


def table(comparisons: tuple[Comparison, ...] | list[Comparison]) -> str:
    """What the columns mean, and a line per outermost module, for the tensor, of all within it, that uses up most of its allowed error."""
    worst: dict[str, Comparison] = {}
    for one in comparisons:
        outermost = next((path for path in worst if one.path == path or one.path.startswith(f"{path}.")), one.path)
        if outermost not in worst or one.used > worst[outermost].used:
            worst[outermost] = one
    rows = [("module", "worst tensor", "error", "original", "of allowed", "cosine", "norm ratio")]
    for path, one in worst.items():
        tensor = f"{one.path.removeprefix(path).lstrip('.')} {one.tensor}".strip()
        used = f"{one.used:.0%}" if one.used <= 10 else f"{one.used:,.0f}×"
        rows.append((path, tensor, f"{one.error:.2g}", f"{one.original_error:.2g}", used, f"{one.cosine:.6f}", f"{one.norm_ratio:.6f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([LEGEND, *lines])


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(list(devices)):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _run(model: nn.Module, batch: VerifyBatch) -> Any:
    torch.manual_seed(0)  # some models draw numbers in evaluation too
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def _first_calls(model: nn.Module, paths: list[str], batch: VerifyBatch) -> dict[str, _Call]:
    """The first call of each module in a run of the original model."""
    inputs: dict[str, tuple[Any, Any]] = {}
    outputs: _Tensors = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if path not in inputs:
                inputs[path] = _map_tensors((args, kwargs), lambda tensor: tensor.detach().clone())
                outputs[path] = _tensors(output)[0]

        return keep

    with original(model):
        handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
        try:
            result = _tensors(_run(model, batch))
        except Exception as error:
            error.add_note("the model itself failed on the batch given as verify")
            raise
        finally:
            for handle in handles:
                handle.remove()
    wanted = [path for path, output in outputs.items() if output.requires_grad]
    upstream = dict(zip(wanted, _gradients(result, [outputs[path] for path in wanted]), strict=True))
    return {path: _Call(*inputs[path], upstream.get(path)) for path in outputs}


def _compare_module(path: str, module: nn.Module, call: _Call) -> list[Comparison]:
    found = _module_tensors(module, call)
    with original(module):
        plain = _module_tensors(module, call)
        exact = copy.deepcopy(module).double()
        with torch.autocast(_device(module), enabled=False):
            true = _module_tensors(exact, _Call(*_map_tensors((call.args, call.kwargs, call.upstream), _double)))
    return _judge(path or MODEL, found, plain, true)


def _module_tensors(module: nn.Module, call: _Call) -> _Tensors:
    wanted = {id(arg) for arg in call.args if isinstance(arg, Tensor) and arg.is_floating_point()}
    args, kwargs = _map_tensors((call.args, call.kwargs), lambda tensor: tensor.detach().requires_grad_(id(tensor) in wanted))
    output = _tensors(module.forward(*args, **kwargs))[0]
    first = {id(arg): index for index, arg in reversed(list(enumerate(args)))}
    leaves = {f"input {first[id(arg)]}": arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad}
    leaves |= {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    gradients = _gradients([output], list(leaves.values()), call.upstream)
    return {"output": output.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def _compare_model(model: nn.Module, batch: VerifyBatch) -> list[Comparison]:
    found = _model_tensors(model, batch)
    with original(model):
        plain = _model_tensors(model, batch)
        exact = copy.deepcopy(model).double()
        with torch.autocast(_device(model), enabled=False):
            true = _model_tensors(exact, _map_tensors(batch, _double))
    return _judge(MODEL, found, plain, true)


def _model_tensors(model: nn.Module, batch: VerifyBatch) -> _Tensors:
    """All outputs as one tensor and all gradients as another: among them are some of few numbers, which may be exact by luck."""
    outputs = _tensors(_run(model, batch))
    gradients = _gradients(outputs, [parameter for parameter in model.parameters() if parameter.requires_grad])
    flat = [gradient.flatten() for gradient in gradients if gradient is not None]
    values = [output.detach().flatten() for output in outputs]
    return {name: torch.cat(parts) for name, parts in (("output", values), ("gradient", flat)) if parts}


def _gradients(outputs: list[Tensor], leaves: list[Tensor], upstream: Tensor | None = None) -> list[Tensor | None]:
    """Gradients for `upstream` by the one output, or for normal random numbers by all; nothing is added to the leaves' own."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs or not leaves:
        return [None] * len(leaves)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    return list(torch.autograd.grad(outputs, leaves, drawn if upstream is None else [upstream.to(outputs[0].dtype)], allow_unused=True))


def _judge(path: str, found: _Tensors, plain: _Tensors, true: _Tensors) -> list[Comparison]:
    for name, tensor in true.items():
        if not (plain[name].isfinite().all() and tensor.isfinite().all()):
            what = name if path == MODEL else f"{name} of {path}"
            raise ValueError(f"the model's own {what} is not finite on this batch: verify cannot judge; give another batch")
    comparisons = []
    for kind in ("output", "gradient"):
        truth = {name: tensor for name, tensor in true.items() if name.startswith(kind)}
        off = {name: plain[name].double() - tensor for name, tensor in truth.items()}
        ours = {name: found[name].double() if name in found else torch.full_like(tensor, torch.nan) for name, tensor in truth.items()}
        allowed = [(measure, factor, _baselines(measure, off, truth)) for measure, factor in ((_rms, 2), (_largest, 4))]
        for name, tensor in truth.items():
            error = ours[name] - tensor
            used = max(_fraction_used(m(error), factor * baselines[name] + 1e-5 * m(tensor)) for m, factor, baselines in allowed)
            comparisons.append(Comparison(path, name, _largest(error), _largest(off[name]), used, *_direction(ours[name], tensor)))
    return comparisons


def _baselines(measure: _Measure, errors: _Tensors, true: _Tensors) -> dict[str, float]:
    """The error of each of the original's tensors that the rule reckons with."""
    off, size = ({name: measure(tensor) for name, tensor in tensors.items()} for tensors in (errors, true))
    zero = NOTHING * max(size.values(), default=0.0)
    usual = median([off[name] / size[name] for name in true if size[name] > zero] or [0.0])
    return {name: max(off[name], usual * size[name]) if size[name] > zero else max(off.values()) for name in true}


def _fraction_used(error: float, allowed: float) -> float:
    if error <= allowed:
        return error / allowed if allowed and math.isfinite(allowed) else 0.0
    return error / allowed if allowed else math.inf


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().nan_to_num(torch.inf, torch.inf).item() if tensor.numel() else 0.0


def _largest(tensor: Tensor) -> float:
    return tensor.double().abs().nan_to_num(torch.inf, torch.inf).max().item() if tensor.numel() else 0.0


def _direction(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The cosine between two tensors and the ratio of their norms; 1 where one of them has no direction."""
    a, b = a.flatten(), b.double().flatten()
    norms = a.norm() * b.norm()
    return ((a @ b / norms).item(), (a.norm() / b.norm()).item()) if norms else (1.0, 1.0)


def _device(module: nn.Module) -> str:
    return next((parameter.device.type for parameter in module.parameters()), "cpu")


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a module returns, in their order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor in its tuples, lists and dicts; what was one tensor is one afterwards."""
    made: dict[int, Tensor] = {}

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in made:
                made[id(value)] = function(value)
            return made[id(value)]
        if isinstance(value, tuple | list):
            return type(value)(mapped(part) for part in value)
        return {name: mapped(part) for name, part in value.items()} if isinstance(value, dict) else value

    return mapped(value)
