"""cuDNN's backward from our log-sums."""

import sys

import pytest
import torch
from attention_cases import gradient, plain, upstream
from compare import assert_within_rule
from samples import normal

from polyvit_kernels import attention_long, cudnn, reference, tile_table, tiles

ops = sys.modules["polyvit_kernels.ops.attention"]
CUDNN = tiles.Tile(op="attention_long_backward", archs=(90,), backend="cudnn")


def test_the_gradient_is_packed():
    qkv, out = (
        torch.empty(2, 300, 3, 4, 64, device="meta", dtype=torch.bfloat16),
        torch.empty(2, 300, 4, 64, device="meta", dtype=torch.bfloat16),
    )
    dqkv, sums = cudnn.backward(out, qkv, out, torch.empty(2, 4, 300, device="meta"), CUDNN)
    assert (dqkv.shape, dqkv.dtype, dqkv.is_contiguous()) == (qkv.shape, qkv.dtype, True)
    assert not sums.numel()


def test_a_row_may_name_it_for_equal_sequences_alone(monkeypatch):
    monkeypatch.setattr(tile_table, "TABLE", (CUDNN, *tile_table.TABLE))
    monkeypatch.setattr(tiles, "architecture", lambda _: 90)
    for function in (tiles._pick, tiles._rows):
        monkeypatch.setattr(tiles, function.__name__, function.__wrapped__)
    qkv = torch.empty(1, 401, 3, 2, 64, dtype=torch.bfloat16)
    assert ops._kernels("backward", qkv) == (cudnn, CUDNN)
    for packed in (qkv[0], torch.empty(401, 3, 2, 72, dtype=torch.bfloat16)):
        kernels, tile = ops._packed_kernels("backward", packed, 401)
        assert (kernels, tile.backend) == (attention_long, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "head_dim"), [(257, 64), (401, 64), (577, 80), (1212, 128)])
def test_from_our_log_sums(tokens, head_dim, dtype):
    qkv = normal(2, tokens, 3, 3, head_dim).to(dtype)
    grad = upstream(qkv)
    forward = tiles.pick("attention_long_forward", 90, dtype, tokens=tokens, features=head_dim, portable=True)
    out, lse = attention_long.forward(qkv, forward)
    dqkv, _ = cudnn.backward(grad, qkv, out, lse, CUDNN)
    true = {"dqkv": reference.attention_backward(qkv.double(), grad.double())}
    assert_within_rule({"dqkv": dqkv}, {"dqkv": gradient(plain, qkv, grad)}, true, dtype)
