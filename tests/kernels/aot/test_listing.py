"""Compiled kernels and C libraries as tables."""

from pathlib import Path

import pytest
import torch

from polyvit_kernels.aot import listing
from polyvit_kernels.aot.compiled_kernel import CompiledKernel
from polyvit_kernels.aot.cubin import Usage
from polyvit_kernels.aot.jobs import CompiledTile
from polyvit_kernels.tiles import Tile


@pytest.fixture
def described():
    usage = Usage(registers=77, stack=8, spill_stores=1, spill_loads=2, inner_spills=0, tensor={"HGMMA": 4})
    kernel = CompiledKernel(
        name="k",
        arch=90,
        num_warps=4,
        num_stages=2,
        shared=1024,
        columns=0,
        parameters=(),
        constants={"BLOCK": "64"},
        usage=usage,
        multiplies=True,
        messages=("(C7515) Loss: wgmma waits",),
        cubin=b"12345",
    )
    tile = Tile(op="linear_add_forward", archs=(90,), tokens=(1, 64), features=768, source="measured")
    return listing.describe_kernels([CompiledTile(tile=tile, dtype="bf16", arch=90, kernels=(0,))], [kernel])


def test_a_kernel_is_a_row_of_the_table(described):
    (kernel,) = described
    cells = dict(zip(listing.HEADINGS, listing.format_cells(kernel), strict=True))
    assert cells == {
        "op": "linear_add_forward",
        "backend": "triton",
        "tokens": "1..64",
        "features": "768",
        "dtype": "bf16",
        "gpu": "sm_90",
        "warps": "4",
        "stages": "2",
        "registers": "77",
        "spills": "1/2",
        "inner": "0",
        "shared": "1024",
        "programs": "6",
        "tensor": "4 HGMMA",
        "messages": "(C7515) Loss",
        "bytes": "5",
        "source": "measured",
        "kernel": "k BLOCK=64",
    }


def test_a_failure_names_the_row_and_the_kernel(described):
    assert listing.name_kernel(described[0]) == (
        "linear_add_forward triton bf16 sm_90, tokens 1..64, features 768, 77 registers, k BLOCK=64"
    )


def test_columns_are_as_wide_as_their_widest_cell(capsys):
    listing.print_table([("op", "bytes"), ("linear", "7")])
    assert capsys.readouterr().out == "op      bytes\nlinear  7\n"


def test_what_is_no_library_of_kernels_is_refused(tmp_path):
    (tmp_path / "text").write_text("text")
    other = next(iter(Path(torch.__file__).parent.glob("lib/libc10.so")))
    for path, message in (
        (tmp_path / "missing", f"there is no file {tmp_path / 'missing'}"),
        (tmp_path / "text", "text: file too short"),
        (other, f"{other} is another library"),
    ):
        with pytest.raises(SystemExit, match=message):
            listing.print_library(path)
