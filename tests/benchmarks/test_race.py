"""Turns, laps and contenders that fall out; who takes part when, and what is remembered."""

import time

from race import ALL, COMPILED, FIRST, WARM_UP_CALLS, Group, Lane, Track, choose, race, time_on_cpu, told


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


def test_nobody_may_race():
    race([], time_on_cpu, rounds=2, calls=1)


def test_a_call_is_timed_alone():
    lane = Lane(name="sleeps", run=lambda: time.sleep(0.02))
    assert all(0.02 <= seconds < 0.5 for seconds in time_on_cpu(lane, 3))


def test_an_error_is_told_in_a_line():
    assert told(ValueError("a\nb")) == "ValueError: a"
    assert len(told(ValueError("long " * 100))) < 200


CONTENDERS = {"ours": 1, "timm": 1, "timm torch.compile": 1, "timm reduce-overhead": "left out", "torch.compile max-autotune": 1}


def test_compilers_come_after_all_others_and_against_ours():
    assert choose(CONTENDERS, FIRST) == {"ours", "timm", "timm reduce-overhead"}  # the last to be told why it is absent
    assert choose(CONTENDERS, COMPILED) == {"ours", "timm torch.compile", "torch.compile max-autotune"}
    assert choose(CONTENDERS, ALL) == set(CONTENDERS)
    absent = {name: "left out" if name not in ("ours", "timm") else 1 for name in CONTENDERS}
    assert choose(absent, COMPILED) == set()  # nobody is there to race ours


class Rivals:
    def __init__(self, number):
        self.contenders = {"ours": number, "torch.compile": number}

    def enter(self, direction, names):
        lanes = [Lane(name=name, run=lambda: None) for name in sorted(names)]
        absent = {"torch.compile": "is wrong"} if direction == "backward" else {}
        return Group(
            title=f"{direction} {self.contenders['ours']}",
            lanes=lanes,
            absent=absent,
            watch=time_on_cpu,
            info=lambda lane: {"of": lane.name},
        )


def test_a_group_is_raced_once_and_both_directions_have_the_same_tensors():
    built = []

    def build(number):
        built.append(number)
        return Rivals(number)

    track = Track(rounds=2, calls=3, phase=ALL)
    first, again, back, other = (
        track.raced(*question) for question in (("forward", build, 1), ("forward", build, 1), ("backward", build, 1), ("forward", build, 2))
    )
    assert first is again
    assert built == [1, 2]
    assert (first.title, other.title) == ("forward 1", "forward 2")
    assert {name: len(seconds) for name, seconds in first.seconds.items()} == {"ours": 6, "torch.compile": 6}
    assert {name: first.infos["ours"][name] for name in ("contender", "of", "race", "absent")} == {
        "contender": "ours", "of": "ours", "race": ALL, "absent": {},
    }  # fmt: skip
    assert list(back.seconds) == ["ours"]
    assert back.infos["ours"]["absent"] == back.absent == {"torch.compile": "is wrong"}


def test_a_track_of_first_contenders_asks_for_no_other():
    assert list(Track(rounds=1, calls=1, phase=FIRST).raced("forward", Rivals, 1).seconds) == ["ours"]


def test_what_cannot_be_built_is_tried_once_and_says_why():
    tries = []

    def broken():
        tries.append(0)
        raise RuntimeError("no memory\nmore")

    track = Track(rounds=1, calls=1, phase=ALL)
    for _ in range(2):
        found = track.raced("step", broken)
        assert (found.failure, found.seconds) == ("RuntimeError: no memory", {})
    assert len(tries) == 1
