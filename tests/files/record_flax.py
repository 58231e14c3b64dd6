"""Makes flax/: small models of Flax's own modules, their weights as JAX projects store them, and the logits that Flax computes.

    pip install flax safetensors && python tests/files/record_flax.py

jax 0.10.2 and flax 0.12.8 made the files. The trees of names are those of google-research/vision_transformer (.npz, before and after Flax
had linen), big_vision (layers stacked by a scan) and scenic (ViViT and PolyViT, in msgpack).
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "flax"
DIM, HEADS, HIDDEN, CLASSES = 24, 3, 40, 5
jax.config.update("jax_enable_x64", True)


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(HIDDEN)(x))
        return nn.Dense(DIM)(x)


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
        y = nn.LayerNorm()(x)
        return x + MlpBlock()(y)


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))


class Encoder(nn.Module):
    blocks: range
    has_positions: bool = True

    @nn.compact
    def __call__(self, x):
        x = Positions(name="posembed_input")(x) if self.has_positions else x
        for number in self.blocks:
            x = EncoderBlock(name=f"encoderblock_{number}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


def embed(module, x, tubelet):
    """Tokens of a grid, after a class token that belongs to `module`."""
    x = nn.Conv(DIM, tubelet, strides=tubelet, padding="VALID", name="embedding")(x)
    x = x.reshape(len(x), -1, DIM)
    cls = module.param("cls", nn.initializers.zeros, (1, 1, DIM))
    return jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], 1)


class ViT(nn.Module):
    tubelet: tuple
    head: str = "head"

    @nn.compact
    def __call__(self, x):
        x = Encoder(range(2), name="Transformer")(embed(self, x, self.tubelet))
        return nn.Dense(CLASSES, name=self.head)(x[:, 0])


class Tokenizer(nn.Module):
    tubelet: tuple

    @nn.compact
    def __call__(self, x):
        x = Positions(name="posembed_input")(embed(self, x, self.tubelet))
        return EncoderBlock(name="encoderblock_0")(x)  # an adaptor


class Tokenizers(nn.Module):
    @nn.compact
    def __call__(self, x, name):
        return Tokenizer((2, 4, 4) if name == "tokenizer3d" else (4, 4), name=name)(x)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="output_projection")(x)


class PolyViT(nn.Module):
    def setup(self):
        self.tokenizer = Tokenizers()
        self.vit_encoder = Encoder(range(1, 3), has_positions=False)
        self.classification_head_bit_pets = Head()
        self.classification_head_kinetics400 = Head()
        self.classification_head_vggsound = Head()

    def __call__(self, grids):
        heads = {
            "tokenizer2d": self.classification_head_bit_pets,
            "tokenizer3d": self.classification_head_kinetics400,
            "tokenizer_spec": self.classification_head_vggsound,
        }
        return {name: heads[name](self.vit_encoder(self.tokenizer(grid, name))[:, 0]) for name, grid in grids.items()}


def draw(tree, rng):
    """The tree with all weights drawn: std 0.15, scales around 1."""
    return jax.tree_util.tree_map_with_path(
        lambda path, value: np.float32(rng.normal(scale=0.15, size=value.shape) + (path[-1].key == "scale")), tree
    )


def run(model, inputs, seed):
    rng = np.random.default_rng(seed)
    grids = jax.tree_util.tree_map(lambda shape: np.float32(rng.uniform(-1, 1, shape)), inputs, is_leaf=lambda x: isinstance(x, tuple))
    params = draw(model.init(jax.random.PRNGKey(0), grids)["params"], rng)
    wide = jax.tree_util.tree_map(np.float64, (params, grids))
    return params, grids, model.apply({"params": wide[0]}, wide[1])


def rename_as_before_linen(name):
    for new, old in (("LayerNorm_1", "LayerNorm_2"), ("MlpBlock_0", "MlpBlock_3"), ("Attention_0", "Attention_1")):
        name = name.replace(new, old)
    return name


def stack(params):
    """The tree that a scan over the blocks has."""
    blocks = [params["Transformer"].pop(f"encoderblock_{number}") for number in range(2)]
    params["Transformer"]["encoderblock"] = jax.tree_util.tree_map(lambda *layers: np.stack(layers), *blocks)
    return params


def main():
    FOLDER.mkdir(exist_ok=True)
    truth = {}
    params, grid, logits = run(ViT((4, 4)), (2, 12, 12, 3), 0)
    truth |= {"vit.grid": grid, "vit.logits": np.asarray(logits)}
    flat = flatten_dict(params, sep="/")
    np.savez(FOLDER / "linen.npz", **flat)
    np.savez(FOLDER / "before-linen.npz", **{f"opt/target/{rename_as_before_linen(name)}": value for name, value in flat.items()})
    np.savez(FOLDER / "scanned.npz", **{f"params/{name}": value for name, value in flatten_dict(stack(params), sep="/").items()})
    params, grid, logits = run(ViT((2, 4, 4), "output_projection"), (2, 4, 8, 8, 3), 1)
    truth |= {"vivit.grid": grid, "vivit.logits": np.asarray(logits)}
    state = {"optimizer": {"target": params, "state": {"step": 3, "param_states": params["cls"]}}, "global_step": 3}
    (FOLDER / "vivit").mkdir(exist_ok=True)
    (FOLDER / "vivit" / "checkpoint_3").write_bytes(serialization.msgpack_serialize(state))
    shapes = {"tokenizer2d": (2, 12, 12, 3), "tokenizer3d": (2, 4, 8, 8, 3), "tokenizer_spec": (2, 20, 8, 3)}
    params, grids, logits = run(PolyViT(), shapes, 2)
    for name in shapes:
        truth |= {f"{name}.grid": grids[name], f"{name}.logits": np.asarray(logits[name])}
    state = {
        "params": params,
        "opt_state": {"0": {"mu": params["vit_encoder"]["encoder_norm"]}},
        "global_step": 3,
        "rng": np.zeros(2, np.uint32),
    }
    (FOLDER / "polyvit.msgpack").write_bytes(serialization.msgpack_serialize(state))
    save_file({name: np.ascontiguousarray(value) for name, value in truth.items()}, FOLDER / "truth.safetensors")


if __name__ == "__main__":
    main()
