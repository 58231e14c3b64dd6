"""A compiled kernel and the budget."""

import pytest
from ahead_of_time import ROOT, run_python

from polyvit_kernels.cubin import Usage
from polyvit_kernels.images import Image

BUILD = """
import json
import sys
from dataclasses import asdict
from pathlib import Path
from triton import knobs
from polyvit_kernels import attention_long, images
from polyvit_kernels.tile_table import TABLE
knobs.cache.dir = sys.argv[1]
row = next(row for row in TABLE if row.op == "attention_long_forward" and row.features == 64 and 90 in row.archs)
image = images.build(next(attention_long.variants(row, "bf16")), 90)
Path(sys.argv[1], "image").write_bytes(image.cubin)
print(json.dumps({name: value for name, value in asdict(image).items() if name != "cubin"}))
"""


def image(**changes):
    usage = {"registers": 100, "stack": 0, "spill_stores": 0, "spill_loads": 0, "tensor": {"HGMMA": 4}}
    values = {"arch": 90, "num_warps": 4, "num_stages": 1, "shared": 1024, "columns": 0, "multiplies": True}
    usage |= {key: changes.pop(key) for key in list(changes) if key in usage}
    return Image(name="k", parameters=(), constants={}, usage=Usage(**usage), cubin=b"", **(values | changes))


def test_within_the_budget():
    assert image().excesses() == []
    assert image(multiplies=False, tensor={}).excesses() == []
    assert image(shared=227 << 10).excesses() == []
    assert image(arch=80, tensor={"HMMA": 1}).excesses() == []
    assert image(arch=100, tensor={"UTCHMMA": 1}, columns=512).excesses() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_stores": 1}, "1 spill stores, 0 loads"),
        ({"spill_loads": 3}, "0 spill stores, 3 loads"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": (227 << 10) + 1}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"arch": 120, "tensor": {"HMMA": 1}, "shared": 100 << 10}, "sm_120 has 101376"),
        ({"arch": 100, "tensor": {"UTCHMMA": 1}, "columns": 513}, "513 columns of tensor memory, there are 512"),
        ({"tensor": {"HMMA": 8}}, "no HGMMA instruction, but {'HMMA': 8}"),
        ({"arch": 100}, "no UTC instruction, but {'HGMMA': 4}"),
        ({"arch": 80, "tensor": {}}, "no HMMA instruction, but none"),
    ],
)
def test_beyond_the_budget(changes, words):
    (excess,) = image(**changes).excesses()
    assert words in excess


def test_the_same_kernel_gives_the_same_bytes_and_none_of_this_machines_folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    found = [run_python("-c", BUILD, tmp_path / name) for name in ("one", "two")]
    assert not any(done.returncode for done in found), found[0].stderr
    assert found[0].stdout == found[1].stdout
    one, two = ((tmp_path / name / "image").read_bytes() for name in ("one", "two"))
    assert one == two
    assert str(ROOT).encode() not in one
