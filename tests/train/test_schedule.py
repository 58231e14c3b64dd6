import math
from collections import Counter
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import tile_task, tiny_config

from polyvit_fast import experiments
from polyvit_fast.config import Optim
from polyvit_fast.train.schedule import SCHEDULES, LearningRates, check_warmup, compute_warmup_steps, count_steps, make_step_plan

STEPS = {"a": 7, "b": 20, "c": 4}


def three_tasks(schedule, **changes):
    tasks = {name: tile_task(steps=steps, lr_scale=scale) for (name, steps), scale in zip(STEPS.items(), (1, 0.5, 0.1), strict=True)}
    return tiny_config(tasks=tasks, schedule=schedule, **changes)


@pytest.mark.parametrize(
    ("schedule", "length", "counts"),
    [
        ("task-by-task", 31, STEPS),
        ("alternating", 31, {"a": 11, "b": 10, "c": 10}),
        ("uniform", 31, {"a": 11, "b": 10, "c": 10}),
        ("weighted", 31, STEPS),
        ("accumulating", 10, {"a": 10, "b": 10, "c": 10}),
    ],
)
def test_exact_step_counts(schedule, length, counts):
    plan = make_step_plan(three_tasks(schedule))
    assert len(plan) == length
    assert count_steps(plan) == counts


def test_the_five_schedules_of_the_paper_are_there():
    assert list(SCHEDULES) == ["task-by-task", "alternating", "uniform", "weighted", "accumulating"]


def test_task_by_task_is_one_block_a_task():
    blocks = [(names, len(list(steps))) for names, steps in groupby(make_step_plan(three_tasks("task-by-task")))]
    assert sorted(blocks) == [(("a",), 7), (("b",), 20), (("c",), 4)]
    orders = {tuple(names for names, _ in groupby(make_step_plan(three_tasks("task-by-task", seed=seed)))) for seed in range(20)}
    assert len(orders) == 6


def test_alternating_takes_turns():
    assert make_step_plan(three_tasks("alternating"))[:4] == [("a",), ("b",), ("c",), ("a",)]


