"""What a run is advised while the device waits for its data."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_runs import change, tile_task, tiny_config

from polyvit_fast.config import Train
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import Loader
from polyvit_fast.train.loop import train
from polyvit_fast.train.output.advice import WaitAdvisor, describe_remedies


def row(ratio: float, seconds: float = 10.0) -> dict[str, float]:
    """Of ten steps with batches of eight."""
    return {"steps": 10, "examples_per_second": 80 / seconds, "data_wait_ratio": ratio}


def advise(config: Train, *intervals: dict[str, dict[str, float]]) -> list[str]:
    advisor = WaitAdvisor()
    loaders = {name: Loader(name, config, train=True) for name in config.tasks}
    return [text for rows in intervals for text in advisor.advise(rows, config, loaders, 1)]


def test_each_task_is_spoken_of_once_and_not_after_the_first_interval(config):
    first, later = {"a": row(0.9), "b": row(0.9)}, {"a": row(0.43), "b": row(0.19)}
    assert advise(config, first) == []
    [text] = advise(config, first, later, later)
    assert text.startswith("the device waited 43% of a's time for its data: ")
    assert len(advise(config, first, later, first, later)) == 2


def test_a_short_wait_is_not_worth_a_word(config):
    assert advise(config, {}, {"a": row(0.5, seconds=1.9)}) == []
    assert len(advise(config, {}, {"a": row(0.5, seconds=2.1)})) == 1


def test_prefetching_helps_where_other_tasks_leave_time(config):
    [alone] = advise(config, {}, {"a": row(0.5), "b": row(0.01)})
    assert "raise --prefetch (now 4), so that it is decoded during the steps of the other tasks" in alone
    both = advise(config, {}, {"a": row(0.5), "b": row(0.5)})
    assert not [text for text in both if "--prefetch" in text]
    assert not [text for text in advise(config, {}, {"a": row(0.5)}) if "--prefetch" in text]


def test_threads_are_advised_up_to_the_cores(config):
    loader = Loader("a", change(config, num_threads=2), train=True)
    few = describe_remedies(config, loader, 16, is_alone=False)
    assert few.startswith("raise --num-threads (now 2; there are 16 cores). Where that does not help, store its files nearer to the size")
    all_used = describe_remedies(config, loader, 2, is_alone=False)
    assert all_used.startswith("2 threads decode on 2 cores already, so store its files nearer")
    assert "--num-threads" not in all_used


def test_the_gpu_is_advised_where_there_is_one_that_does_not_decode(config):
    loader = Loader("a", config, train=True)
    on_gpu = change(replace(config, device="cuda"), decoding="cpu")
    assert "let the GPU decode (--decoding auto)" in describe_remedies(on_gpu, loader, 2, is_alone=False)
    assert "--decoding" not in describe_remedies(replace(config, device="cuda"), loader, 2, is_alone=False)


@dataclass(frozen=True, kw_only=True)
class Slow(Synthetic):
    """Samples that take their time."""

    def decoder(self, task, **options):
        decode = super().decoder(task, **options)

        def decode_late(media, rngs):
            time.sleep(0.3)
            return decode(media, rngs)

        return decode_late


def test_a_run_whose_data_are_slow_says_so_once(tmp_path: Path):
    config = tiny_config(tasks={"a": tile_task(steps=20, train=Slow(num_samples=50))}, out=str(tmp_path))
    train(config, "test", ["test"])
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "the device waited" in line]
    assert len(lines) == 1
    assert "--num-threads" in lines[0] or "threads decode on" in lines[0]
