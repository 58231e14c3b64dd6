"""Our model in other libraries, with our weights and its input as they take it: timm's ViT, Hugging Face's ViT, ViViT and AST."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from harness import assert_near
from machine import HAS_GPU
from torch import Tensor, nn

from polyvit_fast.config import Modality, Model, Task
from polyvit_fast.model.polyvit import PolyViT

EPS = 1e-6  # ours; as timm has it
HIDDEN_ACT = {"tanh": "gelu_pytorch_tanh", "erf": "gelu"}


@dataclass(frozen=True)
class PortedModel:
    """Another library's model, on the device and in training mode; `logits` calls it or what it was compiled to."""

    module: nn.Module
    pixels: Tensor

    def logits(self, call: Callable[[Tensor], object], pixels: Tensor) -> Tensor:
        """The logits in what a call gives."""
        found = call(pixels)
        return found if isinstance(found, Tensor) else found.logits  # pyright: ignore[reportAttributeAccessIssue]


def normalise(grid: Tensor, modality: Modality) -> Tensor:
    """The grid as others take it, who normalise before the model: fp32."""
    mean, std = (torch.tensor(values, device=grid.device) for values in modality.normalisation)
    return (grid.float() - mean) / std


def timm_vit(model: Model, task: Task, state: Mapping[str, Tensor], grid: Tensor) -> PortedModel:
    """timm's, which has our names."""
    _declare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    if model.gelu != "erf":
        raise ValueError("timm's GELU is the exact one")
    _, rows, columns, channels = task.modality.grid
    theirs = VisionTransformer(
        img_size=(rows, columns),
        patch_size=task.modality.tubelet[1],
        in_chans=channels,
        embed_dim=model.dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_dim / model.dim,
        num_classes=task.num_classes,
        drop_path_rate=task.drop_path_rate,
    )
    own = {name: tensor for name, tensor in state.items() if name.startswith(("blocks.", "norm."))}
    for kind in ("weight", "bias"):
        own |= {f"head.{kind}": _head(state, kind), f"patch_embed.proj.{kind}": _tokenizer(state, kind)}
    own["patch_embed.proj.weight"] = _kernel(state).squeeze(2)
    own |= {name: _tokenizer(state, name) for name in ("cls_token", "pos_embed")}
    theirs.load_state_dict(own)
    return PortedModel(theirs, normalise(grid, task.modality).squeeze(1).movedim(-1, 1).contiguous())


def hugging_face_vit(model: Model, task: Task, state: Mapping[str, Tensor], grid: Tensor) -> PortedModel:
    """Hugging Face's."""
    _declare_torchvision()
    from transformers import ViTConfig, ViTForImageClassification

    _, rows, _, channels = task.modality.grid
    sizes = {"image_size": rows, "patch_size": task.modality.tubelet[1], "num_channels": channels}
    theirs = ViTForImageClassification(ViTConfig(**_sizes(model, task), **sizes))
    _load(theirs, state, _kernel(state).squeeze(2), _tokenizer(state, "pos_embed"))
    return PortedModel(theirs, normalise(grid, task.modality).squeeze(1).movedim(-1, 1).contiguous())


def hugging_face_vivit(model: Model, task: Task, state: Mapping[str, Tensor], grid: Tensor) -> PortedModel:
    """Hugging Face's ViViT."""
    _declare_torchvision()
    from transformers import VivitConfig, VivitForVideoClassification

    frames, rows, _, channels = task.modality.grid
    sizes = {"image_size": rows, "num_frames": frames, "tubelet_size": list(task.modality.tubelet), "num_channels": channels}
    theirs = VivitForVideoClassification(VivitConfig(**_sizes(model, task), **sizes))
    _load(theirs, state, _kernel(state), _tokenizer(state, "pos_embed"))
    return PortedModel(theirs, normalise(grid, task.modality).movedim(-1, 2).contiguous())