@pytest.mark.parametrize("schedule", ["uniform", "weighted"])
def test_permuted_schedules_follow_the_seed(schedule):
    plans = [make_step_plan(three_tasks(schedule, seed=seed)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert Counter(plans[0]) == Counter(plans[2])


def test_accumulating_takes_all_tasks_at_once():
    assert set(make_step_plan(three_tasks("accumulating"))) == {("a", "b", "c")}


def test_any_function_is_a_schedule():
    config = three_tasks(lambda config: [("a",), ("a", "c")])
    assert make_step_plan(config) == [("a",), ("a", "c")]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("weigthed", "schedule = 'weigthed' is unknown; perhaps you meant weighted"),
        (lambda config: [("a",), ("x",)], r"step 1 is \('x',\); it must name tasks among a, b, c"),
        (lambda config: [("a",), "b"], "step 1 is 'b'; .* as a tuple"),
        (lambda config: [("a",), ["b"]], r"step 1 is \['b'\]; .* as a tuple"),
        (lambda config: [("a",), ()], r"step 1 is \(\)"),
        (lambda config: [], "plans no step"),
    ],
)
def test_wrong_schedules_are_told(schedule, message):
    with pytest.raises(ValueError, match=message):
        make_step_plan(three_tasks(schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_plan_of_a_lengthened_run_begins_with_what_was_planned(schedule):
    first, config = {"a": 7, "b": 20, "c": 4}, three_tasks(schedule)
    longer = replace(config, tasks={name: replace(task, steps=2 * task.steps) for name, task in config.tasks.items()})
    plan, before = make_step_plan(longer, [first]), make_step_plan(config)
    assert plan[: len(before)] == before
    assert count_steps(plan) == {name: 2 * count for name, count in count_steps(before).items()}
    assert plan == make_step_plan(longer, [first])
    if schedule == "weighted":
        assert plan[len(before) :] != before
    longest = replace(longer, tasks=longer.tasks | {"c": replace(longer.tasks["c"], steps=28)})  # the others get no step more
    last = make_step_plan(longest, [first, {"a": 14, "b": 40, "c": 8}])[len(plan) :]
    assert len(last) == (6 if schedule == "accumulating" else 20)
    assert set(count_steps(last)) == ({"c"} if schedule in ("weighted", "task-by-task") else {"a", "b", "c"})


def test_a_function_plans_each_part_of_a_lengthened_run():
    seen = []

    def plan(config):
        seen.append(({name: task.steps for name, task in config.tasks.items()}, config.seed))
        return [("a",)] * config.tasks["a"].steps + [("b", "c")]

    config = three_tasks(plan, seed=3)
    assert make_step_plan(config, [{"a": 5, "b": 20, "c": 2}]) == [("a",)] * 5 + [("b", "c")] + [("a",)] * 2 + [("b", "c")]
    (first, seed), (second, other) = seen
    assert (first, second, seed) == ({"a": 5, "b": 20, "c": 2}, {"a": 2, "b": 0, "c": 2}, 3)
    assert other not in (3, seed)
    assert config.tasks["a"].steps == 7
    with pytest.raises(ValueError, match="plans no step; give the tasks more steps"):
        make_step_plan(three_tasks("accumulating"), [{"a": 7, "b": 20, "c": 3}])


def rates(config):
    plan = make_step_plan(config)
    return list(LearningRates(config, plan))


def test_learning_rate_follows_the_specification():
    config = tiny_config(tasks={"a": tile_task(steps=1000)})
    config = replace(config, optim=replace(config.optim, lr=2.0, warmup_steps=100))
    rate = rates(config)
    assert rate[0] == 2.0 / 100
    assert rate[49] == pytest.approx(1.0)
    assert rate[99] == rate[100] == 2.0
    assert rate[550] == pytest.approx(1.0)
    assert 0 < rate[999] < 1e-4  # scenic's cosine restarts here, at the full rate
    assert rate[300] == pytest.approx(2 * 0.5 * (1 + math.cos(math.pi * 200 / 900)))


@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda config: [("a",), ("a", "c")] * 50], ids=[*SCHEDULES, "own"])
def test_every_schedule_has_the_same_share_of_warmup_and_no_step_without_a_rate(schedule):
    tasks = {name: tile_task(steps=steps) for name, steps in (("a", 300), ("b", 500), ("c", 200))}
    config = tiny_config(tasks=tasks, schedule=schedule, optim=Optim(lr=2.0, warmup_steps=100))
    rate = rates(config)
    total, rising = len(rate), sum(later > earlier for earlier, later in pairwise(rate))
    assert rising == pytest.approx(0.1 * total, abs=1.5)
    assert max(rate) == pytest.approx(2.0, rel=1e-3)
    assert rate[0] == pytest.approx(2.0 / (0.1 * total))
    assert rate[-1] == pytest.approx(2.0 * math.sin(math.pi / 2 / (0.9 * total)) ** 2)
    assert compute_warmup_steps(config, total) == pytest.approx(0.1 * total)
    assert check_warmup(config, total) is None


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_rate_of_the_papers_nine_tasks_decays_in_every_schedule(schedule):
    """The accumulating schedule has 46,435 updates, fewer than the 47,330 steps of warm-up that the 417,920 of the others have."""
    config = replace(experiments.load("polyvit_b16"), schedule=schedule)
    plan = make_step_plan(config)
    marks = {at: LearningRates(config, plan)[int(at * len(plan))] for at in (0.05, 0.9)}
    scales = {at: sum(config.tasks[n].lr_scale for n in plan[int(at * len(plan))]) / len(plan[0]) for at in marks}
    warmup = 47_330 / 417_920
    assert marks[0.05] == pytest.approx(scales[0.05] * 0.05 / warmup, rel=1e-3)
    assert marks[0.9] == pytest.approx(scales[0.9] * 0.5 * (1 + math.cos(math.pi * (0.9 - warmup) / (1 - warmup))), rel=1e-3)
    assert check_warmup(config, len(plan)) is None


def test_a_warmup_of_the_whole_run_is_told():
    config = three_tasks("accumulating", optim=Optim(warmup_steps=31))
    assert check_warmup(config, 10) == "The warm-up of 10 steps does not end within the run of 10: lower --optim.warmup-steps."
    assert check_warmup(replace(config, optim=Optim(warmup_steps=30)), 10) is None


def test_learning_rate_is_scaled_by_the_task():
    config = three_tasks("alternating")
    rate = rates(replace(config, optim=replace(config.optim, lr=1.0)))
    assert rate[1] / rate[0] == pytest.approx(0.5, rel=0.01)
    shared = three_tasks("accumulating")
    assert rates(replace(shared, optim=replace(shared.optim, lr=1.0)))[0] == pytest.approx(1.6 / 3)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_plan_of_many_steps_holds_each_different_step_once(schedule):
    plan = make_step_plan(three_tasks(schedule))
    assert len({id(names) for names in plan}) == len(set(plan))


