"""What `test_loop.py` does not tell of a run: its ledger of time."""

import time

import pytest
import torch

from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.clock import Clock, TaskTime
from polyvit_fast.train.distributed import World
from polyvit_fast.train.log import PeerLog
from polyvit_fast.train.run import Run
from polyvit_fast.train.schedule import make_plan
from polyvit_fast.train.step import Step


@pytest.fixture
def run(config):
    step = Step(PolyViT.from_config(config), config)
    times = {name: TaskTime() for name in config.tasks}
    run = Run(config, make_plan(config), World(), step, {}, {}, PeerLog(1), Clock(torch.device("cpu")), interval_times=times)
    run.seconds = dict.fromkeys(config.tasks, 0.0)
    return run


def test_time_is_counted_for_the_interval_and_for_the_whole_run(run, monkeypatch):
    now = [run.clock.last]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(2):
        for name, seconds in (("a", 0.01), ("b", 0.02)):
            now[0] += seconds
            run.clock.data_is_there()
            run.clock.end(name)
        run.count_time(run.clock.lap())
        if run.seconds["a"] < 0.015:
            run.interval_times["a"].seconds = run.interval_times["a"].waited = 0.0
    assert run.seconds["a"] == pytest.approx(0.02)
    assert run.seconds["b"] == pytest.approx(0.04)
    assert run.interval_times["a"].seconds == pytest.approx(0.01)
    assert run.interval_times["b"].waited == run.interval_times["b"].seconds
