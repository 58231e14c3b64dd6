"""One update of all parameters of a ViT-B: SGD or AdamW, a copy in bf16, gradients to zero; against torch's own.

Run: pytest benchmarks/bench_update.py. Everybody scales the gradient and does all of this; only ours and the fused ones can also skip an
update on the device. Torch's get one flat tensor, or a tensor for each parameter, which is how a model has them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import compare
import peers
import pytest
import torch
from card import DEVICE, HAS_GPU, Cost
from problem import EAGER, OURS, STEP, Contender, Inputs, Operation, Problem

import polyvit_kernels
from polyvit_kernels import reference

FUSED, MANY_FUSED = "fused", "fused per parameter"
SHAPES = [(768, 12)] if HAS_GPU else [(64, 2)]  # (dim, depth)
SAMPLE = 1_000_003
MOMENTUM, BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.9, 0.999, 1e-8, 0.05


def parameter_sizes(dim: int, depth: int) -> list[int]:
    """Of a ViT with patches of 16 × 16 on 224 × 224 and 1,000 classes."""
    block = [dim, dim, 3 * dim * dim, 3 * dim, dim * dim, dim, dim, dim, 4 * dim * dim, 4 * dim, 4 * dim * dim, dim]
    return [dim, 197 * dim, 768 * dim, dim, *(block * depth), dim, dim, 1_000 * dim, 1_000]


def new_state(size: int, averages: tuple[str, ...]) -> Inputs:
    """Buffers as after ten updates, and the numbers of the eleventh."""
    state = {name: torch.randn(size, device=DEVICE) * 0.02 for name in ("param", "grad", *averages)}
    # As means of squares they are never as near to zero as a single square may be.
    state |= {"exp_avg_sq": state["exp_avg_sq"].square() + 1e-6} if "exp_avg_sq" in state else {}
    numbers = {"count": 11.0, "lr": 1e-3, "scale": 0.7}
    copy = {"copy": torch.empty(size, device=DEVICE, dtype=torch.bfloat16), "ok": torch.tensor(True, device=DEVICE)}
    return state | copy | {name: torch.tensor(number, device=DEVICE) for name, number in numbers.items()}


def cloned(state: Inputs) -> Inputs:
    return {name: tensor.clone() for name, tensor in state.items()}


def our_adamw(param, grad, exp_avg, exp_avg_sq, count, lr, scale, ok, copy) -> None:
    rates = {"betas": (BETA1, BETA2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    polyvit_kernels.adamw_(param, grad, exp_avg, exp_avg_sq, count, lr=lr, scale=scale, ok=ok, copy=copy, **rates)


def eager_adamw(param, grad, exp_avg, exp_avg_sq, count, lr, scale, ok, copy) -> None:
    grad.mul_(scale)
    exp_avg.lerp_(grad, 1 - BETA1)
    exp_avg_sq.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    root = (exp_avg_sq / (1 - BETA2**count)).sqrt_().add_(EPS)
    param.mul_(1 - lr * WEIGHT_DECAY).sub_(lr / (1 - BETA1**count) * exp_avg / root)
    copy.copy_(param)
    grad.zero_()


def fused_adamw(param, grad, exp_avg, exp_avg_sq, count, lr, scale, ok, copy, *, sizes: list[int]) -> None:
    params, grads, firsts, seconds, copies = (list(buffer.split(sizes)) for buffer in (param, grad, exp_avg, exp_avg_sq, copy))
    rates = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": WEIGHT_DECAY, "amsgrad": False, "maximize": False}
    on_device = {"lr": lr, "grad_scale": scale.reciprocal(), "found_inf": ok.logical_not().float()}
    torch._fused_adamw_(params, grads, firsts, seconds, [], [count] * len(sizes), **rates, **on_device)
    torch._foreach_copy_(copies, params)
    torch._foreach_zero_(grads)


def true_adamw(state: Inputs) -> Inputs:
    param, first, second = reference.adamw(
        *(state[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq")),
        int(state["count"]),
        lr=state["lr"].item(),
        scale=state["scale"].item(),
        betas=(BETA1, BETA2),
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
    )
    return {"param": param, "exp_avg": first, "exp_avg_sq": second}


def our_sgd(param, grad, momentum_buffer, count, lr, scale, ok, copy) -> None:
    rates = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    polyvit_kernels.sgd_(param, grad, momentum_buffer, lr=lr, scale=scale, ok=ok, copy=copy, **rates)


def eager_sgd(param, grad, momentum_buffer, count, lr, scale, ok, copy) -> None:
    grad.mul_(scale).add_(param, alpha=WEIGHT_DECAY)
    momentum_buffer.mul_(MOMENTUM).add_(grad)
    param.sub_(lr * momentum_buffer)
    copy.copy_(param)
    grad.zero_()


def fused_sgd(param, grad, momentum_buffer, count, lr, scale, ok, copy, *, sizes: list[int]) -> None:
    params, grads, buffers, copies = (list(buffer.split(sizes)) for buffer in (param, grad, momentum_buffer, copy))
    rates = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "dampening": 0.0, "nesterov": False, "maximize": False}
    on_device = {"lr": lr, "grad_scale": scale.reciprocal(), "found_inf": ok.logical_not().float()}
    torch._fused_sgd_(params, grads, buffers, **rates, **on_device, is_first_step=False)
    torch._foreach_copy_(copies, params)
    torch._foreach_zero_(grads)


def true_sgd(state: Inputs) -> Inputs:
    param, momentum_buffer = reference.sgd(
        *(state[name] for name in ("param", "grad", "momentum_buffer")),
        lr=state["lr"].item(),
        scale=state["scale"].item(),
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    return {"param": param, "momentum_buffer": momentum_buffer}


def check(ours: Operation, eager: Operation, true: Callable[[Inputs], Inputs], averages: tuple[str, ...]) -> None:
    """Hold one update to the rule, the copy to the parameters, and gradients to zero."""
    state = new_state(SAMPLE, averages)
    found, yardstick = cloned(state), cloned(state)
    ours(**found)
    eager(**yardstick)
    expected = true({name: tensor.double() for name, tensor in state.items()})
    compare.assert_within_rule({name: found[name] for name in expected}, yardstick, expected, torch.float32)
    assert torch.equal(found["copy"], found["param"].to(torch.bfloat16))
    assert not found["grad"].any()


def adamw_of(shape: Sequence[int]) -> Problem:
    # In: four buffers; out: the same, and two bytes for the copy.
    return _problem("AdamW", shape, (our_adamw, eager_adamw, fused_adamw), true_adamw, ("exp_avg", "exp_avg_sq"), num_bytes=34)


def sgd_of(shape: Sequence[int]) -> Problem:
    return _problem("SGD", shape, (our_sgd, eager_sgd, fused_sgd), true_sgd, ("momentum_buffer",), num_bytes=26)


def _problem(
    title: str,
    shape: Sequence[int],
    forms: tuple[Operation, Operation, Operation],
    true: Callable[[Inputs], Inputs],
    averages: tuple[str, ...],
    num_bytes: int,
) -> Problem:
    sizes = parameter_sizes(*shape)
    ours, eager, fused = forms
    return Problem(
        title=f"{title} | of {sum(sizes):,}",
        inputs=new_state(sum(sizes), averages),
        check=partial(check, ours, eager, true, averages),
        contenders={
            OURS: Contender(operation=ours, take=cloned),
            EAGER: Contender(operation=eager, take=cloned),
            FUSED: Contender(operation=partial(fused, sizes=[sum(sizes)]), take=cloned),
            MANY_FUSED: Contender(operation=partial(fused, sizes=sizes), take=cloned),
            **peers.compiled(eager, take=cloned),
        },
        costs={STEP: Cost(num_bytes=num_bytes * sum(sizes))},
        amount=sum(sizes),
        unit="parameters",
        rows={STEP: ((f"{title.lower()}_update", 1, 1),)},
    )


@pytest.mark.parametrize("contender", [OURS, EAGER, FUSED, MANY_FUSED, *peers.COMPILERS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("problem_of", [adamw_of, sgd_of])
def test_update(report, problem_of, shape, contender):
    report(STEP, contender, problem_of, shape)
