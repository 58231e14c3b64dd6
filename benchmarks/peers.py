"""Other libraries' ways, each where it can be had; where not, a sentence says why."""

from collections.abc import Callable
from functools import partial

import torch
from card import HAS_GPU, is_installed
from problem import BACKWARD, FORWARD, Contender, Inputs, Operation
from race import PEER_COMPILERS
from torch import Tensor
from torch._functorch import config as graphs
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyvit_kernels import attention
from polyvit_kernels.ops import xformers_attention

COMPILED, AUTOTUNED, RECORDED = PEER_COMPILERS
COMPILERS = (COMPILED, AUTOTUNED)
_MODES = {COMPILED: None, AUTOTUNED: "max-autotune-no-cudagraphs"}
_ON_A_CPU = "left out on a CPU"

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
APART = ", q k v apart"
ATTENTIONS = (*BACKENDS, *(name + APART for name in BACKENDS), "xformers", "flash-attn 2", "flash-attn 3")
LIGER = "Liger"
LINEAR_GELU = "cuBLASLt GELU"


def compiled(operation: Operation, **rest) -> dict[str, Contender | str]:
    """`operation` by torch.compile's default and by max-autotune, without CUDA graphs, as the card's time is what is measured."""
    # A graph that stays for several backwards cannot give its buffers away.
    graphs.donated_buffer = False
    made = {
        name: Contender(operation=torch.compile(operation, mode=mode, fullgraph=True, dynamic=False), **rest)
        for name, mode in _MODES.items()
    }
    return made if HAS_GPU else made | {AUTOTUNED: _ON_A_CPU}


def attentions() -> dict[str, Contender | str]:
    """Attention by torch's backends, each pinned, and by packages.

    Ours writes the packed gradient that the projection before it needs; so do these, but for those that are `APART`: they get and give
    queries, keys and values as three tensors, which a model with one projection would have to join.
    """
    if not HAS_GPU:
        return dict.fromkeys(ATTENTIONS, _ON_A_CPU)
    found: dict[str, Contender | str] = {}
    for name, backend in BACKENDS.items():
        found[name] = Contender(operation=_packed(_pinned(backend)))
        found[name + APART] = Contender(operation=_pinned(backend), take=_apart, directions=(BACKWARD,), alike=False)
    found["xformers"] = (
        Contender(operation=partial(attention, backend="xformers")) if xformers_attention.is_installed() else "not installed"
    )
    found["flash-attn 2"] = _from_package("flash_attn", _flash_attn_2)
    found["flash-attn 3"] = _from_package("flash_attn_interface", _flash_attn_3)
    return found


def liger_layer_norm() -> dict[str, Contender | str]:
    """Liger's LayerNorm of the sum that torch makes."""
    return {LIGER: _from_package("liger_kernel", _liger) if HAS_GPU else _ON_A_CPU}


def cublaslt_gelu() -> dict[str, Contender | str]:
    """cuBLASLt's GELU, by tanh, in the first product; it has no gradient, so nothing is kept for one."""

    @torch.no_grad()
    def run(
        x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        hidden = torch._addmm_activation(fc1_bias, x, fc1_weight.t(), use_gelu=True)
        y = torch.addmm(fc2_bias, hidden, fc2_weight.t())
        return y if residual is None else y + residual

    return {LINEAR_GELU: Contender(operation=run, directions=(FORWARD,), alike=False) if HAS_GPU else _ON_A_CPU}


def backend_name(backend: SDPBackend) -> str:
    """As tables have it."""
    return next(name for name, other in BACKENDS.items() if other == backend)


def _from_package(module: str, build: Callable[[], Contender]) -> Contender | str:
    """What `build` makes, which imports `module`."""
    if not is_installed(module):
        return "not installed"
    try:
        return build()
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}"


def _pinned(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return attend


def _packed(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Operation:
    return lambda qkv: attend(*qkv.unbind(2))


def _apart(inputs: Inputs) -> Inputs:
    return {name: part.contiguous() for name, part in zip("qkv", inputs["qkv"].unbind(2), strict=True)}


def _flash_attn_2() -> Contender:
    from flash_attn import flash_attn_qkvpacked_func

    return Contender(operation=lambda qkv: flash_attn_qkvpacked_func(qkv))


def _flash_attn_3() -> Contender:
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(q, k, v)
        return found[0] if isinstance(found, tuple) else found

    return Contender(operation=_packed(attend))


def _liger() -> Contender:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        normal = LigerLayerNormFunction.apply(total, weight, bias, 1e-6)
        return normal if residual is None else (total, normal)

    return Contender(operation=run)
