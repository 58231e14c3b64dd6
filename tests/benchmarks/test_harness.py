"""Who takes part and in which order, what becomes of times, and what a candidate must give before it is timed."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from harness import (
    BACKWARD,
    EAGER,
    FORWARD,
    OURS,
    STEP,
    WARM_UP_CALLS,
    Candidate,
    Group,
    Problem,
    Row,
    Runner,
    append_rows,
    assert_near,
    bind,
    count_flops,
    format_rows,
    read_rows,
    time_on_host,
)
from pytest_benchmark.stats import Stats


class Benchmark:
    """As much of pytest-benchmark's fixture as a group uses, with its own statistics."""

    def __init__(self):
        self.extra_info, self.stats = {}, SimpleNamespace(stats=Stats())

    def pedantic(self, run, warmup_rounds):
        for _ in range(warmup_rounds + 1):
            run()
        self.stats.stats.update(1e9)


def group_of(runs, **changes):
    builders = {name: run if isinstance(run, str) else partial(Runner, run=run) for name, run in runs.items()}
    return Group(**({"title": "work", "amount": 2, "unit": "rows", "candidates": builders, "timer": time_on_host} | changes))


def enter_all(group):
    found = {name: Benchmark() for name in group.candidates}
    for name, benchmark in found.items():
        group.enter(name, benchmark)
    return found


def test_candidates_take_turns_and_each_round_begins_with_another():
    order = []
    group = group_of({name: partial(order.append, name) for name in "abc"})
    benchmarks = enter_all(group)
    rows = group.take_turns(rounds=3, calls=2)
    warm_up = "".join(name * (WARM_UP_CALLS + 1) for name in "abc")
    assert "".join(order) == warm_up + "aabbcc" + "bbccaa" + "ccaabb"
    # pytest-benchmark has the times of the turns, without the call that opened the entry.
    assert [row.seconds for row in rows] == [benchmark.stats.stats.data for benchmark in benchmarks.values()]
    assert all(len(row.seconds) == 6 and max(row.seconds) < 1e9 for row in rows)
    assert benchmarks["a"].extra_info["candidate"] == "a"
    assert rows[0].info["versions"]["torch"] == torch.__version__


def test_a_group_may_have_turns_of_its_own_and_no_warm_up():
    order = []
    group = group_of({name: partial(order.append, name) for name in "ab"}, turns=(2, 1))
    enter_all(group)
    group.take_turns(rounds=9, calls=9)
    assert "".join(order) == "ab" + "ab" + "ba"


@pytest.mark.parametrize("name", ["peer", OURS])
def test_a_candidate_that_raises_takes_no_further_turns_and_the_others_go_on(name):
    calls = []

    def fail_later():
        calls.append(0)
        if len(calls) > WARM_UP_CALLS + 2:
            raise RuntimeError("out of memory\nwith details")

    group = group_of({name: fail_later, "stays": lambda: None})
    benchmarks = enter_all(group)
    [row] = group.take_turns(rounds=4, calls=1)
    assert (row.candidate, len(row.seconds), len(calls)) == ("stays", 4, WARM_UP_CALLS + 3)
    assert benchmarks[name].extra_info["error"] == "RuntimeError: out of memory"
    assert (group.error is not None) == (name == OURS)


def double(x, weight):
    return (x * weight).sum(0)


WRONG = {
    "wrong": lambda x, weight: double(x, weight) * 1.2,
    "not a number": lambda x, weight: double(x, weight) * torch.nan,
    "wrong gradient": lambda x, weight: double(x, weight.detach()) + 0 * weight,
    "another shape": lambda x, weight: double(x, weight)[:2],
}


def problem(ours=double, **changes):
    candidates = {OURS: Candidate(operation=ours), EAGER: Candidate(operation=double), "missing": "not installed"}
    candidates |= {name: Candidate(operation=operation) for name, operation in WRONG.items()}
    candidates["less"] = Candidate(operation=torch.no_grad()(double), directions=(FORWARD,), comparable=False)
    inputs = {"x": torch.randn(5, 3), "weight": torch.randn(3)}
    values = {"title": "double", "inputs": inputs, "candidates": candidates, "amount": 1, "unit": "rows"}
    return Problem(**(values | {"num_bytes": {FORWARD: 1.0, BACKWARD: 1.0}} | changes))


