"""The one way in which operations are registered with torch.library.

An operation is a function `run(*arguments, pick)`, whose annotations give the schema. `pick` is `tiles.pick_for` on CUDA; on a CPU it is
`pick_torch`, so that `run` falls back to torch's own operators there as it does on CUDA where the tile table has no row.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from polyvit_kernels.tiles import Tile, pick_for

Pick = Callable[..., Tile]

_BY_TORCH = Tile(op="any", archs=(), backend="torch")


def pick_torch(*_: Any, **__: Any) -> Tile:
    """Torch's own operators, whatever is asked for."""
    return _BY_TORCH


def register(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    *,
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
    device_types: tuple[str, ...] = ("cpu", "cuda"),
) -> Callable[..., Any]:
    """`polyvit::name`. `fake` gives empty results for arguments without data; an operation that only `mutates` its arguments needs none.

    `save(ctx, inputs, output)` and `differentiate(ctx, *grads)` are what torch's `register_autograd` takes as setup_context and backward.
    """

    def run_on_cpu(*arguments: Any) -> Any:
        return run(*arguments, pick_torch)

    def run_on_cuda(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return run(*arguments, pick_for)

    on_device = {"cpu": run_on_cpu, "cuda": run_on_cuda}
    first, *others = device_types
    schema = torch.library.infer_schema(_without_pick(run), mutates_args=mutates)
    operation = torch.library.custom_op(f"polyvit::{name}", on_device[first], mutates_args=mutates, device_types=first, schema=schema)
    for device in others:
        operation.register_kernel(device)(on_device[device])
    if fake:
        operation.register_fake(fake)
    if differentiate:
        operation.register_autograd(differentiate, setup_context=save)
    return operation


def _without_pick(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature that callers of the operation see."""
    signature = inspect.signature(run, eval_str=True)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "pick"]

    def prototype(*_: Any) -> None: ...

    prototype.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return prototype
