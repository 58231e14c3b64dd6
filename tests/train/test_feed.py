import pytest
import torch
from capturable import META, check_capturable
from tiny_runs import tile_task, tiny_config

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.stream import Batch, Loader
from polyvit_fast.train.feed import ALIGNMENT, InputBuffers, Inputs, copy_batch, drop_repeats

CPU = torch.device("cpu")


def build_buffers(config, processes=1, device=CPU, **dtypes):
    return InputBuffers(config, {name: dtypes.get(name, torch.float32) for name in config.tasks}, device, processes)


def test_a_batch_arrives_whole_in_either_buffer(config):
    buffers = build_buffers(config)
    for index in (0, 1):
        for name in config.tasks:
            batch, inputs = Loader(name, config, train=True).load(index), buffers.view(name, index)
            copy_batch(Batch(batch.grid, batch.labels, 0.25, (1, 2, 3, 4 + index)), inputs)
            again = buffers.view(name, index)
            assert torch.equal(again.grid, batch.grid)
            assert torch.equal(again.labels, batch.labels)
            assert (again.mixup_ratio.item(), again.index) == (0.25, index)
            assert again.cutmix_box.tolist() == [1, 2, 3, 4 + index]


def test_buffers_are_as_large_as_the_largest_batch_and_apart(config):
    config = tiny_config(tasks={"small": tile_task(batch=2), "large": tile_task(batch=40, loss="sigmoid", multi_label=True)})
    buffers = build_buffers(config, small=torch.uint8)
    assert len(buffers.buffers[0]) == 40 * 16 * 16 * 3 * 4 + 40 * 3 * 4
    assert buffers.view("small", 0).grid.dtype == torch.uint8
    assert buffers.view("large", 1).labels.storage_offset() * 4 % ALIGNMENT == 0
    buffers.view("large", 0).grid.fill_(1.0)
    assert not buffers.view("large", 1).grid.any()
    assert not buffers.view("large", 0).labels.any()


def test_processes_divide_a_batch(config):
    inputs = build_buffers(config, processes=4).view("a", 0)
    assert inputs.grid.shape[0] == inputs.labels.shape[0] == 2


def test_channels_without_memory_do_not_travel():
    grid = torch.arange(6.0).view(2, 1, 3, 1, 1).expand(2, 1, 3, 1, 3)
    assert torch.equal(drop_repeats(grid), grid[..., :1])
    audio = Audio(clip_seconds=0.16, num_mel_bins=16, eval_clips=1)
    config = tiny_config(tasks={"a": tile_task(modality=audio, batch=2)})
    inputs = build_buffers(config).view("a", 0)
    narrow = torch.rand(2, 1, 16, 16, 1)
    copy_batch(Batch(narrow, torch.tensor([0, 1])), inputs)
    assert torch.equal(inputs.grid, narrow.expand(2, 1, 16, 16, 3))


@pytest.mark.parametrize(
    "batch",
    [
        Batch(torch.zeros(8, 1, 16, 16, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)),
        Batch(torch.zeros(4, 1, 16, 16, 3), torch.zeros(4, dtype=torch.int64)),
        Batch(torch.zeros(8, 1, 16, 16, 3), torch.zeros(8, 3)),
        Batch(torch.zeros(8, 1, 8, 16, 3), torch.zeros(8, dtype=torch.int64)),
    ],
    ids=["dtype", "batch", "labels", "rows"],
)
def test_a_batch_of_another_form_is_refused(config, batch):
    with pytest.raises(ValueError, match=r"a batch of torch.* came where torch.float32 \[8, 1, 16, 16, 3\] was expected"):
        copy_batch(batch, build_buffers(config).view("a", 0))


def test_on_a_cpu_a_batch_is_taken_where_it_is(config):
    batch = Loader("a", config, train=True).load(0)
    inputs = Inputs.from_batch(batch)
    assert inputs.grid.data_ptr() == batch.grid.data_ptr()
    assert inputs.mixup_ratio.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_copied_without_waiting_for_the_device(config, channels):
    inputs = build_buffers(config, device=META).view("a", 0)
    batch = Batch(torch.zeros(8, 1, 16, 16, channels), torch.zeros(8, dtype=torch.int64), 0.25, (1, 2, 3, 4))
    with check_capturable(feeds=True):
        copy_batch(batch, inputs)