@pytest.mark.parametrize(
    ("direction", "name", "reason"),
    [
        (FORWARD, "wrong", "result 0 is 0.2 from eager's"),
        (FORWARD, "not a number", "result 0 is nan"),
        (BACKWARD, "wrong gradient", "result 1 is 1 from eager's"),
        (FORWARD, "another shape", r"the results have the shapes \[\[2\]\], eager's \[\[3\]\]"),
        (FORWARD, "missing", "not installed"),
        (BACKWARD, "less", "has no backward"),
    ],
)
def test_a_peer_that_is_wrong_or_absent_is_refused_before_it_is_timed(direction, name, reason):
    group, benchmark = problem().group(direction), Benchmark()
    with pytest.raises(pytest.skip.Exception, match=reason):
        group.enter(name, benchmark)
    assert group.entries == benchmark.stats.stats.data == []


def test_ours_fails_where_it_is_wrong():
    for given in (problem(ours=WRONG["wrong"]), problem(check=lambda: pytest.fail("further from the truth than allowed"))):
        benchmark = Benchmark()
        with pytest.raises((ValueError, pytest.fail.Exception)):
            given.group(FORWARD).enter(OURS, benchmark)
        assert benchmark.stats.stats.data == []


def test_what_is_right_is_timed_each_way():
    for direction, names in ((FORWARD, (OURS, EAGER, "less", "wrong gradient")), (BACKWARD, (OURS, EAGER))):
        group = problem().group(direction)
        for name in names:
            group.enter(name, Benchmark())
        assert [row.candidate for row in group.take_turns(1, 1)] == list(names)


def test_the_backward_is_of_one_graph_with_the_same_upstream_for_all():
    inputs = problem().inputs
    run, other = (bind(Candidate(operation=double), inputs, BACKWARD) for _ in range(2))
    for a, b, c in zip(run(), run(), other(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not any(tensor.requires_grad for tensor in inputs.values())


def test_steps_change_what_a_candidate_took_and_no_other_s():
    def step(x):
        x += 1

    clone = Candidate(operation=step, take=lambda inputs: {"x": inputs["x"].clone()})
    given = problem(inputs={"x": torch.zeros(3)}, candidates={OURS: clone, EAGER: clone}, num_bytes={STEP: 1.0})
    group = given.group(STEP)
    enter_all(group)
    assert len(group.take_turns(1, 1)) == 2
    assert not given.inputs["x"].any()


def test_nearness_is_relative():
    one = torch.ones(4)
    assert_near(one * 1.04, one)
    with pytest.raises(ValueError, match="from eager's"):
        assert_near(-one, one)


def test_operations_are_counted_by_torch():
    assert count_flops(lambda: torch.randn(3, 5) @ torch.randn(5, 7)) == 2 * 3 * 5 * 7


def row(candidate, us, amount=1.0, **info):
    return Row(group="MLP, forward", candidate=candidate, amount=amount, unit="rows", seconds=[us / 1e6, 1.0, us / 2e6], info=info)


def test_rows_come_back_from_their_file_but_for_a_line_that_was_cut(tmp_path):
    rows = [row("ours", 48.0, tflops=100.0), row("eager", 72.0)]
    append_rows(tmp_path / "rows", rows[:1])
    append_rows(tmp_path / "rows", rows[1:])
    assert read_rows(tmp_path / "rows") == rows
    (tmp_path / "rows").write_text((tmp_path / "rows").read_text() + '{"group": "ML')
    assert read_rows(tmp_path / "rows") == rows
    assert read_rows(tmp_path / "nothing") == []


def test_a_table_has_ours_first_and_the_others_from_fast_to_slow():
    rows = [row("eager", 20_000.0), row("cuDNN", 72.0, mfu=0.5), row("ours", 48.0, of_floor=0.752, tflops=312.4, mfu=None)]
    title, *lines = format_rows(rows).splitlines()
    assert title == "MLP, forward"
    assert [line.split()[:3] for line in lines] == [["ours", "48.0", "us"], ["cuDNN", "72.0", "us"], ["eager", "20.0", "ms"]]
    assert lines[0].endswith("rows/s  312 TFLOP/s, 75% of the floor")
    assert lines[1].endswith("ours / it = 1.50, MFU 50.0%")
