"""PolyViT in plain PyTorch, written out: the baseline in half precision, the truth in fp64."""

import torch
from torch.nn import functional


def plain_block(x, weights, num_heads):
    """A block with the tanh GELU; the tokens stay in their dtype."""

    def linear(name, inputs):
        return functional.linear(inputs, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name):
        precise = torch.promote_types(x.dtype, torch.float32)
        return functional.layer_norm(x.to(precise), x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    q, k, v = linear("attn.qkv", norm("norm1")).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + linear("attn.proj", mixed).to(x.dtype)
    return x + linear("mlp.fc2", functional.gelu(linear("mlp.fc1", norm("norm2")), approximate="tanh")).to(x.dtype)


def plain_polyvit(grid, modality, weights, num_heads, stream):
    """PolyViT with one task, by hand; the tokens have the dtype `stream` between its parts."""
    own = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"tokenizers.{modality.name}.")}
    mean, std = (torch.tensor(values, device=grid.device, dtype=own["weight"].dtype) for values in modality.normalisation)
    pixels, kernel = ((grid - mean) / std).permute(0, 4, 1, 2, 3), own["weight"].permute(0, 4, 1, 2, 3)
    embedded = functional.conv3d(pixels, kernel, own["bias"], stride=modality.tubelet).flatten(2).transpose(1, 2)
    x = (torch.cat([own["cls_token"].expand(len(grid), -1, -1), embedded], 1) + own["pos_embed"]).to(stream)
    for tensors in (own, weights):
        for number in range(sum(name.startswith("blocks.") and name.endswith("norm1.bias") for name in tensors)):
            start = f"blocks.{number}."
            x = plain_block(x, {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}, num_heads)
    precise = torch.promote_types(stream, torch.float32)
    normal = functional.layer_norm(x[:, 0].to(precise), x.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-6)
    return functional.linear(normal, weights["heads.task.weight"], weights["heads.task.bias"])
