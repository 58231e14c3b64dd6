"""The rows that `tiles.pick` reads, the first that fits wins. `benchmarks/tune.py` rewrites the rows of the card that it runs on."""

from collections.abc import Iterator
from dataclasses import replace

from polyvit_kernels.tiles.tile import ANY, Tile

_AMPERE = (80,)
_SMALL = (86, 89, 120)  # 99 KB of shared memory per block, mma.sync
_HOPPER = (90,)
_BLACKWELL = (100,)
_ALL = (80, 86, 89, 90, 100, 120)
_EVERY = ("fp32", "fp16", "bf16")
_H100 = "nvidia-h100-80gb-hbm3"

# What `benchmarks/tune.py` measured, a card after the other: it rewrites this tuple and nothing else.
_MEASURED = ()

# The choice between our kernels and a backend of torch's scaled_dot_product_attention, for both directions: what training takes decides.
# Up to 256 tokens attention is bound by memory and the libraries' tiles of 128 and more are wasted. Beyond, cuDNN is 1.10 to 1.44 times as
# fast as our portable kernels on Hopper, in both directions together, and leads by others' figures on Blackwell (arXiv 2407.08608), as does
# FlashAttention-2 elsewhere (cuDNN reaches 0.8 to 0.9 of it on A100, A10G and RTX PRO 6000: huggingface/transformers issue 48163).
# Hopper's own take heads of up to 80: 1.03 to 1.5 times cuDNN's forward and 1.3 to 2.0 times its backward at 257 to 1212 tokens
# (nvidia-h100-80gb-hbm3/hopper-attention-long.jsonl).
_ATTENTION_BACKEND = (
    Tile(op="attention", archs=_ALL, tokens=(1, 256), features=128),
    Tile(op="attention", archs=_HOPPER, features=80),
    Tile(op="attention", archs=(90, 100), tokens=(257, ANY), features=128, backend="cudnn", source="published"),
    Tile(op="attention", archs=(80, 86, 89, 120), tokens=(257, ANY), features=128, backend="flash", source="published"),
)

# (tokens, keys in chunks): only the last chunk may reach beyond the tokens.
_FINE = (
    ((1, 64), (64, 0, 0)),
    ((65, 80), (64, 16, 0)),
    ((81, 128), (128, 0, 0)),
    ((129, 144), (128, 16, 0)),
    ((145, 192), (128, 64, 0)),
    ((193, 208), (128, 64, 16)),
    ((209, 256), (128, 128, 0)),
)
# sm_80 spills with 64 + 16.
_FINE_AMPERE = (_FINE[0], ((65, 128), (128, 0, 0)), *_FINE[3:])
_COARSE = (((1, 64), (64, 0, 0)), ((65, 128), (128, 0, 0)), ((129, 192), (128, 64, 0)), ((193, 256), (128, 128, 0)))


def _block_d(features: int) -> int:
    return 1 << (features - 1).bit_length()


_ATTENTION_SHORT_FORWARD = tuple(
    Tile(
        op="attention_short_forward",
        archs=archs,
        tokens=tokens,
        features=features,
        blocks={"BLOCK_D": _block_d(features), "BLOCK_M": block_m, "KEYS_0": keys[0], "KEYS_1": keys[1], "KEYS_2": keys[2]},
        num_warps=warps,
    )
    for archs, features, block_m, warps in (
        *((archs, features, 32, 4) for archs in (_AMPERE, _SMALL) for features in (32, 64)),
        *((archs, features, 64, 8) for archs in (_AMPERE, _SMALL) for features in (80, 128)),
        *((archs, features, 64, 4) for archs in (_HOPPER, _BLACKWELL) for features in (32, 64, 80, 128)),
        (_HOPPER, 112, 64, 4),  # Hopper's own kernel does 128, but neither 96 nor 112
    )
    for tokens, keys in ((_FINE_AMPERE if archs == _AMPERE else _FINE) if features == 64 else _COARSE)
)

