"""A task as a module of PyTorch's own layers, whose graph `torch.export` and ONNX take: from pixels or a spectrogram to logits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from polyvit_fast.model.export.plain import PlainViT
from polyvit_fast.model.modules import GELU
from polyvit_fast.model.pretrained.weights import Tensors, select


class PlainModule(nn.Module):
    """A task in evaluation. What it takes is in the usual layout: `[batch, channels, rows, columns]` of a picture, `[batch, frames,
    channels, rows, columns]` of a clip, `[batch, rows, columns]` of a spectrogram, not yet normalised.
    """

    mean: Tensor
    std: Tensor
    cls_token: Tensor | None

    def __init__(self, vit: PlainViT) -> None:
        super().__init__()
        model, grid, own = vit.model, vit.grid, vit.tensors
        assert vit.head
        weight = vit.merge_channels().movedim(-1, 1)  # [dim, channels, frames, rows, columns]
        channels = weight.shape[1]
        self.is_clip, self.is_mono = grid.sizes[0] > 1, vit.preprocessing.is_mono and grid.sizes[0] == 1
        self.stride = grid.token_stride if self.is_clip else grid.token_stride[1:]
        self.pool, self.num_class_tokens = grid.pool, grid.num_class_tokens
        self.weight = nn.Parameter((weight if self.is_clip else weight[:, :, 0]).contiguous())
        self.bias, self.pos_embed = nn.Parameter(own["bias"]), nn.Parameter(own["pos_embed"])
        self.cls_token = nn.Parameter(own["cls_token"]) if vit.class_tokens else None
        for name, values in zip(("mean", "std"), grid.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values[:channels], dtype=weight.dtype).view(-1, *[1] * len(self.stride)))
        self.blocks = nn.Sequential(
            *(PlainBlock(select(own, f"blocks.{number}."), model.num_heads, model.gelu, model.norm_eps) for number in range(model.depth))
        )
        self.norm, head = _make_norm(own, "norm", vit.last_norm_eps), vit.head.tensors
        self.head = (
            nn.Sequential(_make_norm(head, "norm", model.norm_eps), _make_linear(head, "")) if vit.has_head_norm else _make_linear(head, "")
        )

    def forward(self, grid: Tensor) -> Float[Tensor, "batch num_classes"]:
        """The logits."""
        x = grid.to(self.weight.dtype)
        if self.is_mono:
            x = x.unsqueeze(1)
        elif self.is_clip:
            x = x.transpose(1, 2)
        convolve = functional.conv3d if self.is_clip else functional.conv2d
        x = convolve((x - self.mean) / self.std, self.weight, self.bias, self.stride).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.blocks(x + self.pos_embed)
        if self.pool == "mean":
            return self.head(self.norm(x[:, self.num_class_tokens :].mean(1)))
        return self.head(self.norm(x[:, : self.num_class_tokens if self.pool == "class_tokens" else 1]).mean(1))


class PlainBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, own: Tensors, num_heads: int, gelu: str, norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.gelu = num_heads, GELU[gelu]
        self.norm1, self.norm2 = (_make_norm(own, name, norm_eps) for name in ("norm1", "norm2"))
        self.qkv, self.proj = _make_linear(own, "attn.qkv."), _make_linear(own, "attn.proj.")
        self.fc1, self.fc2 = _make_linear(own, "mlp.fc1."), _make_linear(own, "mlp.fc2.")

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The tokens after both branches."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


def lay_out(vit: PlainViT, grids: Tensor) -> Tensor:
    """Grids `[batch, frames, rows, columns, channels]` in the layout that `PlainModule` takes."""
    if vit.grid.sizes[0] > 1:
        return grids.permute(0, 1, 4, 2, 3)
    return grids[:, 0, :, :, 0] if vit.preprocessing.is_mono else grids[:, 0].permute(0, 3, 1, 2)


def describe_layout(vit: PlainViT) -> str:
    """The layout that `PlainModule` takes, in words."""
    frames, rows, columns, channels = vit.grid.sizes
    if frames > 1:
        return f"[batch, {frames} frames, {channels} channels, {rows} rows, {columns} columns]"
    size = f"{rows} rows, {columns} columns]"
    return f"[batch, {size}" if vit.preprocessing.is_mono else f"[batch, {channels} channels, {size}"


@torch.no_grad()
def trace(vit: PlainViT) -> torch.export.ExportedProgram:
    """The graph of a task, for any batch."""
    example = lay_out(vit, torch.zeros(2, *vit.grid.sizes, dtype=getattr(torch, vit.preprocessing.dtype))).contiguous()
    return torch.export.export(PlainModule(vit).eval(), (example,), dynamic_shapes={"grid": {0: torch.export.Dim("batch")}})


def _make_norm(own: Tensors, name: str, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(own[f"{name}.weight"]), eps)
    norm.weight, norm.bias = nn.Parameter(own[f"{name}.weight"]), nn.Parameter(own[f"{name}.bias"])
    return norm


def _make_linear(own: Tensors, prefix: str) -> nn.Linear:
    weight = own[f"{prefix}weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(own[f"{prefix}bias"])
    return linear
