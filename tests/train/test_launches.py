"""What a GPU launches in a step: no pass over memory, and no small kernel, that has no reason."""

from collections import Counter

import pytest
import torch
from capturable import META
from launches import PRODUCTS, Launch, Launches
from launches import h100_on_meta as h100_on_meta  # a fixture
from launches import on_meta as on_meta  # another
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast.config import Model, Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.feed import InputBuffers
from polyvit_fast.train.step import Step

BATCH, TOKENS, DIM = 8, 65, 128

pytestmark = pytest.mark.usefixtures("h100_on_meta")


def launches(monkeypatch, depth=3, drop_path_rate=0.0, **changes) -> list[Launch]:
    """Of a step in bf16 on an H100, but for matrix products and for the kernels of our operations."""
    task = tile_task(modality=Tile(size=64), batch=BATCH, drop_path_rate=drop_path_rate)
    model = Model(dim=DIM, depth=depth, num_heads=2, mlp_dim=256)
    run = tiny_config(tasks={"a": task}, model=model, precision="bf16", optim=Optim(name="adamw", lr=0.1), **changes)
    object.__setattr__(run, "device", "meta")
    step, buffers = Step(PolyViT.from_config(run).train(), run), InputBuffers(run, {"a": torch.uint8}, META)
    step.begin(("a",), 0.1, 0)
    with Launches(monkeypatch) as mode:
        step.forward_backward("a", buffers.view("a", 0))
        step.update()
    assert "attention_short_bwd_kernel" in {launch.name for launch in mode.found}
    return [launch for launch in mode.found if not launch.ours and launch.name not in PRODUCTS]


def sees_all_tokens(launch: Launch) -> bool:
    """Whether it reads or writes as much as all tokens are."""
    return any(tensor.numel() >= BATCH * TOKENS * DIM and len(tensor) in (BATCH, BATCH * TOKENS) for tensor in launch.tensors)


@pytest.mark.parametrize("changes", [{}, {"residual": "bf16"}, {"recompute": True}], ids=str)
def test_no_pass_over_the_tokens_but_these(changes, monkeypatch):
    found = Counter(launch.name for launch in launches(monkeypatch, **changes) if sees_all_tokens(launch))
    assert found == {
        "slice_backward": 1,  # of the last block's residual, of which the class token alone goes on
        "sum": 1,  # over the batch: the gradient of the positions
    }


def test_a_block_more_launches_what_its_parameters_need(monkeypatch):
    some, more = (Counter(launch.name for launch in launches(monkeypatch, depth)) for depth in (3, 4))
    assert more - some == {
        "add_": 12,  # a gradient for each parameter, added to the flat buffer
        "sum": 1,  # of partial sums, for the bias of qkv
        "_to_copy": 1,  # which rounds it
    }
    assert not some - more


def test_no_weight_is_rounded_in_a_step(monkeypatch):
    assert [launch for launch in launches(monkeypatch) if launch.name == "_to_copy" and launch.largest >= DIM * DIM] == []


def test_gradients_are_added_without_a_cast(monkeypatch):
    found = [launch for launch in launches(monkeypatch) if launch.name == "add_" and launch.largest >= DIM * DIM]
    kinds = Counter((launch.tensors[0].dtype, launch.tensors[1].dtype) for launch in found)
    own_precision = 2  # the class token's queries, keys and values are computed in fp32, and so are the positions added
    assert kinds[torch.float32, torch.float32] <= own_precision
    assert kinds[torch.float32, torch.bfloat16] >= 4 * 2 + 3


@pytest.mark.parametrize("changes", [{}, {"residual": "bf16"}, {"recompute": True}], ids=str)
def test_drop_path_needs_no_pass(changes, monkeypatch):
    some, more = (
        Counter(launch.name for launch in launches(monkeypatch, drop_path_rate=rate, **changes) if sees_all_tokens(launch))
        for rate in (0.0, 0.1)
    )
    assert some == more
