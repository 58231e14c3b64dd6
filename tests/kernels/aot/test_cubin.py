"""Counts from an image's bits against NVIDIA's disassembler."""

import re
import subprocess
from collections import Counter
from ctypes import string_at

import pytest
from ahead_of_time import run_python
from triton import knobs

from polyvit_kernels.aot import cubin, library
from polyvit_kernels.aot.main import ARCHS

COUNTED = re.compile(r"STL|LDL|\w*MMA")

# One with many spills: 128 rows of scores in the registers of four warps.
SPILLING = """
import sys
from pathlib import Path
from polyvit_kernels.triton_kernels import attention_short
from polyvit_kernels.aot.compile import compile_kernel
from polyvit_kernels.tiles import Tile
blocks = {"BLOCK_D": 64, "BLOCK_M": 128, "KEYS_0": 256, "KEYS_1": 0, "KEYS_2": 0}
(variant,) = attention_short.variants(Tile(op="attention_short_forward", archs=(80,), features=64, blocks=blocks), "bf16")
for arch in sys.argv[2:]:
    Path(sys.argv[1], arch).write_bytes(compile_kernel(variant, int(arch)).cubin)
"""


LOOPING = """
import sys
from dataclasses import replace
from pathlib import Path
from polyvit_kernels.triton_kernels import attention_long
from polyvit_kernels.aot.compile import compile_kernel
from polyvit_kernels.tiles.table import TABLE
rows = (row for row in TABLE if row.op == "attention_long_forward" and row.backend == "triton" and 90 in row.archs)
row = next(row for row in rows if row.features == 64)
for registers in (64, 255):
    variant = replace(next(attention_long.variants(row, "bf16")), max_registers=registers)
    Path(sys.argv[1], str(registers)).write_bytes(compile_kernel(variant, 90).cubin)
"""

# As nvdisasm writes them. Blocks that wait for a barrier lie behind the end; what they repeat lies in the loop that they go back to.
NESTED = """
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   LDL R2, [R1] ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], RZ ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0040*/                   {inner} ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/              @!P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   LDL R3, [R1+0x4] ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], RZ ;
        /*00b0*/                   {waiting} ;
        /*00c0*/              @!P0 BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
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
    assert len({row.op for row in rows}) >= 2
    for row in {row.op: row for row in rows}.values():
        kernel = row.kernels[0].contents
        image = string_at(kernel.image, kernel.image_bytes)
        assert cubin.count_instructions(image) == disassembled(image, tmp_path / "image")
        assert cubin.read(image).registers == kernel.num_registers


@pytest.mark.long
@pytest.mark.parametrize("archs", [(80,), ARCHS[1:]], ids=str)
def test_spills_are_those_that_the_disassembler_finds(archs, tmp_path):
    done = run_python("-c", SPILLING, tmp_path, *archs)
    assert not done.returncode, done.stderr
    for arch in archs:
        image = (tmp_path / str(arch)).read_bytes()
        found = disassembled(image, tmp_path / "image")
        assert cubin.count_instructions(image) == found
        usage = cubin.read(image)
        assert (usage.spill_stores, usage.spill_loads) == (found["STL"], found["LDL"])
        assert (usage.stack > 0) == (found["STL"] > 0)
        assert usage.tensor == {name: count for name, count in found.items() if "MMA" in name}
    assert archs != (80,) or usage.spill_stores > 50


@pytest.mark.parametrize(
    ("inner", "waiting", "spills"),
    [
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24", "NOP", 0),
        ("LDL.64 R4, [R1]", "NOP", 1),
        ("@P0 STL [R1], R4", "NOP", 1),
        ("LDL R4, [R1]", "LDL R5, [R1]", 2),
        ('BRX R4 -0x40 (*"BRANCH_TARGETS .L_x_4,.L_x_2"*)', "NOP", 0),
        ("BRA.DIV UR4, `(.L_x_0)", "LDL R5, [R1]", 1),
    ],
)
def test_spills_of_inner_loops_alone_are_counted(inner, waiting, spills):
    assert cubin.count_inner_spills(NESTED.format(inner=inner, waiting=waiting)) == spills


def test_straight_code_has_no_inner_loops():
    assert cubin.count_inner_spills("        /*0000*/                   LDL R2, [R1] ;\n        /*0010*/                   EXIT ;\n") == 0


@pytest.mark.long
def test_spills_of_a_kernel_with_a_loop(tmp_path):
    done = run_python("-c", LOOPING, tmp_path)
    assert not done.returncode, done.stderr
    few, many = (cubin.read((tmp_path / registers).read_bytes()) for registers in ("64", "255"))
    assert 0 < few.inner_spills <= few.spill_stores + few.spill_loads
    assert few.registers == 64
    assert (many.inner_spills, many.spill_stores, many.spill_loads) == (0, 0, 0)
