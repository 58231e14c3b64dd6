"""Counts from an image's bits against NVIDIA's disassembler."""

import re
import subprocess
from collections import Counter
from ctypes import string_at

import pytest
from ahead_of_time import run_python
from triton import knobs

from polyvit_kernels import cubin, library
from polyvit_kernels.aot import ARCHS

COUNTED = re.compile(r"STL|LDL|\w*MMA")

# One with many spills: 128 rows of scores in the registers of four warps.
SPILLING = """
import sys
from pathlib import Path
from polyvit_kernels import attention_short, images
from polyvit_kernels.tiles import Tile
blocks = {"BLOCK_D": 64, "BLOCK_M": 128, "KEYS_0": 256, "KEYS_1": 0, "KEYS_2": 0}
(variant,) = attention_short.variants(Tile(op="attention_short_forward", archs=(80,), features=64, blocks=blocks), "bf16")
for arch in sys.argv[2:]:
    Path(sys.argv[1], arch).write_bytes(images.build(variant, int(arch)).cubin)
"""


def disassembled(image, path):
    path.write_bytes(image)
    done = subprocess.run([knobs.nvidia.nvdisasm.path, "-ndf", "-c", path], capture_output=True, text=True, check=True)
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", done.stdout, re.M)
    assert len(names) > 100
    return Counter(name for name in names if COUNTED.fullmatch(name))


@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_are_those_that_the_disassembler_finds(arch, c_library, tmp_path):
    rows = [row for row in library.rows(library.load(c_library)) if row.arch == arch]
    for op in (
        b"attention_short_forward",
        b"attention_short_backward",
        b"attention_long_backward",
        b"dgelu_backward",
        b"layer_norm_backward",
    ):
        row = next(row for row in rows if row.op == op)
        kernel = row.kernels[0].contents
        image = string_at(kernel.image, kernel.image_bytes)
        assert cubin.instructions(image) == disassembled(image, tmp_path / "image")
        assert cubin.read(image).registers == kernel.num_registers


def test_spills_are_those_that_the_disassembler_finds(tmp_path):
    done = run_python("-c", SPILLING, tmp_path, *ARCHS)
    assert not done.returncode, done.stderr
    for arch in ARCHS:
        image = (tmp_path / str(arch)).read_bytes()
        found = disassembled(image, tmp_path / "image")
        assert cubin.instructions(image) == found
        usage = cubin.read(image)
        assert (usage.spill_stores, usage.spill_loads) == (found["STL"], found["LDL"])
        assert (usage.stack > 0) == (found["STL"] > 0)
        assert usage.tensor == {name: count for name, count in found.items() if "MMA" in name}
    assert cubin.read((tmp_path / "80").read_bytes()).spill_stores > 50