# Where no row is, the two-phase kernel of `_ATTENTION_LONG_BACKWARD` does it. Hopper: with two stages ptxas serialises wgmma (C7515).
_ATTENTION_SHORT_BACKWARD = tuple(
    Tile(
        op="attention_short_backward",
        archs=archs,
        tokens=tokens,
        features=features,
        blocks={"BLOCK_D": _block_d(features), "BLOCK_M": tokens[1], "BLOCK_N": block_n},
        num_warps=warps,
        num_stages=stages,
    )
    for archs, features, tokens, block_n, warps, stages in (
        *((archs, 32, (1, 64), 64, 4, 1) for archs in (_AMPERE, _SMALL, _HOPPER, _BLACKWELL)),
        *((archs, 32, (65, 128), 32, 4, 1 if archs == _HOPPER else 2) for archs in (_AMPERE, _SMALL, _HOPPER, _BLACKWELL)),
        *((archs, 32, (129, 256), 32, 8, 1 if archs == _HOPPER else 2) for archs in (_AMPERE, _SMALL, _HOPPER, _BLACKWELL)),
        *((archs, 64, (1, 64), 64, 4, 1) for archs in (_AMPERE, _SMALL, _HOPPER, _BLACKWELL)),
        *((archs, 64, (65, 128), 32, 8, 1) for archs in (_AMPERE, _SMALL)),
        *((archs, 64, (65, 128), 64, 8, stages) for archs, stages in ((_HOPPER, 1), (_BLACKWELL, 2))),
        *((archs, 64, (129, 256), 32, 8, 1) for archs in (_AMPERE, _BLACKWELL)),
        *((archs, features, (1, 64), 32, 8, 1) for archs in (_AMPERE, _SMALL, _HOPPER, _BLACKWELL) for features in (80, 128)),
        *((archs, features, (65, 128), 32, 8, 1) for archs in (_AMPERE, _HOPPER, _BLACKWELL) for features in (80, 128)),
    )
)

# A program of 168 registers shares an SM with two others: 71 us at 128 × 197 × 12 heads instead of 76 with two (cuDNN: 90). The backward,
# two on an SM, took 392 at 256 × 197 × 12 (cuDNN: 830). Both had the few rows after the blocks last then; now they come first, which was
# better in an earlier form and has not been timed in this one. Beyond 208 tokens, and in wide heads beyond 128, shared memory holds fewer
# programs. What is not here spills, or (the backward of heads of 64 from 209 tokens on) is slower.
_ATTENTION_SHORT_ON_HOPPER = tuple(
    Tile(
        op=f"attention_short_{direction}",
        archs=_HOPPER,
        tokens=tokens,
        features=features,
        backend="hopper",
        max_registers=registers,
        programs_per_sm=programs,
        allowed_spills=spills,
        source=f"{_H100}/hopper-attention-short.jsonl" if is_timed else "compiled",
    )
    for direction, tokens, features, registers, programs, spills, is_timed in (
        ("forward", (1, 208), 32, None, 2, 0, False),
        ("forward", (209, 256), 32, None, 2, 0, False),
        ("forward", (1, 256), 48, None, 2, 0, False),
        ("forward", (1, 208), 64, 168, 3, 0, False),
        ("forward", (209, 256), 64, None, 2, 0, True),
        ("forward", (1, 208), 80, None, 2, 0, False),
        ("forward", (256, 256), 80, None, 2, 0, True),
        ("forward", (1, 208), 128, None, 1, 0, False),
        ("forward", (256, 256), 128, None, 1, 0, True),
        ("backward", (1, 256), 32, None, 2, 0, False),
        ("backward", (1, 256), 48, None, 2, 0, False),
        ("backward", (1, 208), 64, None, 2, 0, False),
        ("backward", (1, 128), 80, None, 2, 0, False),
        ("backward", (129, 256), 80, None, 1, 40, True),
    )
)

