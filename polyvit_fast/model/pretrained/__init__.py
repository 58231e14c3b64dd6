"""Weights that others have trained: read into a form of our own, and loaded into a PolyViT."""

from __future__ import annotations

from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained import hugging_face, jax, polyvit, timm, torchvision
from polyvit_fast.model.pretrained.files import read_files
from polyvit_fast.model.pretrained.weights import Pretrained

FORMATS = (polyvit, timm, hugging_face, torchvision, jax)


def read(source: str) -> Pretrained:
    """The weights of a file, a folder or a model on Hugging Face's hub, of any format known here.

    Raises ValueError that names the source when it cannot be read, is of an unknown format, or has a part that models here do not have.
    """
    tensors, config = read_files(source)
    for form in FORMATS:
        if form.recognise(tensors):
            try:
                return form.convert(tensors, config, source)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                if str(error).startswith(source):
                    raise
                kind = form.__name__.rpartition(".")[2]
                reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(
                    f"{source}: its tensors are named like those of {kind}, but {reason}. Is a config.json next to them another model's?"
                ) from error
    if not tensors:
        raise ValueError(f"{source} holds no tensors")
    names = ", ".join(list(tensors)[:3])
    raise ValueError(
        f"{source}: {len(tensors)} tensors of an unknown format ({names}, …); known are timm's ViT and DeiT, Hugging Face's ViT, DeiT, "
        "ViViT, AST and VideoMAE, torchvision's ViT, JAX's ViT, ViViT and PolyViT, and what `polyvit-fast export` writes"
    )


def load(source: str) -> PolyViT:
    """The model of a source, see `read`, with its head as the task "classes" if it has one; in evaluation mode."""
    return read(source).build()
