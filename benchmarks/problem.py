"""What is measured: an operation on given inputs, the ways to compute it, and how they are held to one another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from card import Cost
from race import Lane, Run, told
from torch import Tensor

Inputs = dict[str, Tensor]
Operation = Callable[..., Tensor | tuple[Tensor, ...] | None]

OURS, EAGER = "ours", "eager"
FORWARD, BACKWARD, STEP = "forward", "backward", "step"
FURTHEST = 0.05
"""How far a contender's results may be from eager's, ‖a − b‖ / ‖b‖: bf16 and tanh for erf are within 0.01, another function is not."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to compute it, of the problem's inputs by keyword or of what `take` makes of them.

    One that is not `alike` does less than ours: it is shown, but is no peer to beat.
    """

    operation: Operation
    take: Callable[[Inputs], Inputs] = dict
    directions: tuple[str, ...] = (FORWARD, BACKWARD, STEP)
    alike: bool = True


@dataclass(frozen=True, kw_only=True)
class Target:
    """What ours is meant to reach on an H200: a time, and how many times as fast as the best peer."""

    us: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An operation on `inputs`, whose floating-point tensors are differentiated by; costs, rows and targets are by direction.

    A contender that is a string is not there, for that reason. `check` holds ours to the truth. `rows` are the (op, tokens, features)
    that the tile table is asked for. A call handles `amount` `unit`s. `step_seconds` is the step that it is a part of.
    """

    title: str
    inputs: Inputs
    contenders: Mapping[str, Contender | str]
    costs: Mapping[str, Cost]
    amount: float
    unit: str
    check: Callable[[], None] | None = None
    rows: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)
    step_seconds: float | None = None


def run_of(contender: Contender, inputs: Inputs, direction: str) -> Run:
    """One call: the forward as in training, or the gradients of one graph that stays, for upstream gradients that all contenders share."""
    tensors = contender.take(inputs)
    if direction == STEP:
        return lambda: contender.operation(**tensors)
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    if direction == FORWARD:
        return lambda: contender.operation(**leaves)
    outputs = _as_tuple(contender.operation(**leaves))
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype) for out in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)


def enter(problem: Problem, direction: str) -> tuple[list[Lane], dict[str, str]]:
    """A lane for each contender that can run and gives what eager gives, and why the others are absent."""
    lanes, absent = [], {}
    eager = problem.contenders[EAGER]
    assert isinstance(eager, Contender)
    expected = None if direction == STEP else _as_tuple(run_of(eager, problem.inputs, direction)())
    for name, contender in problem.contenders.items():
        if isinstance(contender, str):
            absent[name] = contender
        elif direction in contender.directions:
            try:
                run = run_of(contender, problem.inputs, direction)
                found = run()
                # Other leaves have other gradients.
                if expected is not None and (direction == FORWARD or contender.take is dict):
                    assert_near(_as_tuple(found), expected)
            except Exception as error:
                absent[name] = told(error)
            else:
                lanes.append(Lane(name=name, run=run))
    return lanes, absent


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """ValueError unless tensors are of the same shapes and within `FURTHEST`."""
    shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"results are of the shapes {shapes[0]}, eager's of {shapes[1]}")
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        distance = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()
        # A NaN is not near.
        if not distance <= FURTHEST:
            raise ValueError(f"result {number} is {distance:.2g} from eager's, relatively")


def _as_tuple(results: Tensor | tuple[Tensor, ...] | object) -> tuple[Tensor, ...]:
    if isinstance(results, Tensor):
        return (results,)
    assert isinstance(results, tuple)
    return results
