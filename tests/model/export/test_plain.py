"""One task alone, and what is written of it."""

import math

import pytest
import torch
from export_cases import CASES, build, grid
from grids import SMALL
from sources import MODEL, as_source, draw

from polyvit_fast.model.export.plain import find_unit_levels, flatten, make_contiguous, select_task
from polyvit_fast.model.polyvit import PolyViT


def several():
    """The weights of three modalities and four tasks."""
    heads = {"a": ("picture", 4), "b": ("clip", 3), "c": ("sound", 2), "d": ("picture", 5)}
    return as_source(draw(PolyViT(MODEL, dict(SMALL), heads)), MODEL, SMALL)


def test_a_task_alone_computes_the_same():
    source = several()
    whole = source.build()
    for task, head in source.heads.items():
        alone = select_task(source, task)
        assert (list(alone.heads), list(alone.tokenizers)) == ([task], [head.modality])
        levels = torch.rand(2, *SMALL[head.modality].grid) * 255
        torch.testing.assert_close(alone.build()(levels, task), whole(levels, task), rtol=0, atol=0)


def test_blocks_are_numbered_through():
    for name in ("picture, erf, adaptors", "picture, all adaptors", "picture"):
        polyvit, _, vit = build(name)
        assert {int(key.split(".")[1]) for key in vit.tensors if key.startswith("blocks.")} == {0, 1, 2}
        assert vit.model.num_adaptor_layers == 0
        blocks = [*polyvit.tokenizers["m"].blocks, *polyvit.blocks]
        for number, block in enumerate(blocks):
            assert torch.equal(vit.tensors[f"blocks.{number}.mlp.fc1.weight"], block.mlp.fc1.weight)


def test_fixed_positions_are_those_of_the_model():
    polyvit, _, vit = build("fixed positions")
    assert torch.equal(vit.tensors["pos_embed"], polyvit.tokenizers["m"].pos_embed)


def test_channels_of_copies_become_one():
    _, _, vit = build("plain sound")
    merged = vit.merge_channels()
    assert torch.equal(merged[..., 0], vit.tensors["weight"].sum(-1))
    assert vit.describe_merging()
    _, _, alone = build("sound")
    assert alone.merge_channels() is alone.tensors["weight"]
    assert not alone.describe_merging()


def test_the_record_of_the_task_says_mean_and_size():
    _, source, _ = build("picture")
    other = grid(tubelet=(1, 16, 8))
    tokenizer = select_task(source, "classes", other).tokenizers["m"]
    assert (tokenizer.mean, tokenizer.tubelets) == (other.mean, other.tubelets)
    record = CASES["sound"][0]
    _, source, _ = build("sound")
    assert flatten(source).grid.sizes == (1, 56, 46, 1)  # what the last patch leaves is not in the weights
    assert flatten(source, record).grid.sizes == (1, 64, 48, 1)


def test_a_file_that_does_not_tell_its_size_is_refused():
    from dataclasses import replace

    _, source, _ = build("picture")
    source = replace(source, tokenizers={"m": replace(source.tokenizers["m"], tubelets=None)})
    with pytest.raises(ValueError, match=r"some\.file: the file does not tell how its positions lie"):
        flatten(source)


def test_levels_as_parts_of_255_come_back_to_the_bit():
    known = [0.485, 0.456, 0.406, 0.229, 0.224, 0.225, 0.5, 0.48145466, 0.26862954]
    assert find_unit_levels([255.0 * value for value in known]) == known
    levels = [number / 16 for number in range(1, 4000)] + [math.pi, 100.1, 58.395]
    assert sum(255.0 * value != level for value, level in zip(find_unit_levels(levels), levels, strict=True)) == 0


def test_tensors_for_a_file_have_memory_of_their_own():
    one = torch.arange(12.0).view(3, 4)
    found = make_contiguous({"a": one, "b": one.t()})
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert torch.equal(found["b"], one.t())
    assert len({tensor.data_ptr() for tensor in (*found.values(), one)}) == 3
