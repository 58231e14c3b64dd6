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
    found = all_launches(monkeypatch, depth, drop_path_rate, **changes)
    assert "attention_short_bwd_kernel" in {launch.name for launch in found}
    return [launch for launch in found if not launch.ours and launch.name not in PRODUCTS]


def all_launches(monkeypatch, depth=3, drop_path_rate=0.0, **changes) -> list[Launch]:
    task = tile_task(modality=Tile(size=64), batch=BATCH, drop_path_rate=drop_path_rate)
    model = Model(dim=DIM, depth=depth, num_heads=2, mlp_dim=256)
    run = tiny_config(tasks={"a": task}, model=model, precision="bf16", **({"optim": Optim(name="adamw", lr=0.1)} | changes))
    object.__setattr__(run, "device", "meta")
    step, buffers = Step(PolyViT.from_config(run).train(), run), InputBuffers(run, {"a": torch.uint8}, META)
    step.begin(("a",), 0.1, 0)
    with Launches(monkeypatch) as mode:
        step.forward_backward("a", buffers.view("a", 0))
        step.update()
    return mode.found


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


def count_launches(monkeypatch, *freeze: str, layer_decay=1.0) -> Counter:
    optim = Optim(name="adamw", lr=0.1, freeze=freeze, layer_decay=layer_decay)
    return Counter(launch.name for launch in all_launches(monkeypatch, 4, optim=optim))


def test_a_frozen_block_multiplies_for_no_weight_and_a_frozen_front_has_no_backward(monkeypatch):
    trained, block, front = (count_launches(monkeypatch, *freeze) for freeze in ((), ("blocks.1.*",), ("tokenizers.*", "blocks.[0-1].*")))
    assert not block - trained
    assert trained - block == {
        "mm": 4,  # the gradients of four weights
        "add_": 12,  # and of all parameters, to the flat buffer
        "_to_copy": 1,  # the rounded one of the bias of qkv
    }
    assert not front - trained
    gone = trained - front
    assert {name: gone[name] for name in gone if name.endswith("_kernel")} == {
        "attention_short_bwd_kernel": 2,
        "dgelu_bwd_kernel": 2,
        "layer_norm_bwd_kernel": 4,
        "patch_embed_bwd_kernel": 1,
        "adamw_update_kernel": 2,  # of the tokenizer's parameters
    }
    assert gone["mm"] == 2 * 7 + 1


def test_rates_by_layer_launch_two_updates_for_each_layer(monkeypatch):
    alike, decayed = (count_launches(monkeypatch, layer_decay=decay) for decay in (1.0, 0.8))
    assert alike["adamw_update_kernel"] == 2 * 3  # matrices and the rest of tokenizer, trunk and head
    assert decayed - alike == {
        "adamw_update_kernel": 2 * 4 + 1 - 2,  # of four blocks and the last norm instead of the trunk
        "mul": 1,  # all rates at once
    }
    assert not alike - decayed
