"""The rows that `tiles.pick` reads: first those measured on a GPU (`measured/`), which a tuner writes, then the compiled ones of this file.

The comments give measurements of an H100 unless they name another GPU.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.resources import files

from polyvit_kernels.tiles.json_rows import load_rows
from polyvit_kernels.tiles.tile import ANY, Tile

MEASURED = tuple(
    row
    for file in sorted(files("polyvit_kernels.tiles").joinpath("measured").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".json")
    for row in load_rows(file)
)
"""The rows of every GPU that has been measured; `source` names the file with the times, under `benchmarks/results`."""

_AMPERE = (80,)
_SMALL = (86, 89, 120)  # 99 KB of shared memory per block, mma.sync
_HOPPER = (90,)
_BLACKWELL = (100,)
_ALL = (80, 86, 89, 90, 100, 120)
_EVERY = ("fp32", "fp16", "bf16")

# The choice between our kernels and a backend of torch's scaled_dot_product_attention, for both directions: what training takes decides.
# Up to 256 tokens attention is bound by memory, and the libraries' tiles of 128 rows and more are wasted. Beyond, cuDNN is 1.10 to 1.44
# times as fast as our portable kernels on Hopper, both directions together. On Blackwell it leads by the figures of others
# (arXiv 2407.08608), elsewhere FlashAttention-2 does (cuDNN reaches 0.8 to 0.9 of its speed on A100, A10G and RTX PRO 6000:
# huggingface/transformers issue 48163). Our kernels for Hopper take heads of up to 80 at any length: 1.03 to 1.5 times the speed of
# cuDNN's forward, and 1.3 to 2.0 times that of its backward, at 257 to 1212 tokens.
_ATTENTION_BACKEND = (
    Tile(op="attention", archs=_ALL, tokens=(1, 256), features=128),
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


# Timed on an H100, but not in `MEASURED`, whose rows come first: Hopper's own kernel is to come before this one.
_TIMED_SHORT_FORWARD = (_HOPPER, 64, (193, 208))

_ATTENTION_SHORT_FORWARD = tuple(
    Tile(
        op="attention_short_forward",
        archs=archs,
        tokens=tokens,
        features=features,
        blocks={"BLOCK_D": _block_d(features), "BLOCK_M": block_m, "KEYS_0": keys[0], "KEYS_1": keys[1], "KEYS_2": keys[2]},
        num_warps=warps,
        source="nvidia-h100-80gb-hbm3/attention-today.json" if (archs, features, tokens) == _TIMED_SHORT_FORWARD else "compiled",
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

# With 168 registers a thread three programs fit an SM: 71 us at 128 × 197 × 12 heads, 76 us with two programs (cuDNN: 90 us). The backward,
# two programs on an SM, took 392 us at 256 × 197 × 12 (cuDNN: 830 us). In both the rows beyond the last whole block came last then; now
# they come first, which was faster in an earlier version of the kernels and has not been timed in this one. Beyond 208 tokens, and in wide
# heads beyond 128, shared memory holds fewer programs. What is not here spills, or is slower (the backward of heads of 64 from 209 tokens).
_ATTENTION_SHORT_ON_HOPPER = tuple(
    Tile(
        op=f"attention_short_{direction}",
        archs=_HOPPER,
        tokens=tokens,
        features=features,
        backend="hopper",
        max_registers=registers,
        programs_per_sm=programs,
    )
    for direction, tokens, features, registers, programs in (
        ("forward", (1, 208), 32, None, 2),
        ("forward", (209, 256), 32, None, 2),
        ("forward", (1, 256), 48, None, 2),
        ("forward", (1, 208), 64, 168, 3),
        ("forward", (1, 208), 80, None, 2),
        ("forward", (1, 208), 128, None, 1),
        ("backward", (1, 256), 32, None, 2),
        ("backward", (1, 256), 48, None, 2),
        ("backward", (1, 208), 64, None, 2),
        ("backward", (1, 128), 80, None, 2),
    )
)

# The long kernel takes over: 306 us at 128 × 256 × 12 heads of 64, where the short one for Hopper, one program on an SM, takes 342 us.
# The long one for Hopper has not been timed at these sizes.
_ATTENTION_BACKWARD_OF_256 = (Tile(op="attention_short_backward", archs=_HOPPER, tokens=(209, 256), features=64, backend="torch"),)

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

# Up to 256 tokens Hopper has a measured row: 559 us at 256 × 197 × 12 heads, where the short kernel's tiles take 702 us (256/32, two
# stages, wgmma serialised) and 756 us (one stage, 4 spills).
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
        *((archs, (1, ANY), features, 128, 64, 8, 2) for archs in (_HOPPER, _BLACKWELL) for features in (32, 64, 80, 128)),
    )
)

# Three consumer warpgroups hide each other's exponentials. Where accumulators leave no room for the rows that stay, two that hold them in
# registers are faster (537 us against 551 us at 32 × 1212 × 12 heads, 185 us against 201 us at 64 × 401 × 12); wide heads leave room for
# no more than two. Heads of 64 and 80 are measured.
_ATTENTION_LONG_ON_HOPPER = tuple(
    Tile(op=f"attention_long_{direction}", archs=_HOPPER, features=32, backend="hopper", blocks=blocks)
    for direction, blocks in (
        ("forward", {"WARPGROUPS": 3, "BLOCK_N": 128, "STAGES": 4}),
        (
            "backward",
            {"WARPGROUPS": 3, "BLOCK_N": 64, "STAGES": 4}
            | {"KEYS_WARPGROUPS": 2, "KEYS_BLOCK_N": 64, "KEYS_STAGES": 4, "KEYS_IN_REGISTERS": 1},
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

# An SM runs two programs (128 registers a thread on Hopper): one stores its tile while the other multiplies. If the product is deep, as
# in the second layer of an MLP, a wider tile reads less, and its epilogue counts for little. With few rows small tiles give every SM work.
# Such kernels take (gemm-prototypes.json, 50,432 rows, base128 and base256) 536 us against 551 us with GELU, 797 us against 938 us with
# its gradient, 187 us against 208 us for 768 features, but 463 us against 422 us for 3072.
# From 1025 rows on Hopper's rows are measured, those of its own kernels before the portable ones. Steps of 8 rows in the epilogue are
# faster for GELU (419 us instead of 444 us for 50,432 rows, 768 to 3072 features) and slower for what reads a second matrix (GELU's
# gradient: 548 us instead of 378 us). An fp32 residual, loaded two steps ahead, spills where its warpgroup has 168 registers, not 184.
_MLP = tuple(
    Tile(
        op=op,
        archs=archs,
        tokens=tokens,
        features=features,
        blocks={"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "EPILOGUE_SUBTILES": subtiles},
        num_warps=warps,
        num_stages=stages,
    )
    for op in ("linear_gelu_forward", "linear_add_forward", "dgelu_backward")
    for archs, tokens, features, block_m, block_n, block_k, subtiles, warps, stages in (
        (_AMPERE, (1, 1024), ANY, 64, 64, 32, 2, 4, 4),
        (_AMPERE, (1025, ANY), ANY, 128, 128, 32, 4, 4, 4),
        (_SMALL, (1, 1024), ANY, 64, 64, 32, 2, 4, 4),
        (_SMALL, (1025, ANY), ANY, 128, 128, 32, 4, 4, 3),
        (_HOPPER, (1, 1024), ANY, 64, 64, 64, 2, 4, 4),
        (_BLACKWELL, (1, 1024), ANY, 64, 64, 64, 1, 8 if op == "dgelu_backward" else 4, 4),  # with 4 warps that one spills
        (_BLACKWELL, (1025, ANY), 1536 if op == "linear_add_forward" else ANY, 128, 128, 64, 4, 8, 3),
        *((archs, (1025, ANY), ANY, 128, 256, 64, 4, 8, 3) for archs in (_BLACKWELL,) if op == "linear_add_forward"),
    )
)

_NUM_SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}

# Backward: as many programs as the SMs hold at once. With 768 features, a bf16 copy and column sums it takes 233 us for fp32 with four
# programs of a row on an SM (274 us with six), 147 us for bf16 with three of two rows (150 us with four of one row). Beyond 4096 features
# the kernel would spill. So it does at 4096 in fp16 on sm_90, where ptxas by itself stops at 64 registers: an SM has 128 for each thread.
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
            blocks={"ROWS": rows, "PROGRAMS": num_sms * programs, "STAGES": 2},
            num_warps=warps,
            max_registers=128 if features == 4096 and arch == 90 and dtypes != ("fp32",) else None,
            programs_per_sm=programs,
        )
        for arch, num_sms in _NUM_SMS.items()
        for dtypes in ((("fp32",), ("fp16", "bf16")) if arch == 90 else (_EVERY,))
        for features, rows, warps, programs in (
            (256, 4, 4, 4),
            (512, 2, 4, 4),
            (1024, 1, 4, 4),
            (2048, 1, 8, 3 if arch < 90 or dtypes == ("fp32",) else 2),
            (4096, 1, 16, 1),
        )
    ),
)

# Wide tiles along the weight's rows, as each gathers and normalises its tubelets again.
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

_COMPILED = (*_ATTENTION, *_MLP, *_LAYER_NORM, *_PATCH_EMBED, *_UPDATE)


def _exclude_measured(rows: Iterable[Tile]) -> Iterator[Tile]:
    """The rows without the GPUs for which `MEASURED` has one of the same kernel for the same sizes."""
    measured = {(_limits(row), arch) for row in MEASURED for arch in row.archs}
    for row in rows:
        if archs := tuple(arch for arch in row.archs if (_limits(row), arch) not in measured):
            yield replace(row, archs=archs)


def _limits(row: Tile) -> tuple[object, ...]:
    return row.op, row.tokens, row.features, row.dtypes, row.backend


TABLE = tuple(sorted((*MEASURED, *_exclude_measured(_COMPILED)), key=lambda row: row.features))
"""The narrowest row that fits comes first, and of equally narrow ones the measured one."""
