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

    return randomised(Dinov2Model(Dinov2Config(**(_DINO_SIZES | changes)))), normal(2, 3, 28, 28)


def dinov2_with_registers(**changes) -> Pair:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    return randomised(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_DINO_SIZES, **changes))), normal(2, 3, 28, 28)


_DINO_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 28, "patch_size": 14}


def videomae(**changes) -> Pair:
    from transformers import VideoMAEConfig, VideoMAEModel

    sizes = SIZES | {"image_size": 32, "patch_size": 16, "num_frames": 4, "tubelet_size": 2, "use_mean_pooling": False}
    return randomised(VideoMAEModel(VideoMAEConfig(**(sizes | changes)))), normal(2, 4, 3, 32, 32)


def clip(**changes) -> Pair:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return randomised(CLIPVisionModel(CLIPVisionConfig(**(SIZES | {"image_size": 32, "patch_size": 16} | changes)))), normal(2, 3, 32, 32)


def siglip(**changes) -> Pair:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = SIZES | {"image_size": 32, "patch_size": 16, "vision_use_head": False}
    return randomised(SiglipVisionModel(SiglipVisionConfig(**(sizes | changes)))), normal(2, 3, 32, 32)


class Siglip2OfPatches(nn.Module):
    """SigLIP2's vision model, which takes a mask and the pictures' shapes besides their patches; here all have 2 × 3 of these."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor) -> Tensor:
        """Its tokens."""
        mask, shapes = patches.new_ones(patches.shape[:2], dtype=torch.long), torch.tensor([[2, 3]]).expand(len(patches), 2)
        return self.model(patches, mask, shapes).last_hidden_state


def siglip2(**changes) -> Pair:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes = SIZES | {"num_patches": 16, "patch_size": 4, "vision_use_head": False}
    return randomised(Siglip2OfPatches(Siglip2VisionModel(Siglip2VisionConfig(**(sizes | changes))))), normal(2, 6, 48)


def timm_vit(**changes) -> Pair:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 10}
    return randomised(VisionTransformer(**(sizes | changes))), normal(2, 3, 32, 32)


def timm_vit_with_layer_scale(**changes) -> Pair:
    return timm_vit(**({"init_values": 0.1} | changes))


def timm_vit_with_qk_norm(**changes) -> Pair:
    return timm_vit(**({"qk_norm": True} | changes))


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
    "Hugging Face VideoMAE": videomae,
    "Hugging Face CLIP": clip,
    "Hugging Face SigLIP": siglip,
    "Hugging Face SigLIP2": siglip2,
    "timm ViT": timm_vit,
    "timm ViT with LayerScale": timm_vit_with_layer_scale,
    "timm ViT with qk-norm": timm_vit_with_qk_norm,
    "timm DeiT": timm_deit,
    "timm EVA": timm_eva,
    "torchvision ViT": torchvision_vit,
}


def is_zero(name: str) -> bool:
    """Whether a parameter is added to all keys alike, which changes nothing: its gradient is zero, and what is found is rounding."""
    return name.endswith(("k_proj.bias", "k_norm.bias"))


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
