"""Attention of packed sequences."""

import pytest
import torch
from attention_cases import KERNEL_DTYPE, plain
from compare import DEVICE, assert_as_exact_as_torch
from long_forms import mark_long
from samples import normal

import polyvit_kernels as ops
from polyvit_kernels import reference

LENGTHS = [[3, 65, 0, 1], [40], []]


def packed(lengths, head_dim=32):
    cu_tokens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    return normal(sum(lengths), 3, 2, head_dim), cu_tokens, max(lengths, default=0)


@pytest.mark.parametrize("path", ["library", "kernels"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_sequences_are_what_they_are_alone(lengths, path, request):
    if path == "kernels":
        request.getfixturevalue("on_kernels")
    qkv, cu_tokens, longest = packed(lengths)

    def alone(qkv, form):
        return torch.cat([form(sequence[None])[0] for sequence in qkv.split(lengths) if len(sequence)]) if lengths else qkv[:, 0] * 1

    forms = (
        lambda qkv: ops.attention_varlen(qkv, cu_tokens, longest),
        lambda qkv: alone(qkv, plain),
        lambda qkv: alone(qkv, reference.attention),
    )
    assert_as_exact_as_torch(*forms, {"qkv": qkv}, KERNEL_DTYPE)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": normal(4, 2, 2, 8)}, r"needs \[total, 3, heads, head_dim\]"),
        ({"cu_tokens": torch.tensor([0, 4], device=DEVICE)}, r"needs \[sequences \+ 1\] torch.int32"),
        ({"qkv": torch.zeros(4, 3, 2, 8, dtype=torch.int32, device=DEVICE)}, r"qkv is torch.int32, but a floating-point dtype is needed"),
    ],
)
def test_packed_sequences_name_what_is_wrong(change, message):
    inputs = {"qkv": normal(4, 3, 2, 8), "cu_tokens": torch.tensor([0, 4], dtype=torch.int32, device=DEVICE), "max_tokens": 4}
    with pytest.raises(ValueError, match=message):
        ops.attention_varlen(**(inputs | change))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looking at the offsets would wait for the GPU: the caller answers for them")
@pytest.mark.parametrize(
    ("offsets", "longest", "message"),
    [([0, 3], 4, "must rise from 0 to the 4 rows"), ([0, 3, 2, 4], 4, "must rise"), ([0, 4], 3, "4 tokens, more than max_tokens = 3")],
)
def test_offsets_that_do_not_fit_are_named(offsets, longest, message):
    with pytest.raises(ValueError, match=message):
        ops.attention_varlen(normal(4, 3, 2, 8), torch.tensor(offsets, dtype=torch.int32), longest)


@pytest.mark.parametrize("path", mark_long(["library", "kernels"], ["library"]))
def test_opcheck_of_packed_sequences(path, request):
    if path == "kernels":
        request.getfixturevalue("on_kernels")
    qkv, cu_tokens, longest = packed([3, 20, 0])
    qkv = qkv.to(KERNEL_DTYPE)
    torch.library.opcheck(torch.ops.polyvit.attention_varlen, (qkv.requires_grad_(), cu_tokens, longest))
    out, lse = torch.ops.polyvit.attention_varlen(qkv.detach(), cu_tokens, longest)
    torch.library.opcheck(torch.ops.polyvit.attention_varlen_backward, (out, qkv.detach(), out, lse, cu_tokens, longest))


@pytest.mark.usefixtures("unchecked_types")
def test_more_packed_sequences_than_a_grid_may_have_are_refused():
    with pytest.raises(ValueError, match="65536 sequences, but at most 65535 fit one call"):
        ops.attention_varlen(normal(4, 3, 1, 16), torch.zeros(65537, dtype=torch.int32, device=DEVICE), 4)


@pytest.mark.usefixtures("on_kernels")
def test_offsets_of_a_table_s_column():
    qkv, cu_tokens, longest = packed([3, 20])
    table = torch.stack([cu_tokens, cu_tokens + 99], 1)
    assert torch.equal(ops.attention_varlen(qkv, table[:, 0], longest), ops.attention_varlen(qkv, cu_tokens, longest))


@pytest.mark.usefixtures("unchecked_types")
def test_packed_sequences_compile_whole():
    def loss(qkv, cu_tokens):
        return ops.attention_varlen(qkv * 2, cu_tokens, 20).square().sum()

    qkv, cu_tokens, _ = packed([3, 20])
    qkv = qkv.to(KERNEL_DTYPE).requires_grad_()
    (expected,) = torch.autograd.grad(loss(qkv, cu_tokens), qkv)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(qkv, cu_tokens), qkv)
    assert torch.equal(found, expected)
