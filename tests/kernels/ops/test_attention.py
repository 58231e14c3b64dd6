"""Attention by the comparison rule: truth is `reference.py` in fp64, the yardstick plain PyTorch at the same dtype."""

import sys

import pytest
import torch
from attention_cases import plain
from compare import DEVICE, assert_as_exact_as_torch, outputs_and_gradients
from samples import activations, normal
from torch.fx.experimental.proxy_tensor import make_fx

import polyvit_kernels as ops
from polyvit_kernels import reference, tiles
from polyvit_kernels.ops.attention import ALIGNMENT, _aligned, _library_attention, _route
from polyvit_kernels.tiles import lookup

DTYPES = [torch.float32, torch.bfloat16]
ON_THE_CARD = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
"""A dtype that the operations as registered have kernels for; Triton's interpreter multiplies no bf16."""
TOKENS = [1, 16, 63, 64, 65, 197, 256, 257, 401, 1569]


def assert_attention_obeys(qkv, dtype, view=lambda qkv: qkv):
    """`view` is what the operations see of the leaf `qkv`."""
    forms = (lambda qkv, f=f: f(view(qkv)) for f in (ops.attention, plain, reference.attention))
    assert_as_exact_as_torch(*forms, {"qkv": qkv}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_at_every_length(tokens, dtype):
    assert_attention_obeys(normal(1 if tokens > 1000 else 2, tokens, 3, 2, 32), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_at_every_width(head_dim, dtype):
    assert_attention_obeys(normal(2, 65, 3, 2, head_dim), dtype)


VIEWS = {
    "heads before tokens": ((2, 3, 2, 65, 32), lambda leaf: leaf.permute(0, 3, 1, 2, 4)),
    "batch last": ((65, 3, 2, 32, 2), lambda leaf: leaf.permute(4, 0, 1, 2, 3)),
    "inside a wider buffer": ((3, 70, 3, 3, 48), lambda leaf: leaf[1:, 5:, :, :2, 7:39]),
    "every second token": ((2, 130, 3, 2, 32), lambda leaf: leaf[:, ::2]),
    "one example repeated": ((1, 65, 3, 2, 32), lambda leaf: leaf.expand(3, -1, -1, -1, -1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_attention_in_every_layout(name, dtype):
    shape, view = VIEWS[name]
    assert_attention_obeys(normal(*shape), dtype, view)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_activations_with_large_scores(dtype):
    assert_attention_obeys(activations(2, 197, 3, 2, 64) / 30, dtype)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (2, 5, 2, 4, 8)])
def test_attention_names_the_shape_it_needs(shape):
    with pytest.raises(ValueError, match=r"attention needs \[batch, tokens, 3, heads, head_dim\]"):
        ops.attention(normal(*shape))


def test_gradients_are_the_same_in_every_run():
    first, second = (outputs_and_gradients(ops.attention, {"qkv": normal(4, 65, 3, 4, 32)}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("tokens", [1, 65, 197, 257])
def test_the_kernels_by_the_public_function(tokens):
    assert_attention_obeys(normal(2, tokens, 3, 1, 32), ON_THE_CARD)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("name", VIEWS)
def test_the_kernels_in_every_layout(name):
    shape, view = VIEWS[name]
    assert_attention_obeys(normal(*shape), ON_THE_CARD, view)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_the_libraries_get_rows_that_they_can_load(name, dtype):
    shape, view = VIEWS[name]
    packed = view(normal(*shape).to(dtype))
    found = _aligned(packed)
    assert torch.equal(found, packed)
    assert all(part[:, token].data_ptr() % ALIGNMENT == 0 for part in found.unbind(2) for token in range(packed.shape[1]))
    assert (found is packed) == all(step * packed.itemsize % ALIGNMENT == 0 for step in (packed.storage_offset(), *packed.stride()[:-1]))


def test_what_no_copy_could_align_is_left_alone():
    packed = normal(2, 5, 3, 2, 5)[:, 1:]
    assert _aligned(packed) is packed


def test_tensors_without_an_address_pass():
    packed = normal(3, 2, 5, 3, 2, 8)
    assert torch.equal(torch.vmap(_aligned)(packed), packed)
    assert torch.equal(make_fx(_aligned, tracing_mode="fake")(packed[0])(packed[1]), packed[1])


UPSTREAM = {
    "of a sum": lambda out: out.sum(),
    "of one token": lambda out: out[:, 0].square().sum(),
    "heads before tokens": lambda out: (out.transpose(1, 2).contiguous() * torch.arange(5.0, device=out.device).view(5, 1)).sum(),
    "transposed": lambda out: out.permute(3, 0, 2, 1).square().sum(),
    "behind a cat": lambda out: torch.cat([out, out * 2], 1).square().sum(),
}


@pytest.mark.parametrize("path", ["library", "kernels"])
@pytest.mark.parametrize("name", UPSTREAM)
def test_gradients_of_any_layout(name, path, request):
    if path == "kernels":
        request.getfixturevalue("on_kernels")
    leaf = normal(2, 5, 3, 2, 16).requires_grad_()
    (found,) = torch.autograd.grad(UPSTREAM[name](ops.attention(leaf)), leaf)
    (expected,) = torch.autograd.grad(UPSTREAM[name](plain(leaf)), leaf)
    torch.testing.assert_close(found, expected)


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
        return torch.cat([form(piece[None])[0] for piece in qkv.split(lengths) if len(piece)]) if lengths else qkv[:, 0] * 1

    forms = (
        lambda qkv: ops.attention_varlen(qkv, cu_tokens, longest),
        lambda qkv: alone(qkv, plain),
        lambda qkv: alone(qkv, reference.attention),
    )
    assert_as_exact_as_torch(*forms, {"qkv": qkv}, ON_THE_CARD)


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


@pytest.mark.usefixtures("unchecked_types")
def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"qkv is torch.int32, but a floating-point dtype is needed"):
        ops.attention(torch.zeros(1, 2, 3, 1, 8, dtype=torch.int32, device=DEVICE))


OPCHECKED = {
    "contiguous": lambda: normal(2, 17, 3, 2, 32),
    "permuted": lambda: normal(2, 3, 2, 17, 32).permute(0, 3, 1, 2, 4),
    "repeated": lambda: normal(1, 17, 3, 2, 32).expand(3, -1, -1, -1, -1),
    "bf16": lambda: normal(2, 17, 3, 2, 32).bfloat16(),
    "no examples": lambda: normal(0, 17, 3, 2, 32),
}


@pytest.mark.parametrize("path", ["library", "kernels"])
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name, path, request):
    if path == "kernels":
        if name == "bf16" and DEVICE.type == "cpu":
            return
        request.getfixturevalue("on_kernels")
    qkv = OPCHECKED[name]().to(ON_THE_CARD if DEVICE.type == "cuda" else OPCHECKED[name]().dtype)
    torch.library.opcheck(torch.ops.polyvit.attention, (qkv.requires_grad_(),))
    out, lse = torch.ops.polyvit.attention(qkv.detach())
    torch.library.opcheck(torch.ops.polyvit.attention_backward, (torch.ones_like(out), qkv.detach(), out, lse))


@pytest.mark.parametrize("path", ["library", "kernels"])
def test_opcheck_of_packed_sequences(path, request):
    if path == "kernels":
        request.getfixturevalue("on_kernels")
    qkv, cu_tokens, longest = packed([3, 20, 0])
    qkv = qkv.to(ON_THE_CARD)
    torch.library.opcheck(torch.ops.polyvit.attention_varlen, (qkv.requires_grad_(), cu_tokens, longest))
    out, lse = torch.ops.polyvit.attention_varlen(qkv.detach(), cu_tokens, longest)
    torch.library.opcheck(torch.ops.polyvit.attention_varlen_backward, (out, qkv.detach(), out, lse, cu_tokens, longest))


@pytest.mark.usefixtures("unchecked_types")
def test_compiles_whole():
    def loss(qkv, packed_qkv, cu_tokens):
        return ops.attention(qkv * 2).square().sum() + ops.attention_varlen(packed_qkv * 2, cu_tokens, 20).square().sum()

    qkv, (packed_qkv, cu_tokens, _) = normal(2, 17, 3, 2, 32).requires_grad_(), packed([3, 20])
    inputs = (qkv, packed_qkv.to(ON_THE_CARD).requires_grad_())
    expected = torch.autograd.grad(loss(*inputs, cu_tokens), inputs)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs, cu_tokens), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["cudnn", "flash", "torch"])
def test_a_librarys_backend_takes_and_gives_the_same_layouts(backend):
    qkv = normal(2, 17, 3, 2, 32).requires_grad_()
    out = _library_attention(qkv, backend)
    torch.testing.assert_close(out, plain(qkv))
    found, expected = (torch.autograd.grad(o.square().sum(), qkv)[0] for o in (out, plain(qkv)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_chooses_the_dtype_as_for_torchs_own(dtype):
    qkv = normal(2, 17, 3, 2, 32).requires_grad_()
    with torch.autocast(DEVICE.type, dtype):
        out = ops.attention(qkv)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.dtype == torch.float32
    assert torch.equal(out, ops.attention(qkv.to(dtype)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    qkv = normal(2, 17, 3, 2, 32)
    with mode():
        assert torch.equal(ops.attention(qkv), ops.attention(qkv.requires_grad_() if mode is torch.no_grad else qkv))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_choice_of_a_backend_compiles_whole_and_is_that_of_the_table(dynamic, monkeypatch):
    monkeypatch.setattr(lookup, "architecture", lambda device: 90)

    def chosen(x):
        backend = _route("attention", x.shape[1], x.shape[2], 0, torch.bfloat16)
        return x.new_full((), {"triton": 1, "cudnn": 2, "torch": 3}[backend])

    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens, features, expected in (
        (197, 64, 1),
        (256, 64, 1),
        (257, 64, 1),
        (257, 128, 2),
        (1212, 128, 2),
        (197, 136, 3),
        (197, 72, 3),
    ):
        backend = tiles.pick("attention", 90, torch.bfloat16, tokens=tokens, features=features).backend
        if features % 16 == 0:
            assert {"triton": 1, "cudnn": 2, "torch": 3}[backend] == expected
        assert compiled(torch.empty(1, tokens, features)).item() == expected


@pytest.mark.usefixtures("unchecked_types")
def test_a_librarys_backend_compiles_whole():
    qkv = normal(2, 17, 3, 2, 32).requires_grad_()
    compiled = torch.compile(lambda qkv: _library_attention(qkv, "cudnn").square().sum(), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(qkv), qkv)
    torch.testing.assert_close(found, torch.autograd.grad(plain(qkv).square().sum(), qkv)[0])


@pytest.mark.usefixtures("on_kernels")
def test_more_examples_than_a_grid_may_have(monkeypatch):
    qkv = normal(5, 6, 3, 1, 16)
    together = outputs_and_gradients(ops.attention, {"qkv": qkv})
    monkeypatch.setattr(sys.modules["polyvit_kernels.ops.attention"], "MOST_SEQUENCES", 2)
    in_pieces = outputs_and_gradients(ops.attention, {"qkv": qkv})
    assert all(torch.equal(together[name], in_pieces[name]) for name in together)


@pytest.mark.usefixtures("unchecked_types")
def test_more_packed_sequences_than_a_grid_may_have_are_refused():
    with pytest.raises(ValueError, match="65536 sequences, but at most 65535 fit one call"):
        ops.attention_varlen(normal(4, 3, 1, 16), torch.zeros(65537, dtype=torch.int32, device=DEVICE), 4)


@pytest.mark.usefixtures("on_kernels")
def test_offsets_of_a_table_s_column():
    qkv, cu_tokens, longest = packed([3, 20])
    table = torch.stack([cu_tokens, cu_tokens + 99], 1)
    assert torch.equal(ops.attention_varlen(qkv, table[:, 0], longest), ops.attention_varlen(qkv, cu_tokens, longest))
