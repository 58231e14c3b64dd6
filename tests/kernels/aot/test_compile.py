"""Compiling one kernel for a GPU that is not there."""

import json

import pytest
from ahead_of_time import ROOT, run_python

from polyvit_kernels.aot.compile import messages

BUILD = """
import json
import sys
from dataclasses import asdict
from pathlib import Path
from triton import knobs
from polyvit_kernels.triton_kernels import attention_long
from polyvit_kernels.aot.compile import compile_kernel
from polyvit_kernels.tiles.table import TABLE
knobs.cache.dir = sys.argv[1]
rows = (row for row in TABLE if row.op == "attention_long_forward" and row.backend == "triton")
row = next(row for row in rows if row.features == 64 and 90 in row.archs)
image = compile_kernel(next(attention_long.variants(row, "bf16")), 90)
Path(sys.argv[1], "image").write_bytes(image.cubin)
print(json.dumps({name: value for name, value in asdict(image).items() if name != "cubin"}))
"""

GLUON = """
import json
import sys
from dataclasses import asdict
from triton import knobs
from gluon_samples import copy_variant
from polyvit_kernels.aot.compile import compile_kernel
knobs.cache.dir = sys.argv[1]
built = [asdict(compile_kernel(copy_variant(max_registers=registers), 90)) for registers in (None, 24)]
print(json.dumps([{name: value for name, value in image.items() if name != "cubin"} for image in built]))
"""

# A tile that the table once had, compiled twice: the second time it comes from Triton's cache.
ADVISED = """
import json
import sys
from triton import knobs
from polyvit_kernels.triton_kernels import attention_short
from polyvit_kernels.aot.compile import compile_kernel
from polyvit_kernels.tiles import Tile
knobs.cache.dir = sys.argv[1]
blocks = {"BLOCK_D": 64, "BLOCK_M": 256, "BLOCK_N": 32}
row = Tile(op="attention_short_backward", archs=(90,), features=64, blocks=blocks, num_warps=8, num_stages=2)
(variant,) = attention_short.variants(row, "bf16")
built = [compile_kernel(variant, 90) for _ in range(2)]
print(json.dumps([[image.messages, image.excesses(), image.usage.spill_stores] for image in built]))
"""
LOG = """\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas-blackwell info    : Function properties for k
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : (C7515) Potential Performance Loss: wgmma is serialized in 'k'
ptxas info    : Potential Performance Loss: another one
ptxas warning : Value of threads per SM for entry k is out of range
ptxas-blackwell warning : (C7599) of the other compiler
ptxas k.ptx, line 9; warning : of a line
ptxas info    : Used 232 registers, used 1 barriers, 8 bytes smem
ptxas info    : Compile time = 123.4 ms
"""


def test_warnings_and_advice_are_separated_from_the_lines_of_every_compilation():
    assert messages(LOG) == (
        "(C7515) Potential Performance Loss: wgmma is serialized in 'k'",
        "Potential Performance Loss: another one",
        "Value of threads per SM for entry k is out of range",
        "(C7599) of the other compiler",
        "of a line",
    )


@pytest.mark.long
def test_serialized_wgmma_is_found_though_nothing_spills_also_when_the_kernel_comes_from_the_cache(tmp_path):
    done = run_python("-c", ADVISED, tmp_path)
    assert not done.returncode, done.stderr
    first, second = json.loads(done.stdout)
    assert first == second
    (message,), excesses, spills = first
    assert message.startswith("(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized")
    assert (excesses, spills) == ([message], 0)


@pytest.mark.long
def test_a_gluon_kernel_takes_tensor_descriptors_and_its_limit_of_registers(tmp_path):
    done = run_python("-c", GLUON, tmp_path, PYTHONPATH=f"{ROOT / 'tests' / 'gluon'}:{ROOT / 'kernels'}")
    assert not done.returncode, done.stderr
    free, limited = json.loads(done.stdout)
    for image in (free, limited):
        assert (image["name"], image["num_warps"], image["multiplies"], image["messages"]) == ("copy_kernel", 4, False, [])
        assert image["shared"] == 64 * 64 * 2 + 8
        assert [parameter["type"].partition("<")[0] for parameter in image["parameters"]] == ["tensordesc", "*bf16", "i32", "i32"]
    assert limited["usage"]["registers"] <= 24 < free["usage"]["registers"]


@pytest.mark.long
def test_the_same_kernel_gives_the_same_bytes_and_none_of_this_machines_folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    found = [run_python("-c", BUILD, tmp_path / name) for name in ("one", "two")]
    assert not any(done.returncode for done in found), found[0].stderr
    assert found[0].stdout == found[1].stdout
    one, two = ((tmp_path / name / "image").read_bytes() for name in ("one", "two"))
    assert one == two
    assert str(ROOT).encode() not in one
