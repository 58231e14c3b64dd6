from dataclasses import replace

import pytest
import torch
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast.model.parameters import (
    count_frozen_layers,
    decay_by_layer,
    find_component,
    freeze,
    is_matrix,
    list_components,
    list_parameters,
)
from polyvit_fast.model.polyvit import PolyViT


class Other(Tile):
    name = "other"


def model(num_adaptor_layers=1, depth=3):
    config = tiny_config(tasks={"a": tile_task(), "b": tile_task(modality=Other())})
    return PolyViT.from_config(replace(config, model=replace(config.model, depth=depth, num_adaptor_layers=num_adaptor_layers)))


def gradients(vit, task):
    vit(torch.randn(2, 1, 16, 16, 3), task).sum().backward()
    return [name for name, parameter in vit.named_parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        (["blocks.*"], ("blocks.",)),
        (["blocks.1.*"], ("blocks.1.",)),
        (["tokenizers.tile.*", "norm.*"], ("tokenizers.tile.", "norm.")),
        (["tokenizers.*.blocks.0.*"], ("tokenizers.tile.blocks.0.", "tokenizers.other.blocks.0.")),
        (["blocks.[0-1].mlp.fc1.bias"], ("blocks.0.mlp.fc1.bias", "blocks.1.mlp.fc1.bias")),
    ],
)
def test_patterns_freeze_what_they_match_and_only_the_rest_gets_gradients(patterns, prefixes):
    vit = model()
    names = [name for name, _ in vit.named_parameters()]
    assert freeze(vit, patterns) == [name for name in names if name.startswith(prefixes)]
    for task in ("a", "b"):
        vit.zero_grad(set_to_none=True)
        assert gradients(vit, task) == list_parameters(vit, task)
        assert not any(name.startswith(prefixes) for name in list_parameters(vit, task))


def test_nothing_is_frozen_by_no_pattern():
    vit = model()
    assert freeze(vit, []) == []
    assert gradients(vit, "a") == list_parameters(vit, "a")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["blocs.*"], r"optim.freeze: 'blocs.\*' matches no parameter; near it are blocks.\*, "),
        (
            ["blocks.*", "blocks.0.attn.qkv.weigth"],
            r"'blocks.0.attn.qkv.weigth' matches no parameter; near it are blocks.0.attn.qkv.weight, ",
        ),
        (["zzz"], r"'zzz' matches no parameter; there are blocks.\*, heads.\*, norm.\*, tokenizers.\*"),
        (["Blocks.*"], "'Blocks.*' matches no parameter"),
        (["*"], r"\* leaves nothing to train; leave out the heads"),
        (["blocks.*", "norm.*", "heads.b.*", "tokenizers.other.*"], r"leaves task b nothing to train; leave out heads.b.\*, or the task"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused_and_freeze_nothing(patterns, message):
    vit = model()
    with pytest.raises(ValueError, match=message):
        freeze(vit, patterns)
    assert all(parameter.requires_grad for parameter in vit.parameters())


@pytest.mark.parametrize("num_adaptor_layers", [0, 1, 3])
def test_learning_rates_decay_from_the_heads_down(num_adaptor_layers):
    """BEiT's rule: 1 for the heads, depth - i powers for block i, one more for what is before the blocks."""
    factors = decay_by_layer(model(num_adaptor_layers), 0.5)
    for name, factor in factors.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            expected = 0.5 ** (3 - (num_adaptor_layers + int(parts[1])))
        elif parts[2:3] == ["blocks"]:
            expected = 0.5 ** (3 - int(parts[3]))
        else:
            expected = 0.5**4 if parts[0] == "tokenizers" else 1
        assert factor == expected, name
    assert len(set(factors.values())) == 5
    assert set(decay_by_layer(model(num_adaptor_layers), 1.0).values()) == {1.0}


def test_learning_rates_are_those_of_timm():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model("vit_tiny_patch16_224", depth=3)
    groups = param_groups_layer_decay(theirs, weight_decay=0.1, layer_decay=0.7)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    of_timm = {name: scales[id(parameter)] for name, parameter in theirs.named_parameters()}
    ours = decay_by_layer(model(num_adaptor_layers=0), 0.7)
    for name, scale in of_timm.items():
        name = name.replace("patch_embed.proj.", "tokenizers.tile.").replace("head.", "heads.a.")
        name = f"tokenizers.tile.{name}" if name in ("cls_token", "pos_embed") else name
        if not name.startswith("norm."):  # the last norm has the rate of the last block in timm, that of the head in BEiT and here
            assert ours[name] == pytest.approx(scale), name


def test_weight_decay_is_for_matrices():
    decayed = {name for name, parameter in model().named_parameters() if is_matrix(name, parameter)}
    assert {"blocks.0.attn.qkv.weight", "heads.a.weight", "tokenizers.tile.weight"} <= decayed
    assert not [name for name in decayed if name.endswith(("bias", "cls_token", "pos_embed", "norm.weight", "norm1.weight"))]


def test_components_are_tokenizers_heads_and_the_trunk():
    assert find_component("tokenizers.tile.blocks.0.norm1.bias") == "tokenizers.tile"
    assert find_component("heads.a.weight") == "heads.a"
    assert find_component("blocks.0.norm1.bias") == find_component("norm.weight") == ""
    assert list_components(model(), "b") == ("", "tokenizers.other", "heads.b")


@pytest.mark.parametrize(
    ("patterns", "num_frozen"),
    [
        ([], 0),
        (["tokenizers.*", "blocks.1.*"], 2),  # with the adaptor
        (["tokenizers.tile.weight", "tokenizers.tile.blocks.*"], 0),
        (["tokenizers.*", "blocks.*"], 4),
        (["tokenizers.*", "blocks.*", "norm.*"], 5),
    ],
)
def test_layers_before_the_first_that_is_trained_are_counted(patterns, num_frozen):
    vit = model(num_adaptor_layers=1)
    freeze(vit, patterns)
    assert count_frozen_layers(vit, "a") == num_frozen
