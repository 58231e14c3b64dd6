"""Attention by a library that the caller names: which are there, what is said when one is not, and xformers' numbers on a GPU."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from attention_cases import plain
from compare import DEVICE, assert_as_exact_as_torch, outputs_and_gradients
from samples import normal

import polyvit_kernels as ops
from polyvit_kernels import reference, tiles
from polyvit_kernels.ops.attention import xformers
from polyvit_kernels.ops.attention.backends import check_backend, choose_backend
from polyvit_kernels.tiles import lookup

HALVES = [torch.bfloat16, torch.float16]
on_a_gpu_with_xformers = [
    pytest.mark.gpu,
    pytest.mark.skipif(not xformers.is_installed(), reason="neither mslk nor xformers is installed"),
]


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(xformers, "find_spec", lambda name: None)
    xformers.load.cache_clear()
    yield
    xformers.load.cache_clear()


@pytest.fixture
def with_package(monkeypatch, tmp_path):
    """Writes a package, of which Python knows meanwhile."""

    def write(name, module, text):
        for loaded in [key for key in sys.modules if key.partition(".")[0] in ("mslk", "xformers")]:
            monkeypatch.delitem(sys.modules, loaded)
        file = tmp_path / (module.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True)
        file.write_text(text)
        for folder in (tmp_path / name, file.parent):
            (folder / "__init__.py").touch()

    monkeypatch.syspath_prepend(str(tmp_path))
    installed = importlib.util.find_spec
    monkeypatch.setattr(xformers, "find_spec", lambda name: installed(name) if (tmp_path / name).exists() else None)
    xformers.load.cache_clear()
    yield write
    xformers.load.cache_clear()
    for loaded in [key for key in sys.modules if key.partition(".")[0] in ("mslk", "xformers")]:
        del sys.modules[loaded]


@pytest.mark.parametrize("backend", ["cudnn", "flash", "xformers"])
def test_a_library_needs_a_gpu(backend):
    with pytest.raises(ValueError, match=f"attention by {backend} needs a GPU, but is to be computed on cpu; leave it auto"):
        ops.attention(torch.randn(2, 5, 3, 2, 16), backend)


@pytest.mark.usefixtures("unchecked_types")
def test_an_unknown_library_is_told():
    with pytest.raises(ValueError, match="attention by 'xformer' is unknown; there are: auto, cudnn, flash, xformers"):
        ops.attention(normal(2, 5, 3, 2, 16), "xformer")


def test_auto_is_what_happens_without_a_word():
    qkv = normal(2, 5, 3, 2, 16)
    assert torch.equal(ops.attention(qkv, "auto"), ops.attention(qkv))


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_package_is_named_with_what_to_install():
    assert not xformers.is_installed()
    with pytest.raises(ValueError, match=r"neither mslk nor xformers is installed; pip install mslk-cuda .* or pip install xformers"):
        check_backend("xformers", "cuda")
    check_backend("cudnn", "cuda")
    check_backend("auto", "cpu")


def test_a_package_that_cannot_be_imported_is_told_unless_the_other_one_can(with_package):
    with_package("mslk", "mslk.attention.fmha", "raise OSError('undefined symbol')")
    with pytest.raises(ValueError, match=r"mslk cannot be imported \(OSError: undefined symbol\); pip install mslk-cuda"):
        xformers.load()
    with_package("xformers", "xformers.ops", "here = True")
    assert xformers.load().here


def test_mslk_comes_before_xformers(with_package):
    with_package("xformers", "xformers.ops", "which = 'xformers'")
    with_package("mslk", "mslk.attention.fmha", "which = 'mslk'")
    assert xformers.load().which == "mslk"


@pytest.mark.parametrize(("is_installed", "expected"), [(True, "xformers"), (False, "triton")])
def test_a_row_of_the_table_counts_where_its_package_is_there(monkeypatch, is_installed, expected):
    ours = tiles.pick("attention", 90, torch.bfloat16, tokens=197, features=64)
    monkeypatch.setattr(lookup, "TABLE", (replace(ours, archs=(90,), backend="xformers"), *lookup.TABLE))
    monkeypatch.setattr(lookup, "architecture", lambda device: 90)
    monkeypatch.setattr(xformers, "is_installed", lambda: is_installed)
    lookup._rows.cache_clear()
    try:
        assert choose_backend("attention", 197, 64, 0, torch.bfloat16) == expected
    finally:
        lookup._rows.cache_clear()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_a_compiler_is_told_of_the_results(dtype):
    qkv = torch.empty(5, 2, 3, 4, 16, device="meta", dtype=dtype).transpose(0, 1).requires_grad_()
    out, lse = xformers.xformers_attention(qkv)
    (gradient,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert [(tuple(t.shape), t.dtype, t.is_contiguous()) for t in (out, lse, gradient)] == [
        ((2, 5, 4, 16), dtype, True),
        ((2, 4, 5), torch.float32, True),
        ((2, 5, 3, 4, 16), dtype, True),
    ]
    assert not lse.requires_grad


class TestOnAGpu:
    pytestmark = on_a_gpu_with_xformers

    @pytest.fixture(autouse=True)
    def any_order_of_sums(self):
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize(("tokens", "head_dim"), [(1, 64), (65, 32), (197, 64), (197, 80), (401, 64), (577, 128)])
    def test_xformers_is_as_exact_as_torch(self, tokens, head_dim, dtype):
        forms = (lambda qkv: ops.attention(qkv, "xformers"), plain, reference.attention)
        assert_as_exact_as_torch(*forms, {"qkv": normal(2, tokens, 3, 2, head_dim)}, dtype)

    def test_every_layout_will_do(self):
        wide = normal(3, 70, 3, 3, 72).bfloat16()
        forms = (lambda qkv: ops.attention(qkv[1:, 5:, :, :2, 7:71], "xformers"), lambda qkv: plain(qkv[1:, 5:, :, :2, 7:71]))
        assert_as_exact_as_torch(*forms, lambda qkv: reference.attention(qkv[1:, 5:, :, :2, 7:71]), {"qkv": wide}, torch.bfloat16)

    def test_no_examples(self):
        qkv = torch.empty(0, 5, 3, 2, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        out = ops.attention(qkv, "xformers")
        out.sum().backward()
        assert (out.shape, qkv.grad.shape) == ((0, 5, 2, 32), (0, 5, 3, 2, 32))

    def test_what_it_has_no_kernel_for_is_refused(self):
        with pytest.raises(NotImplementedError, match="No operator found"):
            ops.attention(normal(2, 5, 3, 2, 30).bfloat16(), "xformers")

    @pytest.mark.usefixtures("unchecked_types")
    def test_it_compiles_whole_and_is_recorded(self):
        qkv = normal(2, 197, 3, 2, 64).bfloat16().requires_grad_()

        def step(call=lambda qkv: ops.attention(qkv * 2, "xformers")):
            out = call(qkv)
            return out, *torch.autograd.grad(out, qkv, torch.ones_like(out))

        expected = step()
        compiled = torch.compile(lambda qkv: ops.attention(qkv * 2, "xformers"), fullgraph=True, backend="aot_eager")
        for found, true in zip(step(compiled), expected, strict=True):
            torch.testing.assert_close(found, true)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = step()
        for tensor in recorded:
            tensor.detach().fill_(torch.nan)
        graph.replay()
        for found, true in zip(recorded, expected, strict=True):
            torch.testing.assert_close(found, true)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_the_libraries_of_torch_can_be_named(backend):
    torch.use_deterministic_algorithms(False)
    forms = (lambda qkv: ops.attention(qkv, backend), plain, reference.attention)
    assert_as_exact_as_torch(*forms, {"qkv": normal(2, 197, 3, 2, 64)}, torch.bfloat16)
    first = outputs_and_gradients(lambda qkv: ops.attention(qkv, backend), {"qkv": normal(2, 197, 3, 2, 64).bfloat16()})
    assert first["output"].dtype == torch.bfloat16