# One program an SM of the short kernel takes 342 us at 128 × 256 × 12 heads of 64, the portable two-phase one 306; the long one for Hopper
# was not timed there.
_ATTENTION_BACKWARD_OF_256 = (
    Tile(op="attention_short_backward", archs=_HOPPER, tokens=(209, 256), features=64, backend="torch"),  # the long kernels' turn
    Tile(
        op="attention_long_backward",
        archs=_HOPPER,
        tokens=(209, 256),
        features=64,
        blocks={"BLOCK_D": 64, "BLOCK_M": 64, "BLOCK_N": 64, "KEYS_M": 64, "KEYS_N": 64},
    ),
)

_ATTENTION_LONG_FORWARD = tuple(
    Tile(
        op="attention_long_forward",
        archs=archs,
        features=features,
        blocks={"BLOCK_D": _block_d(features), "BLOCK_M": block_m, "BLOCK_N": block_n},
        num_warps=8,
        num_stages=stages,
    )
    for archs, features, block_m, block_n, stages in (
        *((archs, features, 128, 64, 2) for archs in (_AMPERE, _SMALL) for features in (32, 64)),
        *((_AMPERE, features, 64, 64, 2) for features in (80, 128)),
        *((_SMALL, features, 64, 64, stages) for features, stages in ((80, 1), (128, 2))),
        *((archs, features, 128, 64, 3) for archs in (_HOPPER, _BLACKWELL) for features in (32, 64)),
        *((archs, features, 128, 64, 2) for archs in (_HOPPER, _BLACKWELL) for features in (80, 128)),
    )
)

# Up to 256 tokens on Hopper: 559 us at 256 × 197 × 12 heads, where the short kernel's tiles take 702 (256/32, two stages, wgmma serialised)
# and 756 (one stage, 4 spills).
_ATTENTION_LONG_BACKWARD = tuple(
    Tile(
        op="attention_long_backward",
        archs=archs,
        tokens=tokens,
        features=features,
        blocks={"BLOCK_D": _block_d(features), "BLOCK_M": block, "BLOCK_N": step, "KEYS_M": step, "KEYS_N": block},
        num_warps=warps,
        num_stages=stages,
    )
    for archs, tokens, features, block, step, warps, stages in (
        *((archs, (1, ANY), features, 128, 32, 8, 3) for archs in (_AMPERE, _SMALL) for features in (32, 64)),
        *((_AMPERE, (1, ANY), features, 128, 32, 8, 2) for features in (80, 128)),
        *((_SMALL, (1, ANY), features, 64, 32, 4, 1) for features in (80, 128)),
        (_HOPPER, (129, 256), 64, 64, 64, 4, 1),
        *((archs, (1, ANY), features, 128, 64, 8, 2) for archs in (_HOPPER, _BLACKWELL) for features in (32, 64, 80, 128)),
    )
)

# Three consumers hide each other's exponentials; where accumulators leave no room for the rows that stay, two that hold them in registers
# are faster (537 us against 551 at 32 × 1212 × 12 heads, 185 against 201 at 64 × 401 × 12), and wide heads leave room for no more.
_ATTENTION_LONG_ON_HOPPER = tuple(
    Tile(
        op=f"attention_long_{direction}",
        archs=_HOPPER,
        features=features,
        backend="hopper",
        blocks=blocks,
        allowed_spills=spills,
        source="compiled" if features == 32 else f"{_H100}/hopper-attention-long.jsonl",
    )
    for direction, features, blocks, spills in (
        *(("forward", features, {"WARPGROUPS": 3, "BLOCK_N": 128, "STAGES": 4}, 0) for features in (32, 64)),
        ("forward", 80, {"WARPGROUPS": 2, "BLOCK_N": 128, "STAGES": 3}, 0),
        *(
            (
                "backward",
                features,
                {"WARPGROUPS": consumers, "BLOCK_N": 64, "STAGES": 4}
                | {"KEYS_WARPGROUPS": 2, "KEYS_BLOCK_N": 64, "KEYS_STAGES": 4, "KEYS_IN_REGISTERS": int(features <= 64)},
                spills,
            )
            for features, consumers, spills in ((32, 3, 0), (64, 3, 4), (80, 2, 13))
        ),
    )
)

