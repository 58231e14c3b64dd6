"""The bounds see what is planted, and the kernels of a training step keep to theirs."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from compare import DEVICE
from long_forms import mark_long
from triton.runtime.errors import InterpreterError

from polyvit_fast.experiments.demo import config as demo
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.feed import InputBuffers
from polyvit_fast.train.step import Step

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the bounds are the interpreter's")


@triton.jit
def copy_kernel(p_x, p_y, first, size, BLOCK: tl.constexpr):
    i_block = first + tl.arange(0, BLOCK)
    tl.store(p_y + i_block, tl.load(p_x + i_block, i_block < size), i_block < size)


@triton.jit
def read_all_kernel(p_x, p_y, BLOCK: tl.constexpr):
    tl.store(p_y, tl.sum(tl.load(p_x + tl.arange(0, BLOCK))))


def test_what_a_mask_keeps_out_is_not_looked_at(bounds):
    x, y = torch.arange(5.0), torch.zeros(5)
    copy_kernel[(1,)](x, y, 0, 5, BLOCK=8)
    assert torch.equal(x, y)
    assert bounds.num_checked == {"copy_kernel": 10}


@pytest.mark.parametrize(("first", "size"), [(0, 6), (-1, 5), (1 << 29, 1 << 30)])
@pytest.mark.parametrize("short", ["x", "y"])
def test_an_element_beside_a_tensor(first, size, short, bounds):
    buffer = torch.arange(20.0)  # in which there is something on both sides
    x, y = buffer[4:9], torch.zeros(40)[10:30]
    if short == "y":
        x, y = y, x
    with pytest.raises(InterpreterError, match=r"OutOfBoundsError.*copy_kernel"):
        copy_kernel[(1,)](x, y, first, size, BLOCK=8)
    assert torch.equal(buffer, torch.arange(20.0))


def test_a_neighbour_in_the_same_buffer_is_not_ones_own(bounds):
    x, y = torch.zeros(8).split(4)
    with pytest.raises(InterpreterError, match="OutOfBoundsError"):
        read_all_kernel[(1,)](x, y, BLOCK=8)


def test_strides_count(bounds):
    columns = torch.arange(12.0).view(4, 3)[:, 0]  # the last element is the tenth of memory
    total = torch.zeros(1)
    read_all_kernel[(1,)](columns, total, BLOCK=8)
    assert total == sum(range(8))
    with pytest.raises(InterpreterError, match=r"6 elements.*at byte 40 of the 40"):
        read_all_kernel[(1,)](columns, total, BLOCK=16)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize(("name", "batch"), mark_long([("shapes", 2), ("shapes", 5), ("motion", 3), ("chords", 3)], [("shapes", 2)]))
def test_a_step_of_the_demo(name, batch, bounds):
    config = replace(demo, tasks={name: replace(demo.tasks[name], batch=batch)}, model=replace(demo.model, depth=2), device="cpu")
    step = Step(PolyViT.from_config(config).train(), config)
    inputs = InputBuffers(config, {name: torch.float32 if name == "chords" else torch.uint8}, torch.device("cpu")).view(name, 0)
    step.begin((name,), 0.1, 0)
    step.forward_backward(name, inputs)
    step.update()
    assert bounds.num_checked.keys() == {
        *(f"{name}_{direction}_kernel" for name in ("patch_embed", "layer_norm", "attention_short") for direction in ("fwd", "bwd")),
        *("layer_norm_bwd_kernel_parameters", "linear_add_fwd_kernel", "linear_gelu_fwd_kernel"),
        *("dgelu_bwd_kernel", "dgelu_bwd_kernel_sums", "adamw_update_kernel"),
    }
