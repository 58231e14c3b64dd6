"""What every operation owes to its registration."""

import pytest
import torch

from polyvit_kernels.ops.registration import Pick, pick_torch, register
from polyvit_kernels.tiles import lookup, pick_for


def scale(x: torch.Tensor, factor: float, out_dtype: torch.dtype | None, pick: Pick) -> torch.Tensor:
    """Twice as much by a kernel, to show who did it."""
    tile = pick("adamw_update", x)
    return (x * factor * (1 if tile.backend == "torch" else 2)).to(out_dtype or x.dtype)


def fake_scale(x: torch.Tensor, factor: float, out_dtype: torch.dtype | None) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def save(ctx, inputs, output):
    ctx.factor = inputs[1]


def differentiate(ctx, grad):
    return grad * ctx.factor, None, None


def increase(x: torch.Tensor, y: torch.Tensor | None, amount: float, pick: Pick) -> None:
    x += amount


@pytest.fixture(scope="module")
def scaled():
    return register("test_scale", scale, fake_scale, save=save, differentiate=differentiate)


def test_the_schema_is_that_of_the_function_without_the_table(scaled):
    assert str(scaled._opoverload._schema) == "polyvit::test_scale(Tensor x, float factor, ScalarType? out_dtype) -> Tensor"


def test_it_is_as_torch_wants_it_and_differentiable(scaled):
    x = torch.ones(3, requires_grad=True)
    torch.library.opcheck(scaled, (x, 3.0, torch.float64))
    (gradient,) = torch.autograd.grad(scaled(x, 3.0, None).sum(), x)
    assert gradient.tolist() == [3.0] * 3


def test_on_a_cpu_torch_computes_and_on_cuda_what_the_table_says(scaled, monkeypatch):
    monkeypatch.setattr(lookup, "architecture", lambda device: 90)
    assert scaled(torch.ones(1), 3.0, None).item() == scale(torch.ones(1), 3.0, None, pick_torch).item() == 3.0
    assert scaled._backend_fns["cuda"](torch.ones(1), 3.0, None).item() == scale(torch.ones(1), 3.0, None, pick_for).item() == 6.0


def test_an_operation_in_place_says_what_it_changes():
    operation = register("test_increase", increase, mutates=("x", "y"))
    assert str(operation._opoverload._schema) == "polyvit::test_increase(Tensor(a0!) x, Tensor(a1!)? y, float amount) -> ()"
    x = torch.zeros(2)
    torch.library.opcheck(operation, (x.clone(), None, 2.0))
    operation(x, None, 2.0)
    assert x.tolist() == [2.0, 2.0]


def test_an_operation_for_cuda_alone_is_refused_on_a_cpu():
    operation = register("test_cuda_alone", scale, fake_scale, device_types=("cuda",))
    with pytest.raises(NotImplementedError):
        operation(torch.ones(1), 2.0, None)
