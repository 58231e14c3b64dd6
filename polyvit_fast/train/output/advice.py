"""What would help when the device waits for data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from polyvit_fast.config import Train
from polyvit_fast.data.device import GpuDecoder
from polyvit_fast.data.stream import Loader
from polyvit_fast.data.threads import count_cores
from polyvit_fast.train.output.bars import Row

WORTH_A_WORD = 0.2
"""The fraction of a task's time: without the wait it would be a quarter faster. Less than that is within what one interval differs from
the next.
"""
MIN_SECONDS = 1.0
"""A shorter wait in an interval says nothing: the whole run may take no longer."""
HARDLY_WAITS = 0.05


class WaitAdvisor:
    """Says once for each task of a start of a run that the device waits for its data, and what would help."""

    def __init__(self) -> None:
        self.is_first, self.advised = True, set[str]()

    def advise(self, rows: Mapping[str, Row], config: Train, loaders: Mapping[str, Loader], num_processes: int) -> Iterator[str]:
        """The sentences about an interval of the log; `num_processes` of the run divide the cores of this machine.

        There are none about the first interval, in which decoders are built and nothing was decoded ahead.
        """
        if self.is_first:
            self.is_first = False
            return
        seconds = {name: row["steps"] * config.tasks[name].batch / row["examples_per_second"] for name, row in rows.items()}
        waits = {name: row["data_wait_ratio"] * seconds[name] for name, row in rows.items()}
        for name, row in rows.items():
            if row["data_wait_ratio"] > WORTH_A_WORD and waits[name] > MIN_SECONDS and name not in self.advised:
                self.advised.add(name)
                others = sum(waits.values()) - waits[name], sum(seconds.values()) - seconds[name]
                is_alone = others[1] > 0 and others[0] <= HARDLY_WAITS * others[1]
                cores = max(1, count_cores() // num_processes)
                remedies = describe_remedies(config, loaders[name], cores, is_alone=is_alone)
                yield f"the device waited {row['data_wait_ratio']:.0%} of {name}'s time for its data: {remedies}"


def describe_remedies(config: Train, loader: Loader, cores: int, *, is_alone: bool) -> str:
    """What is left to try in this run. `is_alone`: the device hardly waits for other tasks' data."""
    on_gpu, remedies = isinstance(loader.decoder, GpuDecoder), []
    if loader.num_threads < cores:
        remedies.append(f"raise --num-threads (now {loader.num_threads}; there are {cores} cores)")
    if config.device == "cuda" and not on_gpu and config.data.decoding == "cpu":
        remedies.append("let the GPU decode (--decoding auto)")
    if is_alone:
        remedies.append(f"raise --prefetch (now {config.data.prefetch}), so that it is decoded during the steps of the other tasks")
    slow = "store its files nearer to the size that the model sees, on a faster disk if that is what is slow, or train a larger model"
    if not remedies:
        where = "the GPU decodes" if on_gpu else f"{loader.num_threads} threads decode on {cores} core{'s' * (cores > 1)}"
        return f"{where} already, so {slow}"
    return f"{', or '.join(remedies)}. Where that does not help, {slow}"
