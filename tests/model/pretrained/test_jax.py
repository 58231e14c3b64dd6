"""Weights of JAX against the logits that Flax's own modules computed of them (tests/files/record_flax.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from grids import Sound
from safetensors.torch import load_file

from polyvit_fast.model import pretrained
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.apply import Target, load_into

FILES = Path(__file__).parents[2] / "files" / "flax"
TRUTH = load_file(FILES / "truth.safetensors")


class Patches(Sound):
    """With patches as small as the recorded models have them."""

    @property
    def tubelet(self):
        return (1, 4, 4)


def as_levels(grid):
    """From the -1 to 1 that these models see to levels of 0 to 255, as a grid with frames."""
    grid = grid.double() * 127.5 + 127.5
    return grid if grid.ndim == 5 else grid[:, None]


@pytest.mark.parametrize("name", ["linen.npz", "before-linen.npz", "scanned.npz"])
def test_a_vit_of_any_spelling_gives_flaxs_logits(name):
    found = pretrained.read(str(FILES / name))
    assert (found.kind, found.model.num_heads, found.model.gelu, found.model.norm_eps) == ("JAX ViT", 3, "tanh", 1e-6)
    logits = found.build().double()(as_levels(TRUTH["vit.grid"]), "classes")
    torch.testing.assert_close(logits, TRUTH["vit.logits"].double(), rtol=0, atol=1e-12)


def build_with(found, tubelets):
    """A model of weights whose file does not tell in what grid its positions lie."""
    for name, sizes in tubelets.items():
        object.__setattr__(found.tokenizers[name], "tubelets", sizes)
    return found.build().double()


def test_a_vivit_checkpoint_gives_flaxs_logits():
    found = pretrained.read(str(FILES / "vivit"))
    assert list(found.tokenizers) == ["video"]
    with pytest.raises(ValueError, match="does not tell how its positions lie in rows and columns"):
        found.build()
    logits = build_with(found, {"video": (2, 2, 2)})(as_levels(TRUTH["vivit.grid"]), "classes")
    torch.testing.assert_close(logits, TRUTH["vivit.logits"].double(), rtol=0, atol=1e-12)


def test_a_polyvit_with_adaptors_gives_flaxs_logits():
    found = pretrained.read(str(FILES / "polyvit.msgpack"))
    assert (found.kind, found.model.depth, found.model.num_adaptor_layers) == ("scenic PolyViT", 3, 1)
    assert sorted(found.heads) == ["kinetics400", "pets", "vggsound"]
    model = build_with(found, {"video": (2, 2, 2), "audio": (1, 5, 2)})
    for theirs, task in (("tokenizer2d", "pets"), ("tokenizer3d", "kinetics400"), ("tokenizer_spec", "vggsound")):
        grid = TRUTH[f"{theirs}.grid"]
        logits = model(grid.double()[:, None] if theirs == "tokenizer_spec" else as_levels(grid), task)
        torch.testing.assert_close(logits, TRUTH[f"{theirs}.logits"].double(), rtol=0, atol=1e-12)


def test_positions_of_sounds_are_no_square_even_if_their_number_is_one():
    found = pretrained.read(str(FILES / "polyvit.msgpack"))
    tensors = found.tokenizers["audio"].tensors
    positions = torch.cat([tensors["pos_embed"], torch.randn(1, 6, 24)], 1)  # 16 of them: 8 times of 2 bands
    object.__setattr__(found.tokenizers["audio"], "tensors", tensors | {"pos_embed": positions})
    modality = Patches(time=32, bins=8)
    polyvit = PolyViT(found.model, {"audio": modality}, {})
    target = Target(polyvit=polyvit, model=found.model, modalities={"audio": modality}, tasks={}, classes={})
    rows = {row.name: row.change for row in load_into(target, found).rows}
    assert rows["tokenizers.audio.pos_embed"] == ""
    assert torch.equal(polyvit.tokenizers["audio"].pos_embed, positions)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cls": None}, "it has no class token, and takes the mean of normalised tokens"),
        ({"MAPHead_0/probe": np.zeros((1, 1, 24))}, r"its head pools by attention \(MAPHead_0\)"),
        ({"Transformer/posembed_input/pos_embedding": None}, "it has no position embeddings"),
    ],
)
def test_big_visions_other_pools_and_positions_are_refused(tmp_path, changes, reason):
    with np.load(FILES / "linen.npz") as content:
        tensors = {name: value for name, value in (dict(content) | changes).items() if value is not None}
    np.savez(tmp_path / "vit.npz", **tensors)
    with pytest.raises(ValueError, match=reason):
        pretrained.read(str(tmp_path / "vit.npz"))


def test_a_class_token_without_a_position_has_a_position_of_zeros(tmp_path):
    with np.load(FILES / "linen.npz") as content:
        tensors = dict(content)
    all_positions = tensors.pop("Transformer/posembed_input/pos_embedding")
    np.savez(tmp_path / "vit.npz", **tensors, pos_embedding=all_positions[:, 1:])
    found = pretrained.read(str(tmp_path / "vit.npz")).tokenizers["image"].tensors["pos_embed"]
    assert not found[:, 0].any()
    assert torch.equal(found[:, 1:], torch.from_numpy(all_positions[:, 1:]))


def test_a_head_behind_pre_logits_is_left_out(tmp_path):
    with np.load(FILES / "linen.npz") as content:
        np.savez(tmp_path / "vit.npz", **content, **{"pre_logits/kernel": np.zeros((24, 24)), "pre_logits/bias": np.zeros(24)})
    found = pretrained.read(str(tmp_path / "vit.npz"))
    assert not found.heads
    assert sorted(found.left_out) == ["head/bias", "head/kernel", "pre_logits/bias", "pre_logits/kernel"]


def test_a_factorised_encoder_is_refused(tmp_path):
    content = {"embedding/kernel": np.zeros((4, 4, 3, 8)), "SpatialTransformer/encoderblock_0/LayerNorm_0/scale": np.zeros(8)}
    np.savez(tmp_path / "fe.npz", **content)
    with pytest.raises(ValueError, match=r"fe.npz: a factorised encoder; models here attend to all tubelets at once"):
        pretrained.read(str(tmp_path / "fe.npz"))


def test_an_unknown_block_is_named(tmp_path):
    content = {name: np.zeros((1, 5, 8)) for name in ("cls", "Transformer/posembed_input/pos_embedding")}
    content |= {"embedding/kernel": np.zeros((4, 4, 3, 8)), "Transformer/encoderblock_0/GatedMlp_0/scale": np.zeros(8)}
    np.savez(tmp_path / "gated.npz", **content)
    with pytest.raises(ValueError, match="encoderblock_0 is none of a plain Transformer, it holds GatedMlp_0/scale"):
        pretrained.read(str(tmp_path / "gated.npz"))
