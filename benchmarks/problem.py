"""What is measured: an operation on given inputs, the ways to compute it, and how they are held to one another."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from statistics import median
from typing import Any

import card
import torch
from candidates import label
from card import Cost
from race import Group, Lane, Run, Watch, new_watch, told
from torch import Tensor

from polyvit_kernels import tiles
from polyvit_kernels.tiles import lookup

Inputs = dict[str, Tensor]
Operation = Callable[..., Tensor | tuple[Tensor, ...] | None]

OURS, PORTABLE, KERNELS, EAGER = "ours", "ours portable", "our kernels", "eager"
OWN = (OURS, PORTABLE, KERNELS)
"""Contenders that are compiled by Triton."""
FORWARD, BACKWARD, STEP = "forward", "backward", "step"
HOPPER = 9
"""Compute capability of the GPUs that the tile table's backend of that name is for."""
FURTHEST = 0.05
"""How far a contender's results may be from eager's, ‖a − b‖ / ‖b‖: bf16 and tanh for erf are within 0.01, another function is not."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to compute it, of the problem's inputs by keyword or of what `take` makes of them.

    One that is not `alike` does less than ours, or is ours: it is shown, but is no peer to beat. What is not `judged` gives something else
    than eager. `within` is entered around every call.
    """

    operation: Operation
    take: Callable[[Inputs], Inputs] = dict
    directions: tuple[str, ...] = (FORWARD, BACKWARD, STEP)
    alike: bool = True
    judged: bool = True
    within: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An operation on `inputs`, whose floating-point tensors are differentiated by; costs and rows are by direction.

    A contender that is a string is not there, for that reason. `check` holds ours to the truth. `rows` are the (op, tokens, features)
    that the tile table is asked for. A call handles `amount` `unit`s.
    """

    title: str
    inputs: Inputs
    contenders: Mapping[str, Contender | str]
    costs: Mapping[str, Cost]
    amount: float
    unit: str
    check: Callable[[], None] | None = None
    rows: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)

    @cached_property
    def failure(self) -> str:
        """Why ours is wrong; nothing when it is right."""
        try:
            if self.check:
                self.check()
        except Exception as error:
            return told(error)
        return ""

    def compile_own(self, direction: str) -> dict[str, str]:
        """Call each of `OWN` once, so that their kernels are in Triton's cache; why those are not there that failed."""
        absent = {}
        for name, contender in self.contenders.items():
            if name in OWN and isinstance(contender, Contender) and direction in contender.directions:
                try:
                    run_of(contender, self.inputs, direction)()
                except Exception as error:
                    absent[name] = told(error)
        return absent

    def enter(self, direction: str, names: set[str]) -> Group:
        """Of `names`, those that can run and give what eager gives."""
        lanes, absent = [], {}
        eager = self.contenders[EAGER]
        assert isinstance(eager, Contender)
        expected = None if direction == STEP or not names else _as_tuple(run_of(eager, self.inputs, direction)())
        for name, contender in self.contenders.items():
            if isinstance(contender, str):
                absent |= {name: contender} if name in names else {}
            elif name in names and direction in contender.directions:
                try:
                    run = run_of(contender, self.inputs, direction)
                    found = run()
                    # Other leaves have other gradients.
                    if expected is not None and contender.judged and (direction == FORWARD or contender.take is dict):
                        assert_near(_as_tuple(found), expected)
                except Exception as error:
                    absent[name] = told(error)
                else:
                    lanes.append(Lane(name=name, run=run))
        absent |= {OURS: self.failure} if OURS in names and self.failure else {}
        title = self.title.replace("|", direction)
        return Group(title=title, lanes=lanes, absent=absent, watch=_watch(), info=partial(self._info, direction))

    def _info(self, direction: str, lane: Lane) -> dict[str, object]:
        cost, seconds = self.costs[direction], median(lane.seconds)
        floor = card.floor_seconds(cost, card.name())
        return {
            "amount": self.amount,
            "unit": self.unit,
            "dtype": str(next(tensor.dtype for tensor in self.inputs.values() if tensor.is_floating_point())),
            "alike": getattr(self.contenders[lane.name], "alike", True),
            "tflops": cost.flops / seconds / 1e12,
            "gb_per_second": cost.num_bytes / seconds / 1e9,
            "floor_us": floor and floor * 1e6,
            "share_of_floor": floor and floor / seconds,
            "rows": [_row(*question) for question in self.rows.get(direction, ())] if lane.name == OURS and card.HAS_GPU else [],
        }


@cache
def _watch() -> Watch:
    """One for all, as it holds memory of the card."""
    return new_watch()


def _row(op: str, tokens: int, features: int) -> str:
    """The row of the tile table that ours runs with."""
    dtype = torch.float32 if op.endswith("_update") else card.DTYPE
    tile = tiles.pick(op, tiles.architecture(card.DEVICE), dtype, tokens=tokens, features=features)
    return f"{op}: {tile.backend} {label(tile)}, {tile.source}"


def portable(operation: Operation, **rest: Any) -> Contender | str:
    """`operation` of ours with kernels that run on every GPU, where there are others for this one; else why that is left out."""
    if not card.HAS_GPU:
        return "left out on a CPU"
    if tiles.architecture(card.DEVICE) // 10 != HOPPER:
        return "ours has no other kernels for this GPU"
    return Contender(operation=operation, within=portable_rows, alike=False, **rest)


@contextmanager
def portable_rows() -> Iterator[None]:
    """Inside, operations take rows of the tile table whose kernels run on every GPU."""
    pick = lookup.pick
    lookup.pick = lambda *question, **sizes: pick(*question, **(sizes | {"portable": True}))
    try:
        yield
    finally:
        lookup.pick = pick


def run_of(contender: Contender, inputs: Inputs, direction: str) -> Run:
    """One call: the forward as in training, or the gradients of one graph that stays, for upstream gradients that all contenders share."""

    def within(run: Run) -> Run:
        def call() -> object:
            with contender.within():
                return run()

        return call

    with contender.within():
        return within(_run_of(contender, inputs, direction))


def _run_of(contender: Contender, inputs: Inputs, direction: str) -> Run:
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
