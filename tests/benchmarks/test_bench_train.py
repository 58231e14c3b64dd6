"""What a run's metrics.jsonl says about its speed."""

import bench_train
import pytest
import torch
from bench_train import FILES, MADE, Made, Speed, config_of, read_speeds

from polyvit_fast.experiments import demo
from polyvit_fast.model.cost import forward_flops


def line(step, **tasks):
    rows = {name: {"steps": steps, "examples_per_second": rate, "data_wait_ratio": waited} for name, (steps, rate, waited) in tasks.items()}
    return {"kind": "train", "step": step, "tasks": rows}


def test_an_interval_s_speed_is_that_of_all_tasks_together_and_the_first_does_not_count(tmp_path):
    config = config_of(demo.config.tasks, MADE, tmp_path, tmp_path)
    lines = [line(5, tones=(5, 1.0, 1.0)), line(10, tones=(2, 320.0, 0.5), shapes=(3, 160.0, 0.0)), {"kind": "eval", "step": 10}]
    [found] = read_speeds(config, lines)
    # 32 examples in 0.1 s, half of it waiting, and 48 in 0.3 s.
    assert (found.examples, found.seconds, found.waited) == (80, pytest.approx(0.4), pytest.approx(0.05))
    tones, shapes = (forward_flops(config.model, config.tasks[name].modality, 6) for name in ("tones", "shapes"))
    assert found.flops == 3 * (32 * tones + 48 * shapes)
    assert (found + Speed(waited=0.35)).describe()["note"] == "waits for data 100.0% of the time"


def test_made_batches_are_the_same_memory_each_time(tmp_path):
    for name, dtype in (("shapes", torch.uint8), ("tones", torch.float32)):
        task = config_of(demo.config.tasks, MADE, tmp_path, tmp_path).tasks[name]
        decode = task.train.decoder(task, batch=4, train=True, num_threads=1)
        media = [sample.media for sample in task.train.samples(task)[:4]]
        first, again = decode(media, []), decode(media[:3], [])
        assert first.shape == (4, 1, *task.modality.grid)
        assert (first.dtype, again.data_ptr(), len(again)) == (dtype, first.data_ptr(), 3)


def test_runs_are_of_the_same_tasks_on_files_or_on_made_batches(tmp_path):
    for tasks in (demo.config.tasks, bench_train.large_tasks()):
        made, files = (config_of(tasks, data, tmp_path, tmp_path / "files") for data in (MADE, FILES))
        assert made.tasks.keys() == files.tasks.keys() >= set(bench_train.ALONE)
        assert all(isinstance(task.train, Made) for task in made.tasks.values())
        assert all(task.train.root == str(tmp_path / "files") for task in files.tasks.values())
