"""The same random weights in Hugging Face's ViT, ViViT and AST and in ours give the same tokens."""

import pytest
import torch
from grids import Clip, Picture, Sound
from transformers import ASTConfig, ASTModel, ViTConfig, ViTModel, VivitConfig, VivitModel

from polyvit_fast.config import Model
from polyvit_fast.model.modules import Block
from polyvit_fast.model.polyvit import PolyViT

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "layer_norm_eps": 1e-6}
HIDDEN_ACT = {"tanh": "gelu_pytorch_tanh", "erf": "gelu"}
BLOCK_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


def randomise(theirs, dtype):
    """Weights so large that every part of the model matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + ("layernorm" in name and name.endswith("weight")))
    return theirs.to(dtype).eval()


def polyvit(modality, gelu, dtype):
    model = Model(dim=48, depth=3, num_heads=4, mlp_dim=96, gelu=gelu)
    return PolyViT(model, {modality.name: modality}, {"task": (modality.name, 5)}).to(dtype).eval()


def load_blocks(ours, theirs):
    state = {}
    for index in range(len(ours.blocks)):
        source = {name.removeprefix(f"layers.{index}."): t for name, t in theirs.items() if name.startswith(f"layers.{index}.")}
        for kind in ("weight", "bias"):
            qkv = [source[f"attention.{part}_proj.{kind}"] for part in "qkv"]
            state[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(qkv)
            state |= {f"blocks.{index}.{to}.{kind}": source[f"{name}.{kind}"] for name, to in BLOCK_NAMES.items()}
    state |= {"norm.weight": theirs["layernorm.weight"], "norm.bias": theirs["layernorm.bias"]}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("tokenizers.", "heads.")) for name in missing)


def load_tokenizer(tokenizer, theirs, weight):
    """`weight` `[dim, channels, frames, rows, columns]`, as a convolution has it."""
    tokenizer.load_state_dict(
        {
            "weight": weight.permute(0, 2, 3, 4, 1),
            "bias": theirs["embeddings.patch_embeddings.projection.bias"],
            "cls_token": theirs["embeddings.cls_token"],
            "pos_embed": theirs["embeddings.position_embeddings"],
        }
    )


def all_token_blocks(model):
    """The blocks, with the last in a form that gives all tokens."""
    last = Block(48, 4, 96, gelu=model.blocks[-1].mlp.gelu).to(model.norm.weight.dtype)
    last.load_state_dict(model.blocks[-1].state_dict())
    return [*model.blocks[:-1], last]


def encode(model, modality, grid):
    x = model.tokenizers[modality](grid)
    for block in all_token_blocks(model):
        x = block(x)
    return model.norm(x)


def assert_equal(ours, theirs, tolerance):
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@torch.no_grad()
def test_image_path_is_vit(gelu, dtype, tolerance):
    config = ViTConfig(**SIZES, hidden_act=HIDDEN_ACT[gelu], image_size=32, patch_size=8)
    theirs = randomise(ViTModel(config, add_pooling_layer=False), dtype)
    ours = polyvit(Picture(size=32, patch=8), gelu, dtype)
    state = theirs.state_dict()
    load_blocks(ours, state)
    load_tokenizer(ours.tokenizers["picture"], state, state["embeddings.patch_embeddings.projection.weight"].unsqueeze(2))
    grid = random_bytes(2, 1, 32, 32, 3)
    pixels = (grid[:, 0].to(dtype) / 127.5 - 1).permute(0, 3, 1, 2)
    expected = theirs(pixel_values=pixels).last_hidden_state
    assert_equal(encode(ours, "picture", grid), expected, tolerance)
    torch.testing.assert_close(ours(grid, "task"), ours.heads["task"](expected[:, 0]), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp32", "fp64"])
@torch.no_grad()
def test_video_path_is_vivit(dtype, tolerance):
    config = VivitConfig(**SIZES, hidden_act="gelu_pytorch_tanh", image_size=32, num_frames=8, tubelet_size=[4, 16, 16])
    theirs = randomise(VivitModel(config, add_pooling_layer=False), dtype)
    ours = polyvit(Clip(frames=8, size=32, tubelet_frames=4), "tanh", dtype)
    state = theirs.state_dict()
    load_blocks(ours, state)
    load_tokenizer(ours.tokenizers["clip"], state, state["embeddings.patch_embeddings.projection.weight"])
    grid = random_bytes(2, 8, 32, 32, 3)
    pixels = (grid.to(dtype) / 127.5 - 1).permute(0, 1, 4, 2, 3)
    assert_equal(encode(ours, "clip", grid), theirs(pixel_values=pixels).last_hidden_state, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp32", "fp64"])
@torch.no_grad()
def test_audio_tubelets_and_blocks_are_ast_s(dtype, tolerance):
    config = ASTConfig(**SIZES, max_length=64, num_mel_bins=32, frequency_stride=16, time_stride=16)
    theirs = randomise(ASTModel(config), dtype)
    ours = polyvit(Sound(time=64, bins=32), "erf", dtype)
    state = theirs.state_dict()
    load_blocks(ours, state)
    # AST counts tokens (frequency, time), after two special ones; its kernel is [dim, 1, frequency, time] for one channel.
    to_ours = torch.arange(2 * 4).view(2, 4).T.flatten() + 2
    positions = state["embeddings.position_embeddings"]
    state["embeddings.position_embeddings"] = torch.cat([positions[:, :1], positions[:, to_ours]], 1)
    kernel = state["embeddings.patch_embeddings.projection.weight"].transpose(2, 3).unsqueeze(2) / 3
    load_tokenizer(ours.tokenizers["sound"], state, kernel.expand(-1, 3, -1, -1, -1))
    spectrogram = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    embedded = theirs.embeddings(spectrogram)
    tokens = ours.tokenizers["sound"](spectrogram.view(2, 1, 64, 32, 1).expand(-1, -1, -1, -1, 3))
    assert_equal(tokens[:, 1:], embedded[:, to_ours], tolerance)
    for block in all_token_blocks(ours):
        embedded = block(embedded)
    assert_equal(ours.norm(embedded), theirs(spectrogram).last_hidden_state, tolerance)
