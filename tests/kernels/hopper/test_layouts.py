"""Layouts of registers, and descriptors of a head's panels."""

import itertools
from functools import reduce
from operator import xor

import pytest
import torch
from samples import normal

from polyvit_kernels.hopper import layouts


def coordinates(bases):
    """The (row, column) of every index, as XORs of the bases whose bits it has."""
    for bits in itertools.product((0, 1), repeat=len(bases)):
        chosen = [base for bit, base in zip(bits, bases, strict=True) if bit]
        yield tuple(reduce(xor, (base[axis] for base in chosen), 0) for axis in range(2))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_a_stored_tile_has_every_element_once(width):
    layout = layouts.store_layout.fn(width)
    every = list(coordinates([*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]))
    assert sorted(every) == list(itertools.product(range(64), range(width)))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_four_neighbouring_threads_store_a_sector_of_32_bytes(width):
    layout = layouts.store_layout.fn(width)
    sector = sorted(coordinates([*layout.reg_bases[:2], *layout.lane_bases[:2]]))
    assert sector == [(0, column) for column in range(16)]


@pytest.mark.parametrize(
    ("head_dim", "widths"), [(16, (16, 0)), (48, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0))]
)
def test_panels_are_powers_of_two(head_dim, widths):
    assert layouts.panel_widths(head_dim) == widths


@pytest.mark.parametrize("head_dim", [8, 72, 112, 144])
def test_a_width_of_no_two_panels_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}"):
        layouts.panel_widths(head_dim)


def test_what_tma_can_address_stays_and_the_rest_is_copied():
    whole = normal(2 * 5 * 6 * 16 + 8).to(torch.bfloat16)
    there = whole[8:].view(2, 5, 3, 2, 16)
    assert layouts.tma_aligned(there) is there
    for other in (whole[4:-4].view(2, 5, 3, 2, 16), there[:, 1:], there.transpose(0, 1)):
        copy = layouts.tma_aligned(other)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, other)


def test_descriptors_are_of_panels_and_none_where_there_is_none():
    x = normal(2, 5, 3, 2, 80).to(torch.bfloat16)
    first, rest = layouts.descriptors(x, 80, 64)
    assert (first.block_shape, rest.block_shape) == ([1, 64, 64], [1, 64, 16])
    assert first.shape == [2, 5, 480]
    assert (first.layout.swizzle_byte_width, rest.layout.swizzle_byte_width) == (128, 32)
    assert layouts.descriptors(x, 80, 0) == (None, None)
    assert layouts.descriptors(x[..., :64].contiguous(), 64, 16)[1] is None


def test_the_types_of_descriptors_name_block_and_layout():
    types = layouts.descriptor_types("fp16", 80, {"d_block": 64, "d_tail": 0})
    assert list(types) == ["d_block", "d_block_rest", "d_tail", "d_tail_rest"]
    assert types["d_block"].startswith("tensordesc<fp16[1, 64, 64],NVMMASharedLayout(")
    assert "swizzle_byte_width=128" in types["d_block"]
    assert "[1, 64, 16]" in types["d_block_rest"]
    assert types["d_tail"] is types["d_tail_rest"] is None
