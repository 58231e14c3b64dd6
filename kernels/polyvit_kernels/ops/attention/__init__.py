"""Softmax attention by our kernels or by a library's, for examples of one length (dense) and for packed sequences (varlen)."""

from polyvit_kernels.ops.attention.backends import AttentionBackend, check_backend
from polyvit_kernels.ops.attention.dense import attention
from polyvit_kernels.ops.attention.varlen import attention_varlen

__all__ = ["AttentionBackend", "attention", "attention_varlen", "check_backend"]
