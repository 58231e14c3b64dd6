"""The budget of a compiled kernel."""

import pytest

from polyvit_kernels.aot.compiled_kernel import CompiledKernel
from polyvit_kernels.aot.cubin import Usage


def image(**changes):
    usage = {"registers": 100, "stack": 0, "spill_stores": 0, "spill_loads": 0, "inner_spills": 0, "tensor": {"HGMMA": 4}}
    values = {"arch": 90, "num_warps": 4, "num_stages": 1, "shared": 1024, "columns": 0, "multiplies": True, "messages": ()}
    usage |= {key: changes.pop(key) for key in list(changes) if key in usage}
    return CompiledKernel(name="k", parameters=(), constants={}, usage=Usage(**usage), cubin=b"", **(values | changes))


def test_within_the_budget():
    assert image().excesses() == []
    assert image(multiplies=False, tensor={}).excesses() == []
    assert image(shared=227 << 10).excesses() == []
    assert image(arch=80, tensor={"HMMA": 1}).excesses() == []
    assert image(arch=100, tensor={"UTCHMMA": 1}, columns=512).excesses() == []
    assert image(spill_stores=2, spill_loads=2, stack=8, allowed_spills=4).excesses() == []
    assert image(registers=168, programs_per_sm=3).excesses() == []
    assert image(shared=113 << 10, programs_per_sm=2).excesses() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_stores": 1}, "1 spill stores, 0 loads"),
        ({"spill_loads": 3}, "0 spill stores, 3 loads"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"spill_stores": 2, "spill_loads": 2, "stack": 8, "allowed_spills": 3}, "2 spill stores, 2 loads, 8 bytes of stack; 0 in inner"),
        ({"spill_stores": 2, "spill_loads": 2, "inner_spills": 1, "allowed_spills": 4}, "1 in inner loops, 4 allowed elsewhere"),
        ({"registers": 169, "programs_per_sm": 3}, "room for 2 programs, not for 3: each needs 169 registers, 4 warps and 1024 bytes"),
        ({"shared": (113 << 10) + 1, "programs_per_sm": 2}, "room for 1 programs, not for 2"),
        ({"num_warps": 12, "registers": 169}, "room for 0 programs, not for 1"),
        ({"shared": (227 << 10) + 1}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"arch": 120, "tensor": {"HMMA": 1}, "shared": 100 << 10}, "sm_120 has 101376"),
        ({"arch": 100, "tensor": {"UTCHMMA": 1}, "columns": 513}, "513 columns of tensor memory, there are 512"),
        ({"tensor": {"HMMA": 8}}, "no HGMMA instruction, but {'HMMA': 8}"),
        ({"arch": 100}, "no UTC instruction, but {'HGMMA': 4}"),
        ({"arch": 80, "tensor": {}}, "no HMMA instruction, but none"),
        ({"messages": ("(C7515) Potential Performance Loss",)}, "(C7515) Potential Performance Loss"),
    ],
)
def test_beyond_the_budget(changes, words):
    (excess,) = image(**changes).excesses()
    assert words in excess


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({"registers": 32, "num_warps": 4}, 16),
        ({"registers": 32, "num_warps": 4, "arch": 89, "tensor": {"HMMA": 1}}, 12),
        ({"registers": 168, "num_warps": 4}, 3),
        ({"registers": 168, "num_warps": 12}, 1),
        ({"registers": 128, "num_warps": 8}, 2),
        ({"registers": 255, "num_warps": 4}, 2),
        ({"registers": 64, "shared": 75 << 10}, 3),
        ({"registers": 64, "shared": (75 << 10) + 1}, 2),
        ({"registers": 64, "shared": 99 << 10, "arch": 120, "tensor": {"HMMA": 1}}, 1),
    ],
)
def test_programs_that_an_sm_holds(changes, programs):
    assert image(**changes).programs() == programs
