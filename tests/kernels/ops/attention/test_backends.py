"""The choice between our kernels and the libraries, and the calls of these."""

import pytest
import torch
from attention_cases import VIEWS, plain
from samples import normal
from torch.fx.experimental.proxy_tensor import make_fx

from polyvit_kernels import tiles
from polyvit_kernels.ops.attention.backends import ALIGNMENT, align, choose_backend, library_attention
from polyvit_kernels.tiles import lookup

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_the_libraries_get_rows_that_they_can_load(name, dtype):
    shape, view = VIEWS[name]
    packed = view(normal(*shape).to(dtype))
    found = align(packed)
    assert torch.equal(found, packed)
    assert all(part[:, token].data_ptr() % ALIGNMENT == 0 for part in found.unbind(2) for token in range(packed.shape[1]))
    assert (found is packed) == all(step * packed.itemsize % ALIGNMENT == 0 for step in (packed.storage_offset(), *packed.stride()[:-1]))


def test_what_no_copy_could_align_is_left_alone():
    packed = normal(2, 5, 3, 2, 5)[:, 1:]
    assert align(packed) is packed


def test_tensors_without_an_address_pass():
    packed = normal(3, 2, 5, 3, 2, 8)
    assert torch.equal(torch.vmap(align)(packed), packed)
    assert torch.equal(make_fx(align, tracing_mode="fake")(packed[0])(packed[1]), packed[1])


@pytest.mark.parametrize("backend", ["cudnn", "flash", "torch"])
def test_a_librarys_backend_takes_and_gives_the_same_layouts(backend):
    qkv = normal(2, 17, 3, 2, 32).requires_grad_()
    out = library_attention(qkv, backend)
    torch.testing.assert_close(out, plain(qkv))
    found, expected = (torch.autograd.grad(o.square().sum(), qkv)[0] for o in (out, plain(qkv)))
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_choice_of_a_backend_compiles_whole_and_is_that_of_the_table(dynamic, monkeypatch):
    monkeypatch.setattr(lookup, "architecture", lambda device: 90)

    def chosen(x):
        backend = choose_backend("attention", x.shape[1], x.shape[2], 0, torch.bfloat16)
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
    compiled = torch.compile(lambda qkv: library_attention(qkv, "cudnn").square().sum(), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(qkv), qkv)
    torch.testing.assert_close(found, torch.autograd.grad(plain(qkv).square().sum(), qkv)[0])
