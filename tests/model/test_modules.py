from dataclasses import replace

import pytest
import torch

from polyvit_fast.config import Model
from polyvit_fast.model.modules import Attention, Block, LayerNorm, Mlp, add_branch, drop_path_ramp

MODEL = Model(dim=32, depth=3, num_heads=4, mlp_dim=64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(model=MODEL):
    torch.manual_seed(0)
    return Block(model)


def test_layer_norm_has_the_eps_of_flax():
    x = normal(2, 5, 32) * 1e-3  # so small that eps decides
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(LayerNorm(32)(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_equals_torchs_own_module():
    ours = Attention(MODEL)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = normal(2, 7, 32)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_block_is_the_paper_s_equation(gelu):
    b = block(replace(MODEL, gelu=gelu))
    x = normal(2, 7, 32)
    y = x + b.attn(b.norm1(x))
    activation = torch.nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
    torch.testing.assert_close(b(x), y + b.mlp.fc2(activation(b.mlp.fc1(b.norm2(y)))), rtol=1e-5, atol=1e-6)


def test_parameter_names_are_timm_s():
    names = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
    assert [name for name, _ in block().named_parameters()] == names


def test_drop_path_rate_rises_linearly_from_nothing():
    assert drop_path_ramp(4, 0.3) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_ramp(1, 0.3) == [0.0]
    assert drop_path_ramp(0, 0.3) == []


@pytest.mark.parametrize(("rescale", "kept_value"), [(False, 1.0), (True, 1 / 0.7)])
def test_branches_are_left_out_per_example_with_the_given_chance(rescale, kept_value):
    torch.manual_seed(0)
    x, branch = torch.zeros(20_000, 2, 3), torch.ones(20_000, 2, 3)
    added = add_branch(x, branch, 0.3, rescale)
    assert torch.equal(added, added[:, :1, :1].expand_as(added))
    share = (added[:, 0, 0] == torch.tensor(kept_value)).double().mean()
    assert (added[:, 0, 0] == 0).double().mean() == 1 - share
    assert share == pytest.approx(0.7, abs=0.015)  # 4.6 deviations


def test_both_branches_are_left_out_independently():
    torch.manual_seed(0)
    b = block().train()
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.zero_()
        b.attn.proj.bias.fill_(1)
        b.mlp.fc2.bias.fill_(10)
    sums = b(torch.zeros(4000, 1, 32), 0.5)[:, 0, 0]
    counts = torch.tensor([(sums == value).sum() for value in (0, 1, 10, 11)])
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 140  # 5 deviations


def test_evaluation_drops_nothing():
    b = block(replace(MODEL, dropout=0.5)).eval()
    x = normal(3, 5, 32)
    assert torch.equal(b(x, 0.9), block(MODEL)(x))


def test_a_dropped_branch_gives_no_gradient_and_the_input_keeps_its_own():
    torch.manual_seed(0)
    x, branch = normal(50, 2, 3).requires_grad_(), normal(50, 2, 3).requires_grad_()
    added = add_branch(x, branch, 0.5, False)
    added.sum().backward()
    kept = (added != x).any(-1).any(-1)
    assert 0 < kept.sum() < 50
    assert torch.equal(branch.grad[:, 0, 0], kept.float())
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("part", [Attention, Mlp])
def test_dropout_acts_in_training_alone_and_keeps_the_mean(part):
    torch.manual_seed(0)
    module = part(replace(MODEL, dropout=0.3))
    x = normal(1, 4, 32)
    exact = module.eval()(x)
    with torch.no_grad():
        drawn = torch.stack([module.train()(x) for _ in range(3000)])
    assert (drawn == 0).double().mean() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(drawn.mean(0), exact.detach(), rtol=0, atol=0.05)


def test_dropout_of_the_hidden_layer():
    torch.manual_seed(0)
    mlp = Mlp(replace(MODEL, dropout=0.3)).train()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.fill_(1.0)
        mlp.fc2.bias.zero_()
    out = mlp(torch.ones(500, 1, 32))
    kept = out[out != 0].double() * 0.7 * 0.7 / 33  # hidden units left in: fc1 gives 33 in each, where GELU is the identity
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert kept.mean().item() == pytest.approx(64 * 0.7, rel=0.02)


def test_half_precision_branch_joins_a_full_precision_residual():
    with torch.autocast("cpu", torch.bfloat16):
        out = block().train()(normal(4, 5, 32), 0.3)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean(), block().eval()(normal(4, 5, 32)).mean(), rtol=0, atol=0.1)
