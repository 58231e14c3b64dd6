"""Small models on small grids, for tests of whole steps."""

import torch
from steps import StepCase

from polyvit_fast.config import Modality, Model, Task
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.model.polyvit import PolyViT

PICTURE = Image(size=32)


def case_of(modality: Modality = PICTURE, gelu="erf", **changes) -> StepCase:
    task = Task(**({"modality": modality, "train": Synthetic(), "val": Synthetic(), "num_classes": 7, "steps": 1, "batch": 4} | changes))
    return StepCase(model=Model(dim=48, depth=3, num_heads=4, mlp_dim=96, gelu=gelu), task=task)


@torch.no_grad()
def model_of(case: StepCase) -> PolyViT:
    """With weights so large that every part matters."""
    model, generator = PolyViT.from_config(case.config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
