import time

import pytest
import torch

from polyvit_fast.train.clock import Clock


@pytest.fixture
def sleep(monkeypatch):
    """Lets time pass on a clock of its own: a machine's stands still for nobody."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_waiting_and_computing_are_told_apart_by_task(sleep):
    clock = Clock(torch.device("cpu"))
    for task, waiting, computing in (("a", 0.02, 0.05), ("b", 0.0, 0.03), ("a", 0.01, 0.0)):
        sleep(waiting)
        clock.mark_data_ready()
        sleep(computing)
        clock.end(task)
    times = clock.add_up(clock.lap(), ("a", "b", "c"))
    assert times["a"].waited == pytest.approx(0.03)
    assert times["a"].seconds == pytest.approx(0.08)
    assert times["b"].waited == pytest.approx(0.0)
    assert times["b"].seconds == pytest.approx(0.03)
    assert times["c"].seconds == 0


def test_a_lap_begins_where_the_last_one_ended_and_a_restart_leaves_a_gap_out(sleep):
    clock = Clock(torch.device("cpu"))
    clock.mark_data_ready()
    clock.end("a")
    assert len(clock.lap()) == 1
    sleep(0.05)
    clock.restart()
    clock.mark_data_ready()
    clock.end("a")
    [span] = clock.lap()
    assert clock.add_up([span], ["a"])["a"].seconds == 0
    assert clock.lap() == []
