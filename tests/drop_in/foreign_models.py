"""Small models of other libraries, with weights so large that every part matters, each with a batch for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from polyvit_fast import fuse

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
Pair = tuple[nn.Module, Tensor]


def hugging_face_vit(**changes) -> Pair:
    from transformers import ViTConfig, ViTModel

    return randomised(ViTModel(ViTConfig(**(SIZES | {"image_size": 32, "patch_size": 16} | changes)), add_pooling_layer=False)), normal(
        2, 3, 32, 32
    )


def vivit(**changes) -> Pair:
    from transformers import VivitConfig, VivitModel

    config = VivitConfig(**SIZES, image_size=32, num_frames=4, tubelet_size=[2, 16, 16], **changes)
    return randomised(VivitModel(config, add_pooling_layer=False)), normal(2, 4, 3, 32, 32)


def ast(**changes) -> Pair:
    from transformers import ASTConfig, ASTModel

    return randomised(ASTModel(ASTConfig(**SIZES, max_length=32, num_mel_bins=32, **changes))), normal(2, 32, 32)


def deit(**changes) -> Pair:
    from transformers import DeiTConfig, DeiTModel

    return randomised(DeiTModel(DeiTConfig(**SIZES, image_size=32, patch_size=16, **changes), add_pooling_layer=False)), normal(
        2, 3, 32, 32
    )


def dinov2(**changes) -> Pair:
    from transformers import Dinov2Config, Dinov2Model

    return randomised(Dinov2Model(Dinov2Config(**_DINO_SIZES, **changes))), normal(2, 3, 28, 28)


def dinov2_with_registers(**changes) -> Pair:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    return randomised(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_DINO_SIZES, **changes))), normal(2, 3, 28, 28)


_DINO_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 28, "patch_size": 14}


def timm_vit(**changes) -> Pair:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 10}
    return randomised(VisionTransformer(**(sizes | changes))), normal(2, 3, 32, 32)


def timm_deit(**changes) -> Pair:
    from timm.models.deit import VisionTransformerDistilled

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 10}
    return randomised(VisionTransformerDistilled(**(sizes | changes))), normal(2, 3, 32, 32)


def timm_eva(**changes) -> Pair:
    from timm.models.eva import Eva

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 10}
    return randomised(Eva(**(sizes | changes))), normal(2, 3, 32, 32)


def torchvision_vit(**changes) -> Pair:
    from torchvision.models import VisionTransformer

    return randomised(VisionTransformer(32, 16, 2, 4, 64, 128, num_classes=10, **changes)), normal(2, 3, 32, 32)


FAMILIES: dict[str, Callable[..., Pair]] = {
    "Hugging Face ViT": hugging_face_vit,
    "Hugging Face ViViT": vivit,
    "Hugging Face AST": ast,
    "Hugging Face DeiT": deit,
    "Hugging Face DINOv2": dinov2,
    "Hugging Face DINOv2 with registers": dinov2_with_registers,
    "timm ViT": timm_vit,
    "timm DeiT": timm_deit,
    "timm EVA": timm_eva,
    "torchvision ViT": torchvision_vit,
}


def long(*names: str) -> list[object]:
    """Parameters of a test that `make test-all` runs alone."""
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    """In training mode, with all parameters drawn: std 0.15, around 1 where they scale."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
                if isinstance(module, nn.LayerNorm) and name == "weight":
                    parameter.add_(1)
    return model.train()


def tokens_of(output) -> Tensor:
    """The one tensor to look at in what a model returns."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def reasons(model: nn.Module) -> dict[str, str]:
    """Why `fuse` leaves modules, by their paths."""
    return {entry.path: entry.why for entry in fuse(model).left}
