"""Other libraries' ways, each where it can be had; where not, a sentence says why. A CPU has none of them."""

from collections.abc import Callable
from functools import partial

import torch
from harness import BACKWARD, FORWARD, Candidate, Inputs, Operation
from machine import HAS_GPU, is_installed
from torch import Tensor
from torch._functorch import config as graphs
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyvit_kernels import attention
from polyvit_kernels.ops.attention import xformers

COMPILED, AUTOTUNED, REDUCED = "torch.compile", "torch.compile max-autotune", "reduce-overhead"
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
UNPACKED = ", q k v unpacked"

# The names of what the functions below find. Compiling takes minutes on a CPU.
COMPILERS = (COMPILED, AUTOTUNED) if HAS_GPU else ()
ATTENTIONS = (*BACKENDS, *(name + UNPACKED for name in BACKENDS), "xformers", "flash-attn 2", "flash-attn 3") if HAS_GPU else ()
LIGER = ("Liger",) if HAS_GPU else ()
CUBLASLT = ("cuBLASLt GELU",) if HAS_GPU else ()

_NOT_INSTALLED = "not installed"


def compile_operation(operation: Operation, take: Callable[[Inputs], Inputs] = dict) -> dict[str, Candidate]:
    """`operation` by torch.compile's default and by max-autotune, without CUDA graphs, as the GPU's time is what is measured."""
    # Private, and without a public form: a graph that stays for several backward passes cannot give its buffers away.
    graphs.donated_buffer = False
    modes = {COMPILED: None, AUTOTUNED: "max-autotune-no-cudagraphs"}
    return {
        name: Candidate(operation=torch.compile(operation, mode=modes[name], fullgraph=True, dynamic=False), take=take)
        for name in COMPILERS
    }


def find_attentions() -> dict[str, Candidate | str]:
    """Attention by torch's backends, each pinned, and by packages.

    Ours writes the packed gradient that the projection before it needs; so do these, but for the `UNPACKED`: they get and give queries,
    keys and values as three tensors, which a model with one projection would have to concatenate.
    """
    if not HAS_GPU:
        return {}
    found: dict[str, Candidate | str] = {}
    for name, backend in BACKENDS.items():
        found[name] = Candidate(operation=_pack(_pin(backend)))
        found[name + UNPACKED] = Candidate(operation=_pin(backend), take=_unpack, directions=(BACKWARD,), comparable=False)
    by_xformers = Candidate(operation=partial(attention, backend="xformers"))
    found["xformers"] = by_xformers if xformers.is_installed() else _NOT_INSTALLED
    found["flash-attn 2"] = _import_peer("flash_attn", _flash_attn_2)
    found["flash-attn 3"] = _import_peer("flash_attn_interface", _flash_attn_3)
    return found


def find_liger() -> dict[str, Candidate | str]:
    """Liger's LayerNorm, after an addition by torch."""
    return {name: _import_peer("liger_kernel", _liger) for name in LIGER}


def find_cublaslt() -> dict[str, Candidate]:
    """An MLP with cuBLASLt's GELU, by tanh, in the first product. It has no gradient and keeps nothing for one."""

    @torch.no_grad()
    def run(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, residual: Tensor | None = None):
        # Private: torch shows this epilogue in no public function.
        hidden = torch._addmm_activation(fc1_bias, x, fc1_weight.t(), use_gelu=True)
        y = torch.addmm(fc2_bias, hidden, fc2_weight.t())
        return y if residual is None else y + residual

    return {name: Candidate(operation=run, directions=(FORWARD,), comparable=False) for name in CUBLASLT}


def name_backend(backend: SDPBackend) -> str:
    """As tables have it."""
    return next(name for name, other in BACKENDS.items() if other == backend)


def _import_peer(module: str, build: Callable[[], Candidate]) -> Candidate | str:
    """What `build` makes, which imports `module`."""
    if not is_installed(module):
        return _NOT_INSTALLED
    try:
        return build()
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}"


def _pin(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return attend


def _pack(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Operation:
    return lambda qkv: attend(*qkv.unbind(2))


def _unpack(inputs: Inputs) -> Inputs:
    return {name: tensor.contiguous() for name, tensor in zip("qkv", inputs["qkv"].unbind(2), strict=True)}


def _flash_attn_2() -> Candidate:
    from flash_attn import flash_attn_qkvpacked_func

    return Candidate(operation=lambda qkv: flash_attn_qkvpacked_func(qkv))


def _flash_attn_3() -> Candidate:
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(q, k, v)
        return found[0] if isinstance(found, tuple) else found

    return Candidate(operation=_pack(attend))


def _liger() -> Candidate:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        normal = LigerLayerNormFunction.apply(total, weight, bias, 1e-6)
        return normal if residual is None else (total, normal)

    return Candidate(operation=run)
