"""What a fused module saves against its library's own code, in kernels that read and write all tokens; measured where a GPU has run it."""

from __future__ import annotations

from typing import NamedTuple

from polyvit_fast.drop_in.attention import packs
from polyvit_fast.drop_in.parts import AttentionPart, BlockPart, MlpPart, Part
from polyvit_kernels.layers import is_plain

KERNEL_HEADS = 16
"""Heads whose width this does not divide are PyTorch's on a GPU (`polyvit_kernels.attention`)."""


class Gain(NamedTuple):
    """What is done within another kernel, and how many kernels over the tokens PyTorch runs for it, forward and backward."""

    what: str
    forward: int = 0
    backward: int = 0


def gains(part: Part) -> tuple[Gain, ...]:
    """Of a module and its parts on a GPU in bf16 or fp16, against the same operation by operation."""
    if isinstance(part, BlockPart):
        return (*_block_gains(part), *gains(part.attention), *gains(part.mlp))
    if isinstance(part, AttentionPart):
        return _attention_gains(part)
    if isinstance(part, MlpPart):
        forward, backward = (3, 5) if part.gelu == "quick" else (1, 1)
        # The bias gradient of fc1 is one more.
        return (Gain("GELU in fc1's product, its slope and fc1's bias gradient in that of the backward", forward, backward + 1),)
    return (Gain("gradients of input and parameters in one pass"),)


def _block_gains(part: BlockPart) -> tuple[Gain, ...]:
    # An adapted projection is called, and its sum with the residual is a kernel of its own.
    products = 2 if is_plain(part.attention.proj) else 1
    found = [
        Gain("residuals added by the products before them, in the backward by the norms, with their bias gradients", products, 2 + products)
    ]
    scales = sum(scale is not None for scale in part.scales)
    if scales:
        found.append(Gain("LayerScale in the weights (in fp16 in both sums, which are then kernels of their own)", scales, 3 * scales))
    return tuple(found)


def _attention_gains(part: AttentionPart) -> tuple[Gain, ...]:
    found = []
    if part.linears and packs(part.linears):
        more, biases = len(part.linears) - 1, sum(linear.bias is not None for linear in part.linears)
        # Each further layer: a product forward, two in the backward, the sum of the inputs' gradients, and that of its bias.
        found.append(Gain("queries, keys and values by one product", more, 3 * more + max(biases - 1, 0)))
    if part.head_norms:
        found.append(Gain("queries and keys normalised, then packed: a copy more", -1, -1 if part.linears else 0))
    if part.head_dim % KERNEL_HEADS:
        found.append(Gain(f"attention itself stays PyTorch's, for heads of {part.head_dim}"))
    elif not part.linears and not part.head_norms:
        found.append(Gain("the gradient comes packed", 0, 1))
    return tuple(found)


_MEASURED: dict[type, str] = {
    AttentionPart: "attention of 197 tokens, 12 heads of 64: 71 us, cuDNN 90; backward 392, cuDNN 830 (hopper-attention-short.jsonl)",
    MlpPart: "fc1, bias, exact GELU and slope, 50,432 × 768 → 3,072: 434 us, PyTorch 563; backward 386, PyTorch 771 (hopper-linear.jsonl)",
    BlockPart: "fc2 · proj with bias and fp32 residual, 50,432 tokens of 768: 358 · 148 us, PyTorch 464 · 257 (hopper-linear.jsonl)",
}


def measured(part: Part) -> tuple[str, ...]:
    """What an H100 took for the kernels of such a part, in bf16, in a file of `benchmarks/results/nvidia-h100-80gb-hbm3`.

    Of the forms and widths that were measured, and of no whole model of another library.
    """
    if isinstance(part, BlockPart):
        return (_MEASURED[BlockPart], *measured(part.attention), *measured(part.mlp))
    known = part.gelu == "erf" if isinstance(part, MlpPart) else isinstance(part, AttentionPart) and part.head_dim == 64
    return (_MEASURED[type(part)],) if known else ()
