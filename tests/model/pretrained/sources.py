"""Weights in canonical form, drawn at random, as a file of them would be read."""

import torch
from grids import SMALL

from polyvit_fast.config import Model
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.weights import HeadWeights, Pretrained, TokenizerWeights, shift_block

MODEL = Model(dim=32, depth=3, num_heads=4, mlp_dim=64)


def draw(model: PolyViT, seed: int = 0) -> PolyViT:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def as_source(polyvit: PolyViT, model: Model, modalities, classes=None, **changes) -> Pretrained:
    """What a PolyViT would be read as."""
    tensors = {name: tensor.detach().clone() for name, tensor in polyvit.named_parameters()}

    def select(prefix):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    tokenizers = {
        name: TokenizerWeights(
            tensors=select(f"tokenizers.{name}."),
            tubelets=modality.tubelets,
            num_class_tokens=modality.num_class_tokens,
            pool=modality.pool,
            positions=modality.positions,
        )
        for name, modality in modalities.items()
    }
    heads = {
        task: HeadWeights(modality=modality, tensors=select(f"heads.{task}."), class_names=(classes or {}).get(task))
        for task, modality in polyvit.modality_of.items()
    }
    trunk = {shift_block(name, model.num_adaptor_layers): t for name, t in tensors.items() if name.startswith(("blocks.", "norm."))}
    fields = {"source": "some.file", "kind": "test", "model": model, "tokenizers": tokenizers, "trunk": trunk, "heads": heads}
    return Pretrained(**(fields | changes))


def picture_source(model: Model = MODEL, modality=SMALL["picture"], classes=None) -> Pretrained:
    """A ViT with a head of four classes, as other libraries have it."""
    polyvit = draw(PolyViT(model, {"picture": modality}, {"classes": ("picture", 4)}), seed=3)
    return as_source(polyvit, model, {"picture": modality}, {"classes": classes} if classes else None)
