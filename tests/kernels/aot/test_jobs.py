"""Which kernels are compiled, before any is."""

import sys
from types import SimpleNamespace

import pytest
from gluon_samples import copy_variant

from polyvit_kernels.aot.jobs import format_limits, list_jobs, variants
from polyvit_kernels.tiles import ANY, Tile
from polyvit_kernels.tiles.table import TABLE

BLOCKS = {"BLOCK_D": 64, "BLOCK_M": 64, "KEYS_0": 256, "KEYS_1": 0, "KEYS_2": 0}


def tile(**changes):
    return Tile(**({"op": "attention_short_forward", "archs": (80, 86, 89, 90), "features": 64, "blocks": BLOCKS} | changes))


def test_gpus_of_a_generation_before_hopper_share_the_code_of_the_oldest():
    entries, jobs = list_jobs([tile()], [80, 86, 89, 90], ["bf16"])
    assert [job.arch for job in jobs] == [80, 90]
    assert [(entry.arch, entry.kernels) for entry in entries] == [(80, (0,)), (86, (0,)), (89, (0,)), (90, (1,))]
    assert [job.arch for job in list_jobs([tile(archs=(86, 89, 120))], [80, 86, 89, 90, 120], ["bf16"])[1]] == [86, 120]


def test_rows_with_the_same_kernel_compile_it_once():
    rows = [tile(tokens=(1, 50), archs=(90,)), tile(tokens=(51, 256), archs=(90,)), tile(tokens=(51, 256), archs=(90,), num_warps=8)]
    entries, jobs = list_jobs(rows, [90], ["bf16", "fp16"])
    assert len(jobs) == 4
    assert [entry.kernels for entry in entries] == [(0,), (1,), (0,), (1,), (2,), (3,)]
    assert [(job.dtype, job.variant().num_warps) for job in jobs] == [("bf16", 4), ("fp16", 4), ("bf16", 8), ("fp16", 8)]


def test_a_job_finds_its_kernel_again():
    row = next(row for row in TABLE if row.op == "attention_long_backward" and row.features == 64 and 90 in row.archs)
    _, jobs = list_jobs([row], [90], ["bf16"])
    kernels = [variant.kernel for variant in variants(row, "bf16")]
    assert [job.variant().kernel for job in jobs] == kernels


def test_an_operation_in_fp32_only_belongs_to_every_library():
    entries, _ = list_jobs(TABLE, [90], ["bf16"])
    assert {entry.dtype for entry in entries if entry.tile.op == "sgd_update"} == {"fp32"}
    assert {entry.dtype for entry in entries if entry.tile.op == "layer_norm_forward"} == {"bf16"}


def test_a_row_of_another_backend_is_there_without_kernels():
    entries, jobs = list_jobs([tile(backend="torch"), tile(op="attention", backend="cudnn")], [90], ["bf16"])
    assert [entry.kernels for entry in entries] == [()]
    assert not jobs


def test_hoppers_rows_are_compiled_from_their_own_modules(monkeypatch):
    made = [copy_variant(max_registers=registers) for registers in (None, 168, 168)]
    monkeypatch.setitem(sys.modules, "polyvit_kernels.hopper.linear", SimpleNamespace(variants=lambda tile, dtype: iter(made)))
    entries, jobs = list_jobs([tile(op="linear_add_forward", backend="hopper", archs=(90,))], [80, 90], ["bf16"])
    assert [(entry.arch, entry.kernels) for entry in entries] == [(90, (0, 1, 1))]
    assert [job.variant() for job in jobs] == made[:2]
    (variant,) = {repr(variant) for variant in variants(tile(programs_per_sm=3, allowed_spills=4), "bf16")}
    assert "programs_per_sm=3, allowed_spills=4" in variant


def test_hoppers_own_kernels_are_for_hopper_alone():
    """For another GPU the compiler ends its process: it knows wgmma for sm_90 only."""
    assert {row.archs for row in TABLE if row.backend == "hopper"} == {(90,)}


def test_a_row_that_no_module_compiles_is_refused():
    with pytest.raises(ValueError, match="no module compiles the rows of attention_sideways"):
        list_jobs([tile(op="attention_sideways")], [90], ["bf16"])


def test_limits_are_written_in_words():
    assert [format_limits(64), format_limits(ANY), format_limits(1, ANY), format_limits(257, ANY), format_limits(1, 64)] == [
        "64",
        "any",
        "any",
        "257..",
        "1..64",
    ]
