"""A task as timm's `VisionTransformer`: what `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

Any of its entry points builds any size, as the arguments in config.json take precedence; which one is named there matters to people alone.
"""

from __future__ import annotations

from typing import Any

from polyvit_fast.model.export.plain import Converted, PlainViT, find_unit_levels, make_contiguous

NORM_EPS = 1e-6
"""That of timm's LayerNorm, which its config.json cannot change."""
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
"""What timm calls a model of this dim."""
PATCHES = {"tiny": (16,), "small": (8, 16, 32), "base": (8, 16, 32), "large": (14, 16, 32)}
"""The patches of its entry points `vit_SIZE_patchN_224`."""
GELUS = {"erf": "gelu", "tanh": "gelu_tanh"}


def convert(vit: PlainViT) -> Converted:
    """The model in timm's form. Raises ValueError that says why where timm has no such model."""
    faults = find_faults(vit)
    if faults:
        raise ValueError(f"timm's VisionTransformer cannot hold this model: {'; '.join(faults)}")
    weight = vit.merge_channels()
    tensors = {"patch_embed.proj.weight": weight[:, 0].movedim(-1, 1), "patch_embed.proj.bias": vit.tensors["bias"]}
    tensors |= dict(zip(_name_tokens(vit), vit.class_tokens, strict=False))
    tensors["pos_embed"] = vit.tensors["pos_embed"]
    tensors |= {name: tensor for name, tensor in vit.tensors.items() if name.startswith("blocks.")}
    norm = "fc_norm" if vit.grid.pool == "mean" else "norm"
    tensors |= {f"{norm}.{key}": vit.tensors[f"norm.{key}"] for key in ("weight", "bias")}
    if vit.head:
        for head in _name_heads(vit):
            tensors |= {f"{head}.{key}": vit.head.tensors[key] for key in ("weight", "bias")}
    remarks = vit.describe_merging()
    if vit.grid.positions == "sinusoidal":
        remarks.append("The fixed sines and cosines of the positions are weights here.")
    return Converted(tensors=make_contiguous(tensors), configs={"config.json": _make_config(vit, weight.shape[4])}, remarks=remarks)


def find_faults(vit: PlainViT) -> list[str]:
    """What timm's class has no parameter for."""
    frames, norm_eps = vit.grid.sizes[0], vit.model.norm_eps
    return [
        text
        for text, is_fault in {
            f"it takes {frames} frames at once, timm's takes one picture (hf has ViViT and VideoMAE)": frames > 1,
            f"its norm_eps is {norm_eps:g}, timm's is {NORM_EPS:g} (train with --model.norm-eps {NORM_EPS:g}, or export to hf)": norm_eps
            != NORM_EPS,
            f"its last_norm_eps is {vit.last_norm_eps:g}, timm's is {NORM_EPS:g}": vit.last_norm_eps != norm_eps == NORM_EPS,
            "its tokens overlap (patch_stride is less than patch), timm's do not": vit.grid.token_stride != vit.grid.tubelet,
            "its head normalises what it reads (head_norm), timm's does not": vit.has_head_norm,
        }.items()
        if is_fault
    ]


def _name_tokens(vit: PlainViT) -> tuple[str, ...]:
    """The second class token is DeiT's for distillation where heads read both, else a register."""
    return "cls_token", "dist_token" if vit.reads_mean_of_class_tokens else "reg_token"


def _name_heads(vit: PlainViT) -> tuple[str, ...]:
    """DeiT gives the mean of two heads' logits, which of two equal heads is that of the tokens' mean."""
    return ("head", "head_dist") if vit.reads_mean_of_class_tokens else ("head",)


def _make_config(vit: PlainViT, channels: int) -> dict[str, Any]:
    model, grid = vit.model, vit.grid
    mean, std = (find_unit_levels(values[:channels]) for values in grid.normalisation)
    arguments = {
        "img_size": list(grid.sizes[1:3]),
        "patch_size": grid.tubelet[1] if grid.tubelet[1] == grid.tubelet[2] else list(grid.tubelet[1:]),
        "in_chans": channels,
        "embed_dim": model.dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": _find_ratio(model.mlp_dim, model.dim),
        "act_layer": GELUS[model.gelu],
        "class_token": grid.num_class_tokens > 0,
    }
    if grid.num_class_tokens == 2 and not vit.reads_mean_of_class_tokens:
        arguments["reg_tokens"] = 1
    pool = "avg" if grid.pool == "mean" else "token"
    names = {"label_names": list(vit.class_names)} if vit.class_names else {}
    heads = list(_name_heads(vit))
    files = {
        "input_size": [channels, *grid.sizes[1:3]],
        "fixed_input_size": True,
        **vit.preprocessing.timm,
        "mean": mean,
        "std": std,
        "num_classes": vit.num_classes,
        "pool_size": None,
        # Of kernels with other than three channels, timm would make new ones for as many as it is asked for.
        "first_conv": "patch_embed.proj" if channels == 3 else None,
        "classifier": heads if len(heads) > 1 else heads[0],
    }
    return {
        "architecture": _name_architecture(vit),
        "num_classes": vit.num_classes,
        "num_features": model.dim,
        "global_pool": pool,
        **names,
        "model_args": {**arguments, "global_pool": pool},
        "pretrained_cfg": files,
    }


def _name_architecture(vit: PlainViT) -> str:
    if vit.reads_mean_of_class_tokens:
        return "deit_base_distilled_patch16_224"
    size, patch = SIZES.get(vit.model.dim, "base"), vit.grid.tubelet[1]
    return f"vit_{size}_patch{patch if patch in PATCHES[size] else 16}_224"


def _find_ratio(mlp_dim: int, dim: int) -> float:
    """timm's mlp_ratio, of which it takes int(dim * ratio)."""
    ratio = mlp_dim / dim
    return ratio if int(dim * ratio) == mlp_dim else (mlp_dim + 0.5) / dim
