"""Turns, laps and contenders that fall out."""

import time

from race import WARM_UP_CALLS, Lane, race, time_on_cpu, told


def record(order, name):
    return lambda: order.append(name)


def test_contenders_take_turns_and_each_round_begins_with_another():
    order = []
    lanes = [Lane(name=name, run=record(order, name)) for name in "abc"]
    race(lanes, time_on_cpu, rounds=3, calls=2)
    assert "".join(order) == "aaabbbccc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(lane.seconds) for lane in lanes] == [6, 6, 6]
    assert WARM_UP_CALLS == 3


def test_a_contender_that_raises_leaves_the_race_and_the_others_go_on():
    calls = []

    def fail_later():
        calls.append(0)
        if len(calls) > WARM_UP_CALLS + 1:
            raise RuntimeError("out of memory\nwith details")

    lanes = [Lane(name="fails", run=fail_later), Lane(name="stays", run=lambda: None)]
    race(lanes, time_on_cpu, rounds=4, calls=1)
    assert lanes[0].error == "RuntimeError: out of memory"
    assert len(calls) == WARM_UP_CALLS + 2
    assert (lanes[1].error, len(lanes[1].seconds)) == ("", 4)


def test_without_time_the_first_round_is_the_last():
    lanes = [Lane(name=name, run=lambda: None) for name in "ab"]
    left = iter([True, False])
    race(lanes, time_on_cpu, rounds=5, calls=3, has_time=lambda: next(left))
    assert [len(lane.seconds) for lane in lanes] == [6, 6]
    race(lanes, time_on_cpu, rounds=5, calls=3, has_time=lambda: False)
    assert [len(lane.seconds) for lane in lanes] == [9, 9]


def test_nobody_may_race():
    race([], time_on_cpu, rounds=2, calls=1)


def test_a_call_is_timed_alone():
    lane = Lane(name="sleeps", run=lambda: time.sleep(0.02))
    assert all(0.02 <= seconds < 0.5 for seconds in time_on_cpu(lane, 3))


def test_an_error_is_told_in_a_line():
    assert told(ValueError("a\nb")) == "ValueError: a"
    assert len(told(ValueError("long " * 100))) < 200
