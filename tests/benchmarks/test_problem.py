"""What a contender must give to take part, each way."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from card import Cost
from problem import BACKWARD, EAGER, FORWARD, OURS, STEP, Contender, Problem, assert_near, portable_rows, run_of

from polyvit_kernels.tiles import lookup


def double(x, weight):
    return (x * weight).sum(0)


CONTENDERS = {
    OURS: Contender(operation=double),
    EAGER: Contender(operation=double),
    "wrong": Contender(operation=lambda x, weight: double(x, weight) * 1.2),
    "not a number": Contender(operation=lambda x, weight: double(x, weight) * torch.nan),
    "wrong gradient": Contender(operation=lambda x, weight: double(x, weight.detach())),
    "missing": "not installed",
    "forward only": Contender(operation=torch.no_grad()(double), directions=(FORWARD,)),
    "apart": Contender(
        operation=lambda a, b: (a + b).sum(0), take=lambda i: {"a": i["x"] * i["weight"] / 2, "b": i["x"] * i["weight"] / 2}
    ),
}


def problem(**changes):
    inputs = {"x": torch.randn(5, 3), "weight": torch.randn(3)}
    values = {"title": "double |", "inputs": inputs, "contenders": CONTENDERS, "amount": 1, "unit": "rows"}
    return Problem(**(values | {"costs": {direction: Cost(num_bytes=1) for direction in (FORWARD, BACKWARD)}} | changes))


def enter(given, direction):
    group = given.enter(direction, set(given.contenders))
    return group.lanes, group.absent


def test_contenders_that_give_something_else_are_absent_for_that_reason():
    lanes, absent = enter(problem(), FORWARD)
    assert [lane.name for lane in lanes] == [OURS, EAGER, "wrong gradient", "forward only", "apart"]
    assert absent["wrong"] == "ValueError: result 0 is 0.2 from eager's, relatively"
    assert "nan" in absent["not a number"]
    assert absent["missing"] == "not installed"


def test_gradients_are_compared_as_well():
    lanes, absent = enter(problem(), BACKWARD)
    assert [lane.name for lane in lanes] == [OURS, EAGER, "apart"]
    assert set(absent) == {"wrong", "not a number", "wrong gradient", "missing"}


def test_the_backward_is_of_one_graph_with_the_same_upstream_for_all():
    inputs = problem().inputs
    run, other = (run_of(Contender(operation=double), inputs, BACKWARD) for _ in range(2))
    first, again, others = run(), run(), other()
    for a, b, c in zip(first, again, others, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert [tensor.shape for tensor in first] == [(5, 3), (3,)]
    assert not any(tensor.requires_grad for tensor in inputs.values())


def test_steps_change_what_a_contender_took_and_nobody_elses():
    def step(x):
        x += 1

    clone = Contender(operation=step, take=lambda inputs: {"x": inputs["x"].clone()})
    given = problem(inputs={"x": torch.zeros(3)}, contenders={OURS: clone, EAGER: clone})
    lanes, absent = enter(given, STEP)
    assert (len(lanes), absent) == (2, {})
    assert not given.inputs["x"].any()


def test_ours_is_absent_when_it_cannot_run():
    lanes, absent = enter(problem(contenders=CONTENDERS | {OURS: Contender(operation=lambda x: x)}), FORWARD)
    assert OURS not in [lane.name for lane in lanes]
    assert "TypeError" in absent[OURS]


def test_nearness_is_relative_and_a_nan_is_not_near():
    one = torch.ones(4)
    assert_near((one * 1.04,), (one,))
    for wrong in (one * 1.06, one * torch.nan, -one):
        with pytest.raises(ValueError, match="from eager's"):
            assert_near((wrong,), (one,))
    for others in ((one, one), (one[:2],)):
        with pytest.raises(ValueError, match="shapes"):
            assert_near(others, (one,))


def test_a_peer_is_alike_unless_it_says_otherwise():
    assert CONTENDERS[OURS].alike
    assert not replace(CONTENDERS[OURS], alike=False).alike


def test_only_those_who_were_asked_for_take_part_or_are_missed():
    group = problem().enter(FORWARD, {OURS, "apart"})
    assert [lane.name for lane in group.lanes] == [OURS, "apart"]
    assert group.absent == {}
    assert group.title == "double forward"
    assert problem().enter(BACKWARD, set()).lanes == []


def test_ours_is_absent_where_it_is_not_right_and_is_checked_once():
    checks = []

    def check():
        checks.append(0)
        raise AssertionError("error 0.3")

    given = problem(check=check)
    for direction in (FORWARD, BACKWARD):
        assert enter(given, direction)[1][OURS] == "AssertionError: error 0.3"
    assert len(checks) == 1


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, STEP])
def test_a_contender_is_called_within_what_it_asks_for(direction):
    inside, seen = [False], []

    @contextmanager
    def within():
        inside[0] = True
        yield
        inside[0] = False

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(inside[0])
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(inside[0])
            return 2 * grad

    run = run_of(
        Contender(operation=lambda x, weight: Double.apply(x), within=within), problem().inputs | {"weight": torch.ones(3).int()}, direction
    )
    run()
    assert not inside[0]
    assert seen == [True] * (2 if direction == BACKWARD else 1)


def test_rows_are_portable_within_and_as_before_afterwards():
    def backend():
        return lookup.pick("attention_short_forward", 90, torch.bfloat16, tokens=197, features=64).backend

    with portable_rows():
        assert backend() == "triton"
        assert lookup.pick("attention_short_forward", 90, torch.bfloat16, tokens=197, features=64, portable=False).backend == "triton"
    assert backend() == "hopper"


def test_what_is_not_judged_may_give_something_else():
    found = problem(contenders=CONTENDERS | {"product alone": replace(CONTENDERS["wrong"], judged=False)})
    lanes, absent = enter(found, FORWARD)
    assert "product alone" in [lane.name for lane in lanes]
    assert "wrong" in absent