_ATTENTION = (
    *_ATTENTION_BACKEND,
    *_ATTENTION_SHORT_ON_HOPPER,
    *_ATTENTION_BACKWARD_OF_256,
    *_ATTENTION_SHORT_FORWARD,
    *_ATTENTION_SHORT_BACKWARD,
    *_ATTENTION_LONG_ON_HOPPER,
    *_ATTENTION_LONG_FORWARD,
    *_ATTENTION_LONG_BACKWARD,
)

# Two programs share a processor (128 registers a thread on Hopper): one finishes its tile while the other multiplies. Where the product
# is deep, as in the second layer of an MLP, a wider tile reads less, and its end counts for little. Few rows: enough programs for the card.
# Such kernels on an H100 (gemm-prototypes.json, 50,432 rows, base128 and base256): 536 us against 551 with GELU, 797 against 938 with its
# gradient, 187 against 208 for 768 features, but 463 against 422 for 3072.
_MLP = tuple(
    Tile(
        op=op,
        archs=archs,
        tokens=tokens,
        features=features,
        blocks={"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "EPILOGUE_SUBTILES": parts},
        num_warps=warps,
        num_stages=stages,
    )
    for op in ("linear_gelu_forward", "linear_add_forward", "dgelu_backward")
    for archs, tokens, features, block_m, block_n, block_k, parts, warps, stages in (
        (_AMPERE, (1, 1024), ANY, 64, 64, 32, 2, 4, 4),
        (_AMPERE, (1025, ANY), ANY, 128, 128, 32, 4, 4, 4),
        (_SMALL, (1, 1024), ANY, 64, 64, 32, 2, 4, 4),
        (_SMALL, (1025, ANY), ANY, 128, 128, 32, 4, 4, 3),
        (_HOPPER, (1, 1024), ANY, 64, 64, 64, 2, 4, 4),
        (_BLACKWELL, (1, 1024), ANY, 64, 64, 64, 1, 8 if op == "dgelu_backward" else 4, 4),  # with 4 warps that one spills
        *((archs, (1025, ANY), 1536 if op == "linear_add_forward" else ANY, 128, 128, 64, 4, 8, 3) for archs in (_HOPPER, _BLACKWELL)),
        *((archs, (1025, ANY), ANY, 128, 256, 64, 4, 8, 3) for archs in (_HOPPER, _BLACKWELL) if op == "linear_add_forward"),
    )
)

# Parts of 8 rows are better for GELU (419 us instead of 444 for 50,432 rows, 768 to 3072 features), and worse for what reads a matrix
# beside (slope: 548 us instead of 378). An fp32 residual, loaded two parts ahead, spills where its warpgroup has 168 registers and not 184.
# The narrower rows are there for the portable ones of that width, which would come first.
_MLP_HOPPER = tuple(
    Tile(
        op=op,
        archs=_HOPPER,
        tokens=(1025, ANY),
        features=features,
        backend="hopper",
        blocks={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "STAGES": 3, "ROWS": rows, "REGISTERS": registers},
        max_registers=168,
        source=f"{_H100}/hopper-linear.jsonl",
    )
    for op, features, rows, registers in (
        ("linear_gelu_forward", ANY, 8, 168),
        ("linear_add_forward", 1536, 16, 160),
        ("linear_add_forward", ANY, 16, 160),
        ("dgelu_backward", ANY, 16, 160),
    )
)

_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}

# Backward: programs that a card's processors hold at once. With 768 features, rounded form and sums an H100 takes 233 us for fp32 with four
# programs of a row (274 with six), 147 us for bf16 with three of two rows (150). Beyond 4096 features they would spill.
_LAYER_NORM = (
    *(
        Tile(op="layer_norm_forward", archs=_ALL, features=features, dtypes=_EVERY, blocks={"ROWS": rows}, num_warps=warps)
        for features, rows, warps in ((256, 16, 8), (512, 8, 8), (1024, 4, 8), (2048, 2, 8), (4096, 1, 4), (8192, 1, 8))
    ),
    *(
        Tile(
            op="layer_norm_backward",
            archs=(arch,),
            features=features,
            dtypes=dtypes,
            blocks={"ROWS": rows, "PROGRAMS": processors * programs, "STAGES": 2},
            num_warps=warps,
            programs_per_sm=programs,
            max_registers=registers,
        )
        for arch, processors in _PROCESSORS.items()
        for dtypes in ((("fp32",), ("fp16", "bf16")) if arch == 90 else (_EVERY,))
        for features, rows, warps, programs, registers in (
            (256, 4, 4, 4, None),
            (512, 2, 4, 4, None),
            (1024, 2, 8, 3, 80) if arch == 90 and "bf16" in dtypes else (1024, 1, 4, 4, None),
            (2048, 1, 8, 3 if arch < 90 or dtypes == ("fp32",) else 2, None),
            (4096, 1, 16, 1, None),
        )
    ),
)

