"""GELU and its derivative for the epilogues of linear layers, in fp32 registers; the portable kernels and Hopper's both call them.

The backward of GELU needs no pass of its own: the forward stores the derivative ("slope") where it has the input in registers, and the
backward of the next layer multiplies by it (`linear.dgelu_bwd_kernel`).

- GELU: "erf", "tanh" or "quick"
- PRECISE: by the definition, for fp32; otherwise erf and tanh by polynomials, exact to far less than bf16 and fp16 round
"""

import triton
import triton.language as tl


@triton.jit
def _gelu_tail(b_t, GELU: tl.constexpr, PRECISE: tl.constexpr):
    """gelu(−t) / −t for t ≥ 0: Φ(−t) for erf, 1 / (1 + exp(2 u(t))) for tanh, σ(−1.702 t) for quick. Takes and gives a block of any shape.

    For quick one exp2 and one division do. For erf and tanh its log2 is nearly a parabola: a polynomial and one exp2 cost less than erf or
    tanh, and keep the tail's relative precision. The polynomials are minimax fits of degree 7 in the relative error, on [0, 5.5] (erf) and
    [0, 5] (tanh), and fall to −∞ beyond. Measured in fp32 against fp64, gelu is off by less than 7e-7, and for x < 0 by less than 6e-6 of
    its value (erf, quick); by 1.6e-5, and 1e-4 of it (tanh). Rounding to bf16 costs up to 2e-3 of a value, to fp16 5e-4.
    """
    if GELU == "quick":
        # 1.702 log2(e)
        b_exp = tl.exp2(b_t * -2.4554669595930156)
        b_tail = b_exp / (1.0 + b_exp)
    elif PRECISE:
        if GELU == "erf":
            # 1 / √2
            b_tail = 0.5 - 0.5 * tl.erf(b_t * 0.7071067811865476)
        else:
            # exp(−2 u), u = √(2/π) (t + 0.044715 t³)
            b_exp = tl.exp(b_t * (-1.5957691216057308 - 0.07135481282553434 * b_t * b_t))
            b_tail = b_exp / (1.0 + b_exp)
    else:
        if GELU == "erf":
            # Horner's scheme
            b_log = b_t * -1.79345375e-06 + 6.09041454e-05
            b_log = b_t * b_log - 0.000926028762
            b_log = b_t * b_log + 0.00849375594
            b_log = b_t * b_log - 0.0539378449
            b_log = b_t * b_log - 0.458480507
            b_log = b_t * b_log - 1.15124679
            b_log = b_t * b_log - 0.99999547
        else:
            b_log = b_t * -5.61740708e-05 + 0.00123216258
            b_log = b_t * b_log - 0.0100884484
            b_log = b_t * b_log + 0.0324372128
            b_log = b_t * b_log - 0.0812495574
            b_log = b_t * b_log - 0.442411691
            b_log = b_t * b_log - 1.1546514
            b_log = b_t * b_log - 0.99987793
        b_tail = tl.exp2(b_log)
    return b_tail


@triton.jit
def gelu(b_x, GELU: tl.constexpr, PRECISE: tl.constexpr):
    """gelu(x) = max(x, 0) − |x| tail(|x|)."""
    b_t = tl.abs(b_x)
    return tl.maximum(b_x, 0.0) - b_t * _gelu_tail(b_t, GELU, PRECISE)


@triton.jit
def gelu_and_slope(b_x, GELU: tl.constexpr, PRECISE: tl.constexpr):
    """gelu(x) and gelu'(x) = P + x P', where P(x) = gelu(x) / x; P' is the normal density for erf, 2 u' P (1 − P) for tanh,
    1.702 P (1 − P) for quick.
    """
    b_t = tl.abs(b_x)
    b_tail = _gelu_tail(b_t, GELU, PRECISE)
    if GELU == "erf":
        # exp(−x²/2) / √(2π), as a power of two
        b_density = tl.exp2(b_x * b_x * -0.7213475204444817 - 1.3257480647361593)
    elif GELU == "quick":
        b_density = (b_tail - b_tail * b_tail) * 1.702
    else:
        b_density = (b_tail - b_tail * b_tail) * (b_x * b_x * 0.21406443847660303 + 1.5957691216057308)
    # P(x) = 1 − P(−x), so one tail gives both sides.
    return tl.maximum(b_x, 0.0) - b_t * b_tail, b_x * b_density + tl.where(b_x > 0, 1.0 - b_tail, b_tail)
