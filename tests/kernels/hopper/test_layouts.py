"""Where the elements of a tile lie, and how TMA finds a head's."""

import itertools
from functools import reduce
from operator import xor

import pytest
import torch
from samples import normal

from polyvit_kernels.hopper import layouts


def places(bases):
    """The (row, column) of every combination of the bits whose places are `bases`."""
    for bits in itertools.product((0, 1), repeat=len(bases)):
        chosen = [base for bit, base in zip(bits, bases, strict=True) if bit]
        yield tuple(reduce(xor, (base[axis] for base in chosen), 0) for axis in range(2))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_a_stored_tile_has_every_element_once(width):
    layout = layouts.store_layout.fn(width)
    every = list(places([*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]))
    assert sorted(every) == list(itertools.product(range(64), range(width)))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_four_neighbouring_lanes_store_a_sector_of_32_bytes(width):
    layout = layouts.store_layout.fn(width)
    sector = sorted(places([*layout.reg_bases[:2], *layout.lane_bases[:2]]))
    assert sector == [(0, column) for column in range(16)]


@pytest.mark.parametrize(
    ("head_dim", "widths"), [(16, (16, 0)), (48, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0))]
)
def test_panels_are_powers_of_two(head_dim, widths):
    assert layouts.panels(head_dim) == widths


@pytest.mark.parametrize("head_dim", [8, 72, 112, 144])
def test_a_width_of_no_two_panels_is_refused(head_dim):
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}"):
        layouts.panels(head_dim)


def test_what_tma_can_address_stays_and_the_rest_is_copied():
    whole = normal(2 * 5 * 6 * 16 + 8).to(torch.bfloat16)
    there = whole[8:].view(2, 5, 3, 2, 16)
    assert layouts.packed(there) is there
    for other in (whole[4:-4].view(2, 5, 3, 2, 16), there[:, 1:], there.transpose(0, 1)):
        copy = layouts.packed(other)
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


def test_the_type_of_a_descriptor_names_its_box_and_its_layout():
    kind = layouts.descriptor_type("fp16", 64, 32)
    assert kind.startswith("tensordesc<fp16[1, 64, 32],NVMMASharedLayout(")
    assert "swizzle_byte_width=64" in kind