# Few tiles along the weight's rows: each gathers and normalises its tubelets anew.
_PATCH_EMBED = (
    *(
        Tile(
            op="patch_embed_forward",
            archs=archs,
            blocks={"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": depth},
            num_warps=8,
            num_stages=3,
        )
        for archs, depth in ((_AMPERE + _SMALL, 32), (_HOPPER + _BLACKWELL, 64))
    ),
    Tile(op="patch_embed_backward", archs=_ALL, blocks={"BLOCK_M": 16, "BLOCK_K": 256}),
)

_UPDATE = tuple(Tile(op=op, archs=_ALL, dtypes=("fp32",), blocks={"BLOCK": 1024}) for op in ("sgd_update", "adamw_update"))

_BY_HAND = (*_ATTENTION, *_MLP_HOPPER, *_MLP, *_LAYER_NORM, *_PATCH_EMBED, *_UPDATE)

# Of the rows of portable kernels and of choices, those timed as they stand on an H100, in bf16: op, tokens, features, and the file.
_TIMED = {
    ("attention", (1, ANY), 80): "hopper-attention-long.jsonl",
    ("attention", (1, 256), 128): "attention-today.json",
    ("attention", (257, ANY), 128): "attention-today.json",
    ("attention_short_forward", (193, 208), 64): "attention-today.json",
    ("attention_long_forward", (1, ANY), 64): "attention-today.json",
    ("attention_long_forward", (1, ANY), 80): "attention-today.json",
    ("attention_long_backward", (129, 256), 64): "attention-prototypes.json",
    ("attention_long_backward", (209, 256), 64): "hopper-attention-short.jsonl",
    ("attention_long_backward", (1, ANY), 64): "attention-today.json",
    ("attention_long_backward", (1, ANY), 80): "attention-today.json",
    ("linear_gelu_forward", (1025, ANY), ANY): "bench-mlp.json",
    ("linear_add_forward", (1025, ANY), 1536): "profile-vit-b-eager.txt",
    ("linear_add_forward", (1025, ANY), ANY): "profile-vit-b-eager.txt",
    ("dgelu_backward", (1025, ANY), ANY): "profile-vit-b-eager.txt",
    ("layer_norm_forward", (1, ANY), 1024): "bench-layer_norm.json",
    ("layer_norm_backward", (1, ANY), 1024): "norm-tiles.jsonl",
    ("patch_embed_forward", (1, ANY), ANY): "profile-vit-b-eager.txt",
    ("patch_embed_backward", (1, ANY), ANY): "profile-vit-b-eager.txt",
    ("adamw_update", (1, ANY), ANY): "profile-vit-b-eager.txt",
}


def _with_source(row: Tile) -> Iterator[Tile]:
    """The row, with Hopper's part apart where that was timed."""
    file = _TIMED.get((row.op, row.tokens, row.features))
    if file is None or 90 not in row.archs or row.backend == "hopper":
        yield row
        return
    yield replace(row, archs=_HOPPER, source=f"{_H100}/{file}")
    if others := tuple(arch for arch in row.archs if arch != 90):
        yield replace(row, archs=others)


# The narrowest row that fits comes first, and of equally narrow ones the measured one.
TABLE = tuple(
    sorted((*_MEASURED, *(part for row in _BY_HAND for part in _with_source(row))), key=lambda tile: tile.features),
)
