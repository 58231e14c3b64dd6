"""Weights of JAX against the logits that Flax's own modules computed of them (tests/files/record_flax.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from polyvit_fast.model import pretrained

FILES = Path(__file__).parents[2] / "files" / "flax"
TRUTH = load_file(FILES / "truth.safetensors")


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
        logits = model(as_levels(TRUTH[f"{theirs}.grid"]), task)
        torch.testing.assert_close(logits, TRUTH[f"{theirs}.logits"].double(), rtol=0, atol=1e-12)


def test_a_factorised_encoder_is_refused(tmp_path):
    content = {"embedding/kernel": np.zeros((4, 4, 3, 8)), "SpatialTransformer/encoderblock_0/LayerNorm_0/scale": np.zeros(8)}
    np.savez(tmp_path / "fe.npz", **content)
    with pytest.raises(ValueError, match=r"fe.npz: a factorised encoder; models here attend to all tubelets at once"):
        pretrained.read(str(tmp_path / "fe.npz"))


def test_an_unknown_block_is_named(tmp_path):
    content = {"embedding/kernel": np.zeros((4, 4, 3, 8)), "Transformer/encoderblock_0/GatedMlp_0/scale": np.zeros(8)}
    np.savez(tmp_path / "gated.npz", **content)
    with pytest.raises(ValueError, match="encoderblock_0 is none of a plain Transformer, it holds GatedMlp_0/scale"):
        pretrained.read(str(tmp_path / "gated.npz"))