def test_plans_are_the_same_for_ever():
    tasks = {name: tile_task(steps=steps) for name, steps in (("a", 3), ("b", 4), ("c", 2))}
    plans = {schedule: make_step_plan(tiny_config(tasks=tasks, schedule=schedule, seed=5)) for schedule in SCHEDULES}
    assert {schedule: " ".join("+".join(names) for names in plan) for schedule, plan in plans.items()} == {
        "task-by-task": "b b b b a a a c c",
        "alternating": "a b c a b c a b c",
        "uniform": "b b a c c a a c b",
        "weighted": "b b a c c a a b b",
        "accumulating": "a+b+c a+b+c a+b+c",
    }


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from(sorted(SCHEDULES)), st.integers(0, 99))
def test_every_plan_keeps_the_promised_counts(steps, schedule, seed):
    config = tiny_config(tasks={f"t{j}": tile_task(steps=u) for j, u in enumerate(steps)}, schedule=schedule, seed=seed)
    total, num_tasks = sum(steps), len(steps)
    if schedule == "accumulating" and total < num_tasks:
        return
    counts = count_steps(make_step_plan(config))
    if schedule in ("weighted", "task-by-task"):
        assert [counts[f"t{j}"] for j in range(num_tasks)] == steps
    elif schedule == "accumulating":
        assert set(counts.values()) == {total // num_tasks}
    else:
        assert sum(counts.values()) == total
        assert max(counts[name] for name in config.tasks) - min(counts[name] for name in config.tasks) <= 1


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize("schedule", ["task-by-task", "alternating", "uniform", "weighted"])
def test_a_task_s_own_schedule_runs_over_its_own_steps(schedule):
    """Whatever lies between them; the other tasks' rates are those of the run."""
    tasks = {
        "a": tile_task(steps=60),
        "b": tile_task(steps=40, lr_schedule="cosine", warmup_steps=10, lr_scale=0.5),
        "c": tile_task(steps=20),
    }
    tasks["c"] = replace(tasks["c"], lr_schedule="constant", warmup_steps=4)
    config = tiny_config(tasks=tasks, schedule=schedule, optim=Optim(lr=2.0, warmup_steps=24))
    plan, found = make_step_plan(config), rates(config)
    without = rates(replace(config, tasks={name: replace(task, lr_schedule="run", warmup_steps=0) for name, task in tasks.items()}))
    own = {name: [rate for rate, names in zip(found, plan, strict=True) if names == (name,)] for name in tasks}
    assert own["a"] == [rate for rate, names in zip(without, plan, strict=True) if names == ("a",)]
    num_b, num_c = len(own["b"]), len(own["c"])
    warmup = {"b": 10 * num_b / 40, "c": 4 * num_c / 20}  # the same fraction where the schedule gives another number of steps
    expected = [min(1, (k + 1) / warmup["b"]) * cosine(max(0, k - warmup["b"]) / (num_b - warmup["b"])) for k in range(num_b)]
    assert own["b"] == pytest.approx(expected, rel=1e-12)  # 0.5 of 2.0
    assert min(own["b"]) > 0
    assert own["c"] == pytest.approx([2 * min(1, (k + 1) / warmup["c"]) for k in range(num_c)], rel=1e-12)


def test_a_step_of_several_tasks_has_the_highest_of_their_rates_and_the_others_weigh_less():
    tasks = {"a": tile_task(steps=10), "b": tile_task(steps=10, lr_schedule="constant", warmup_steps=5, lr_scale=3.0)}
    config = tiny_config(tasks=tasks, schedule="accumulating", optim=Optim(lr=1.0, warmup_steps=4))
    found = LearningRates(config, make_step_plan(config))
    run = [min(1, (k + 1) / 2) * cosine(max(0, k - 2) / 8) for k in range(10)]
    own = [min(1, (k + 1) / 5) for k in range(10)]
    for step, (a, b) in enumerate(zip(run, own, strict=True)):
        assert found[step] == pytest.approx(2 * max(a, b))  # 2: the mean of both lr_scale
        assert found.weigh(step) == pytest.approx((a / max(a, b), b / max(a, b)))
    assert found.weigh(0) == (1.0, pytest.approx(0.4))
    assert found.weigh(9) == (pytest.approx(run[9]), 1.0)


def test_without_own_schedules_all_tasks_of_a_step_weigh_the_same():
    config = three_tasks("accumulating", optim=Optim(warmup_steps=3))
    found = LearningRates(config, make_step_plan(config))
    assert {found.weigh(step) for step in range(len(found))} == {(1.0, 1.0, 1.0)}
    single = three_tasks("weighted")
    single = replace(single, tasks=single.tasks | {"a": replace(single.tasks["a"], lr_schedule="cosine")})
    assert LearningRates(single, make_step_plan(single)).weigh(0) == (1.0,)


def test_the_run_s_warmup_does_not_matter_where_all_tasks_have_their_own():
    config = three_tasks("weighted", optim=Optim(warmup_steps=31))
    assert check_warmup(config, 31)
    own = {name: replace(task, lr_schedule="constant") for name, task in config.tasks.items()}
    assert check_warmup(replace(config, tasks=own), 31) is None
    assert set(rates(replace(config, tasks=own))) == {1.0, 0.5, 0.1}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda config: 1 / 0, r"schedule <lambda> failed: .*test_schedule.py, line \d+: ZeroDivisionError"),
        (lambda config: 3, "gave 3; it must give"),
    ],
)
def test_a_schedule_of_one_s_own_that_fails_says_where(own, message):
    with pytest.raises(ValueError, match=message):
        make_step_plan(tiny_config(schedule=own))
