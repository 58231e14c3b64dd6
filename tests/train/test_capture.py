"""What can be told without a GPU; test_captured_gpu.py tells the rest."""

from dataclasses import replace

import torch
from tiny_runs import tiny_config

from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.capture import capture, recordings
from polyvit_fast.train.feed import Slots
from polyvit_fast.train.schedule import make_plan
from polyvit_fast.train.step import Step


def test_one_recording_for_each_task():
    plan = [("a",), ("b",), ("a",), ("c", "a")]
    assert recordings(plan, is_reduced=False) == [("a", True), ("b", True), ("c", True)]


def test_where_processes_sum_their_gradients_the_last_of_a_step_is_another_recording():
    assert recordings([("a", "b", "c")] * 3, is_reduced=True) == [("a", False), ("b", False), ("c", True)]
    assert recordings([("a", "b"), ("a",), ("b", "a")], is_reduced=True) == [("a", False), ("a", True), ("b", False), ("b", True)]


def test_recomputed_dropout_is_not_recorded_and_that_is_told():
    config = tiny_config(recompute=True)
    config = replace(config, model=replace(config.model, dropout=0.1))
    step, said = Step(PolyViT.from_config(config), config), []
    slots = Slots(config, dict.fromkeys(config.tasks, torch.float32), torch.device("cpu"))
    assert capture(step, slots, make_plan(config), said.append) is step
    assert len(said) == 1
    assert "recompute = True with dropout" in said[0]