def hugging_face_ast(model: Model, task: Task, state: Mapping[str, Tensor], grid: Tensor) -> PortedModel:
    """Hugging Face's AST, with patches that do not overlap.

    It has a second class token, whose output is averaged with that of the first, and one more norm before its head. Its second token is
    set to the first, so that the logits differ only by the weight that this gives it among all tokens.
    """
    _declare_torchvision()
    from transformers import ASTConfig, ASTForAudioClassification

    _, rows, columns, channels = task.modality.grid
    patch = task.modality.tubelet[1]
    if channels != 1:
        raise ValueError(f"AST takes one channel, the grid has {channels}")
    sizes = {"max_length": rows, "num_mel_bins": columns, "patch_size": patch, "frequency_stride": patch, "time_stride": patch}
    theirs = ASTForAudioClassification(ASTConfig(**_sizes(model, task), **sizes))
    # It counts tokens (frequency, time).
    first, rest = _tokenizer(state, "pos_embed").split([1, rows // patch * (columns // patch)], dim=1)
    rest = rest.unflatten(1, (rows // patch, columns // patch)).transpose(1, 2).flatten(1, 2)
    _load(theirs, state, _kernel(state).squeeze(2).transpose(2, 3), torch.cat([first, first, rest], 1))
    return PortedModel(theirs, normalise(grid, task.modality)[:, 0, :, :, 0].contiguous())


Build = Callable[[Model, Task, Mapping[str, Tensor], Tensor], PortedModel]


@torch.no_grad()
def port(build: Build, ours: PolyViT, model: Model, task: Task, grid: Tensor) -> PortedModel:
    """What `build` makes of our weights. Raises ValueError when its logits are not near ours."""
    with warnings.catch_warnings(), torch.device(grid.device):
        warnings.simplefilter("ignore")
        ported = build(model, task, ours.state_dict(), grid)
    ported.module.to(grid.device).train()
    some = slice(0, 2)
    with torch.autocast(grid.device.type, torch.bfloat16, enabled=HAS_GPU):
        found, expected = ported.logits(ported.module, ported.pixels[some]), ours(grid[some], next(iter(ours.heads)))
    assert_near((found,), (expected,))
    return ported


def _sizes(model: Model, task: Task) -> dict[str, object]:
    return {
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": HIDDEN_ACT[model.gelu],
        "layer_norm_eps": EPS,
        "num_labels": task.num_classes,
        "attn_implementation": "sdpa",
    }


@torch.no_grad()
def _load(theirs: nn.Module, state: Mapping[str, Tensor], kernel: Tensor, positions: Tensor) -> None:
    """Fill one of Hugging Face's; a layer's modules in the order in which all of its versions have them."""
    own = dict(theirs.named_parameters())
    named = {name.partition("embeddings.")[2]: parameter for name, parameter in own.items() if "embeddings." in name}
    named["patch_embeddings.projection.weight"].copy_(kernel)
    named["patch_embeddings.projection.bias"].copy_(_tokenizer(state, "bias"))
    named["position_embeddings"].copy_(positions)
    for name in ("cls_token", "distillation_token"):
        if name in named:
            named[name].copy_(_tokenizer(state, "cls_token"))
    layers = next(module for module in theirs.modules() if isinstance(module, nn.ModuleList))
    for index, layer in enumerate(layers):
        ours = {name.removeprefix(f"blocks.{index}."): tensor for name, tensor in state.items() if name.startswith(f"blocks.{index}.")}
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        norms = [module for module in layer.modules() if isinstance(module, nn.LayerNorm)]
        for kind in ("weight", "bias"):
            tensors = [*ours[f"attn.qkv.{kind}"].chunk(3), *(ours[f"{name}.{kind}"] for name in ("attn.proj", "mlp.fc1", "mlp.fc2"))]
            for module, tensor in zip([*linears, *norms], [*tensors, ours[f"norm1.{kind}"], ours[f"norm2.{kind}"]], strict=True):
                getattr(module, kind).copy_(tensor)
    head = [module for module in theirs.modules() if isinstance(module, nn.Linear)][-1]
    norm = next(module for name, module in theirs.named_modules() if name.count(".") == 1 and name.endswith(".layernorm"))
    for kind in ("weight", "bias"):
        getattr(norm, kind).copy_(state[f"norm.{kind}"])
        getattr(head, kind).copy_(_head(state, kind))


def _kernel(state: Mapping[str, Tensor]) -> Tensor:
    """As a convolution has it: [dim, channels, frames, rows, columns]."""
    return _tokenizer(state, "weight").movedim(-1, 1)


def _tokenizer(state: Mapping[str, Tensor], name: str) -> Tensor:
    [found] = [
        tensor for key, tensor in state.items() if key.startswith("tokenizers.") and key.count(".") == 2 and key.endswith(f".{name}")
    ]
    return found


def _head(state: Mapping[str, Tensor], kind: str) -> Tensor:
    [found] = [tensor for key, tensor in state.items() if key.startswith("heads.") and key.endswith(f".{kind}")]
    return found


def _declare_torchvision() -> None:
    from torchvision_without_extension import declare_operators

    declare_operators()
