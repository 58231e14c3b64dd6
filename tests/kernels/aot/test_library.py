"""The C library: its face, its lookups, and what it launches."""

import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from ahead_of_time import ROOT, SOURCES, WARNINGS
from compare import DEVICE

from polyvit_kernels import tiles
from polyvit_kernels.aot import library
from polyvit_kernels.aot.jobs import BACKEND_CHOICE
from polyvit_kernels.aot.main import ARCHS
from polyvit_kernels.tiles.table import TABLE

HEADER = SOURCES / "polyvit_kernels.h"


def run(*command, **variables):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | variables)


@pytest.mark.parametrize("language", [("c", "gcc", "-std=c11"), ("c++", "g++", "-std=c++11")], ids=["C11", "C++11"])
def test_the_header_stands_alone(language, tmp_path):
    name, compiler, standard = language
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    (tmp_path / "user").write_text('#include "polyvit_kernels.h"\nint main(void) { return polyvit_integer("tokens", 0).integer; }\n')
    command = (compiler, standard, *WARNINGS, "-pedantic", f"-I{SOURCES}", "-x", name, tmp_path / "user", "-o", tmp_path / "program")
    done = run(*command)
    assert not done.returncode, done.stderr
    assert not run(tmp_path / "program").returncode


def test_the_library_exports_what_the_header_declares_and_nothing_else(c_library):
    declared = set(re.findall(r"^POLYVIT_API [^;]*?(\w+)\(", HEADER.read_text(), re.M))
    symbols = run("nm", "-D", "--defined-only", c_library).stdout
    assert {line.split()[2] for line in symbols.splitlines()} == declared
    assert len(declared) == 11


def test_the_library_needs_the_c_library_only(c_library):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", c_library).stdout)
    assert all(re.match(r"lib(c|m|dl|pthread)\.so|ld-linux", name) for name in needed), needed


def test_every_lookup_of_the_file_gives_its_row(c_library):
    done = run(c_library.parent / "test_lookup", c_library.parent / "lookups.txt")
    assert not done.returncode, done.stderr
    assert " 0 failures" in done.stdout


@pytest.mark.parametrize("op", sorted({tile.op for tile in TABLE}))
def test_lookups_are_those_of_pick(op, c_library, compiled_rows):
    held = library.load(c_library)
    sizes = (1, 16, 64, 65, 129, 197, 208, 257, 401, 1025, 3137), (16, 32, 48, 64, 80, 128, 192, 768, 1024, 3072, 5000)
    for dtype, arch, tokens, features in itertools.product(("fp32", "bf16"), (70, 80, 87, 90, 95, 100, 103, 120, 121), *sizes):
        name = next(key for key, value in tiles.DTYPES.items() if value == dtype)
        tile = tiles.pick(op, arch, name, tokens=tokens, features=features, portable=True)
        found = held.polyvit_kernels_find(op.encode(), dtype.encode(), arch, tokens, features)
        older = max((a for row in compiled_rows for a in row.archs if a <= arch), default=0)
        served = tile.backend == "triton" and op != BACKEND_CHOICE and older in ARCHS
        if not served or dtype not in ({"bf16"} & set(tile.dtypes) or tile.dtypes):
            assert not found
            continue
        row = found.contents
        assert (row.op.decode(), row.dtype.decode(), row.arch, row.max_features) == (op, dtype, older, tile.features)
        assert (row.min_tokens, row.max_tokens) == tile.tokens
        assert row.kernels[0].contents.num_warps == tile.num_warps


def test_a_kernel_is_chosen_by_name_and_constants(c_library):
    held = library.load(c_library)
    row = held.polyvit_kernels_find(b"attention_long_backward", b"bf16", 90, 197, 64)
    delta = held.polyvit_kernels_choose(row, b"attention_long_bwd_kernel_delta", b"VARLEN=1  HEAD_DIM=64")
    assert delta.contents.name == b"attention_long_bwd_kernel_delta"
    assert held.polyvit_kernels_constant(delta, b"VARLEN", -1) == 1
    assert held.polyvit_kernels_constant(delta, b"VARLE", -1) == -1
    for wanted in (b"VARLEN=2", b"VARLEN=", b"VARLEN", b"VARLE=1", b"VARLEN=1 HEAD_DIM=6", b"VARLEN=1 HEAD_DIM=640"):
        assert not held.polyvit_kernels_choose(row, None, wanted), wanted
    assert b"was not compiled as any kernel with VARLEN=1 HEAD_DIM=640" in held.polyvit_kernels_error()
    assert not held.polyvit_kernels_choose(None, None, None)


def test_what_a_gpu_would_be_needed_for_says_that_there_is_none(c_library):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    held = library.load(c_library)
    assert held.polyvit_kernels_arch() == -3
    assert held.polyvit_kernels_error().startswith(b"no CUDA ")


def test_the_example_without_a_gpu_ends_with_77_and_says_why(c_library):
    done = run(c_library.parent / "example_attention", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 77
    assert done.stderr.startswith("no GPU to run on: no CUDA ")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("sizes", [(8, 197, 12, 64), (2, 50, 3, 64), (2, 1000, 4, 64)], ids=str)
def test_the_example_on_a_gpu(sizes, c_library):
    done = run(c_library.parent / "example_attention", *sizes)
    assert not done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a real driver is loaded")
def test_launches_through_a_driver_that_computes_on_the_host(c_library):
    driver = c_library.parent / "driver" / "libcuda.so.1"
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "kernels")))
    script = ROOT / "tests" / "kernels" / "c_launches.py"
    done = run(
        sys.executable,
        script,
        c_library,
        driver,
        c_library.parent / "rows.json",
        PYTHONPATH=paths,
        LD_LIBRARY_PATH=str(driver.parent),
        TRITON_INTERPRET="1",
    )
    assert not done.returncode, done.stderr


def test_the_listing_of_the_library(c_library):
    lines = [line for row in library.rows(library.load(c_library)) for line in library.describe(row)]
    assert all(len(line) == len(library.HEADINGS) for line in lines)
    found = next(line for line in lines if line[0] == "attention_short_forward" and line[2] == "sm_90" and line[3] == "193..208")
    assert found[5] == "attention_short_fwd_kernel"
    assert "HEAD_DIM=64" in found[-1]


def test_an_install_without_the_library_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="was built without its C library"):
        library.load(tmp_path / "libpolyvit_kernels.so")
