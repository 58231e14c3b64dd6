"""One update of all parameters of a ViT-B: SGD or AdamW, a copy in bf16, gradients to zero; against torch's own.

Run: pytest benchmarks/bench_update.py. Every candidate scales the gradient and does all of this; only ours and the fused ones can also skip
an update on the device. Torch's get one flat tensor, or a tensor for each parameter, which is how a model has them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import compare
import peers
import pytest
import torch
from harness import EAGER, OURS, STEP, Candidate, Inputs, Operation, Problem, group_params
from machine import DEVICE, HAS_GPU
from torch import Tensor

import polyvit_kernels
from polyvit_kernels import reference

FUSED, PER_PARAMETER = "fused", "fused per parameter"
SHAPES = [(768, 12)] if HAS_GPU else [(64, 2)]  # (dim, depth)
SAMPLE = 1_000_003
MOMENTUM, BETAS, EPS, WEIGHT_DECAY = 0.9, (0.9, 0.999), 1e-8, 0.05
ADAMW: dict[str, Any] = {"betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
SGD: dict[str, Any] = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}


def parameter_sizes(dim: int, depth: int) -> list[int]:
    """Of a ViT with patches of 16 × 16 on 224 × 224 and 1,000 classes."""
    block = [dim, dim, 3 * dim * dim, 3 * dim, dim * dim, dim, dim, dim, 4 * dim * dim, 4 * dim, 4 * dim * dim, dim]
    return [dim, 197 * dim, 768 * dim, dim, *(block * depth), dim, dim, 1_000 * dim, 1_000]


def make_state(size: int, averages: tuple[str, ...]) -> Inputs:
    """Buffers as after ten updates, and the numbers of the eleventh."""
    state = {name: torch.randn(size, device=DEVICE) * 0.02 for name in ("param", "grad", *averages)}
    # As means of squares they are never as near to zero as a single square may be.
    state |= {"exp_avg_sq": state["exp_avg_sq"].square() + 1e-6} if "exp_avg_sq" in state else {}
    numbers = {"count": 11.0, "lr": 1e-3, "scale": 0.7}
    copy = {"copy": torch.empty(size, device=DEVICE, dtype=torch.bfloat16), "ok": torch.tensor(True, device=DEVICE)}
    return state | copy | {name: torch.tensor(number, device=DEVICE) for name, number in numbers.items()}


def clone(state: Inputs) -> Inputs:
    return {name: tensor.clone() for name, tensor in state.items()}


def our_adamw(param, grad, exp_avg, exp_avg_sq, count, lr, scale, ok, copy) -> None:
    polyvit_kernels.adamw_(param, grad, exp_avg, exp_avg_sq, count, lr=lr, scale=scale, ok=ok, copy=copy, **ADAMW)


def eager_adamw(param, grad, exp_avg, exp_avg_sq, count, lr, scale, ok, copy) -> None:
    grad.mul_(scale)
    exp_avg.lerp_(grad, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    root = (exp_avg_sq / (1 - BETAS[1] ** count)).sqrt_().add_(EPS)
    param.mul_(1 - lr * WEIGHT_DECAY).sub_(lr / (1 - BETAS[0] ** count) * exp_avg / root)
    copy.copy_(param)
    grad.zero_()


def true_adamw(state: Inputs) -> Inputs:
    buffers = (state[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq"))
    found = reference.adamw(*buffers, int(state["count"]), lr=state["lr"].item(), scale=state["scale"].item(), **ADAMW)
    return dict(zip(("param", "exp_avg", "exp_avg_sq"), found, strict=True))


def our_sgd(param, grad, momentum_buffer, count, lr, scale, ok, copy) -> None:
    polyvit_kernels.sgd_(param, grad, momentum_buffer, lr=lr, scale=scale, ok=ok, copy=copy, **SGD)


def eager_sgd(param, grad, momentum_buffer, count, lr, scale, ok, copy) -> None:
    grad.mul_(scale).add_(param, alpha=WEIGHT_DECAY)
    momentum_buffer.mul_(MOMENTUM).add_(grad)
    param.sub_(lr * momentum_buffer)
    copy.copy_(param)
    grad.zero_()


def true_sgd(state: Inputs) -> Inputs:
    buffers = (state[name] for name in ("param", "grad", "momentum_buffer"))
    found = reference.sgd(*buffers, lr=state["lr"].item(), scale=state["scale"].item(), **SGD)
    return dict(zip(("param", "momentum_buffer"), found, strict=True))


def take_optimizer(state: Inputs, optimizer: Callable[..., torch.optim.Optimizer], sizes: list[int]) -> Inputs:
    """One of torch's over views of a copy of the parameters, its first update done; it scales as torch's GradScaler has it scale."""
    state = clone(state)
    views = [view.requires_grad_() for view in state["param"].split(sizes)]
    for view, grad in zip(views, state["grad"].split(sizes), strict=True):
        view.grad = grad
    made: Any = optimizer(views, lr=state["lr"], fused=True)
    made.grad_scale, made.found_inf = state["scale"].reciprocal(), state["ok"].logical_not().float()
    made.step()
    return {"step": made.step, "param": state["param"], "grad": state["grad"], "copy": state["copy"]}


def step_optimizer(step: Callable[[], None], param: Tensor, grad: Tensor, copy: Tensor) -> None:
    step()
    copy.copy_(param)
    grad.zero_()


def check(ours: Operation, eager: Operation, true: Callable[[Inputs], Inputs], averages: tuple[str, ...]) -> None:
    """Hold one update to the rule, the copy to the parameters, and gradients to zero."""
    state = make_state(SAMPLE, averages)
    found, plain = clone(state), clone(state)
    ours(**found)
    eager(**plain)
    expected = true({name: tensor.double() for name, tensor in state.items()})
    compare.assert_within_rule({name: found[name] for name in expected}, plain, expected, torch.float32)
    assert torch.equal(found["copy"], found["param"].to(torch.bfloat16))
    assert not found["grad"].any()


def adamw_of(shape: Sequence[int]) -> Problem:
    # In: four buffers; out: the same, and two bytes for the copy.
    forms, averages = (our_adamw, eager_adamw, true_adamw), ("exp_avg", "exp_avg_sq")
    return _problem("AdamW", shape, forms, partial(torch.optim.AdamW, **ADAMW), averages, num_bytes=34)


def sgd_of(shape: Sequence[int]) -> Problem:
    forms, averages = (our_sgd, eager_sgd, true_sgd), ("momentum_buffer",)
    return _problem("SGD", shape, forms, partial(torch.optim.SGD, **SGD), averages, num_bytes=26)


def _problem(title: str, shape: Sequence[int], forms, optimizer, averages: tuple[str, ...], num_bytes: int) -> Problem:
    sizes = parameter_sizes(*shape)
    ours, eager, true = forms
    layouts = {FUSED: [sum(sizes)], PER_PARAMETER: sizes}
    return Problem(
        title=f"{title} of {sum(sizes):,}",
        inputs=make_state(sum(sizes), averages),
        check=partial(check, ours, eager, true, averages),
        candidates={
            OURS: Candidate(operation=ours, take=clone),
            EAGER: Candidate(operation=eager, take=clone),
            **{
                name: Candidate(operation=step_optimizer, take=partial(take_optimizer, optimizer=optimizer, sizes=layout))
                for name, layout in layouts.items()
            },
            **peers.compile_operation(eager, take=clone),
        },
        num_bytes={STEP: num_bytes * sum(sizes)},
        amount=sum(sizes),
        unit="parameters",
    )


@pytest.mark.parametrize("candidate", [OURS, EAGER, FUSED, PER_PARAMETER, *peers.COMPILERS])
@pytest.mark.parametrize("group", [*group_params(adamw_of, SHAPES, [STEP]), *group_params(sgd_of, SHAPES, [STEP])], indirect=True)
def test_update(group, candidate, benchmark):
    group.enter(candidate, benchmark)
