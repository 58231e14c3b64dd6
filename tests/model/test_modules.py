import pytest
import torch
from compare import assert_within_rule, outputs_and_gradients
from low_rank import LowRank
from torch import nn

from polyvit_fast.config import Model
from polyvit_fast.model.class_token import ClassTokenBlock
from polyvit_fast.model.modules import Attention, Block, LayerNorm, Mlp, drop_path_factors, drop_path_ramp
from polyvit_kernels import ops
from polyvit_kernels.ops import gradients


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(kind=Block, **options):
    torch.manual_seed(0)
    return kind(32, 4, 64, **options)


BRANCHES = {"attention": lambda **options: Attention(32, 4, **options), "mlp": lambda **options: Mlp(32, 64, **options)}


def test_layer_norm_has_the_eps_of_flax():
    x = normal(2, 5, 32) * 1e-3  # so small that eps decides
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(LayerNorm(32)(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_equals_torchs_own_module():
    ours = Attention(32, 4)
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


@pytest.mark.parametrize(
    ("gelu", "activation"),
    [("tanh", torch.nn.GELU("tanh")), ("erf", torch.nn.GELU()), ("quick", lambda x: x * torch.sigmoid(1.702 * x))],
)
def test_block_is_the_paper_s_equation(gelu, activation):
    b = block(gelu=gelu)
    x = normal(2, 7, 32)
    y = x + b.attn(b.norm1(x))
    torch.testing.assert_close(b(x), y + b.mlp.fc2(activation(b.mlp.fc1(b.norm2(y)))), rtol=1e-5, atol=1e-6)


def test_parameter_names_are_timm_s():
    names = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
    assert [name for name, _ in block().named_parameters()] == names


def test_drop_path_rate_rises_linearly_from_nothing():
    assert drop_path_ramp(4, 0.3) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_ramp(1, 0.3) == [0.0]
    assert drop_path_ramp(0, 0.3) == []


@pytest.mark.parametrize(("rescale", "kept_value"), [(False, 1.0), (True, 1 / 0.7)])
def test_branches_are_left_out_per_example_with_the_given_probability(rescale, kept_value):
    torch.manual_seed(0)
    factors = drop_path_factors(torch.zeros(20_000, 2, 3), 0.3, rescale)
    assert factors.shape == (2, 20_000)
    for branch in factors:
        kept_ratio = (branch == torch.tensor(kept_value)).double().mean()
        assert (branch == 0).double().mean() == 1 - kept_ratio
        assert kept_ratio == pytest.approx(0.7, abs=0.015)  # 4.6 std


def test_both_branches_are_left_out_independently():
    torch.manual_seed(0)
    b = block(rescale_drop_path=False).train()
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.zero_()
        b.attn.proj.bias.fill_(1)
        b.mlp.fc2.bias.fill_(10)
    sums = b(torch.zeros(4000, 1, 32), 0.5)[:, 0, 0]
    counts = torch.tensor([(sums == value).sum() for value in (0, 1, 10, 11)])
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 140  # 5 std


def test_evaluation_drops_nothing():
    b = block(dropout=0.5).eval()
    x = normal(3, 5, 32)
    assert torch.equal(b(x, 0.9), block()(x))


def test_a_dropped_branch_gives_no_gradient_and_the_input_keeps_its_own():
    torch.manual_seed(0)
    x = normal(40, 2, 32).requires_grad_()
    added = block().train()(x, 0.6)
    added.sum().backward()
    dropped = (added == x).all(-1).all(-1)
    assert 0 < dropped.sum() < 40
    assert torch.equal(x.grad[dropped], torch.ones_like(x[dropped]))
    assert not torch.equal(x.grad[~dropped], torch.ones_like(x[~dropped]))


@pytest.mark.parametrize("branch", BRANCHES)
def test_dropout_acts_in_training_alone_and_keeps_the_mean(branch):
    torch.manual_seed(0)
    module = BRANCHES[branch](dropout=0.3)
    x = normal(1, 4, 32)
    exact = module.eval()(x)
    with torch.no_grad():
        drawn = module.train()(x.expand(3000, -1, -1))
    assert (drawn == 0).double().mean() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(drawn.mean(0, keepdim=True), exact.detach(), rtol=0, atol=0.05)


def test_dropout_of_the_hidden_layer():
    torch.manual_seed(0)
    mlp = Mlp(32, 64, dropout=0.3).train()
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


def timm_block(**changes):
    from timm.models.vision_transformer import Block as TimmBlock

    return TimmBlock(32, 4, 2.0, qkv_bias=True, **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_block_is_timm_s_with_timm_s_weights(precision):
    ours, theirs = block(), timm_block()
    ours.load_state_dict(theirs.state_dict())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    names = [name for name, _ in ours.named_parameters()]
    inputs = {name.replace(".", "_"): parameter.detach() for name, parameter in theirs.named_parameters()} | {"x": normal(2, 7, 32)}

    def run(module, dtype, **values):
        x = values.pop("x")
        parameters = {name: values[name.replace(".", "_")] for name in names}
        return torch.func.functional_call(module.to(dtype), parameters, (x,))

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        rounded = {name: value.to(dtype) for name, value in inputs.items()}
        found = outputs_and_gradients(lambda **values: run(ours, dtype, **values), rounded)
        baseline = outputs_and_gradients(lambda **values: run(theirs, dtype, **values), rounded)
    exact = {name: value.double() for name, value in rounded.items()}
    true = outputs_and_gradients(lambda **values: run(theirs, torch.float64, **values), exact)
    assert_within_rule(found, baseline, true, torch.float32 if precision == "fp32" else torch.bfloat16)


def test_blocks_of_a_record_and_of_numbers():
    model = Model(dim=32, num_heads=4, mlp_dim=64, gelu="tanh", dropout=0.25, rescale_drop_path=True)
    of_record, of_numbers = Block.from_config(model), block(gelu="tanh", dropout=0.25)
    assert [tuple(p.shape) for p in of_record.parameters()] == [tuple(p.shape) for p in of_numbers.parameters()]
    assert (of_record.mlp.gelu, of_record.mlp.dropout, of_record.attn.dropout, of_record.rescale) == ("tanh", 0.25, 0.25, True)
    assert not Block.from_config(Model()).rescale
    assert Attention(32, 4, qkv_bias=False).qkv.bias is None


def test_width_that_does_not_divide_into_heads():
    with pytest.raises(ValueError, match="dim = 32 does not divide by num_heads = 5"):
        Attention(32, 5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("branch", BRANCHES)
def test_residual_is_added_after_dropout(branch, dropout):
    torch.manual_seed(0)
    module = BRANCHES[branch](dropout=dropout)
    x, residual = normal(2, 5, 32), normal(2, 5, 32, seed=1)
    torch.manual_seed(1)
    branch = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(module(x, residual), residual + branch, rtol=1e-5, atol=1e-6)


def test_block_without_dropping_is_made_of_fused_operations(monkeypatch):
    called = []
    for name in ("layer_norm", "layer_norm_residual", "attention", "linear_add", "mlp"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, name=name, function=function: (called.append(name), function(*args))[1])
    block()(normal(2, 5, 32), 0.0)
    assert called == ["layer_norm_residual", "attention", "linear_add", "layer_norm_residual", "mlp"]


def test_norms_give_what_the_next_product_wants():
    norm = LayerNorm(32)
    assert norm(normal(2, 32), torch.bfloat16).dtype == torch.bfloat16
    assert norm(normal(2, 32)).dtype == torch.float32


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_adapters_and_hooks_on_layers_are_used(path):
    plain, adapted, hooked = block(), block(), block()
    base = adapted.get_submodule(path)
    torch.manual_seed(1)
    adapted.set_submodule(path, LowRank(base))
    low_rank = adapted.get_submodule(path)
    hooked.get_submodule(path).register_forward_hook(lambda module, args, out: out + low_rank.up(low_rank.down(args[0])))
    x = normal(2, 5, 32)
    torch.testing.assert_close(adapted(x), hooked(x))
    assert (adapted(x) - plain(x)).abs().max() > 1e-3
    adapted(x).sum().backward()
    assert low_rank.down.weight.grad.abs().max() > 0


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("kind", [Block, ClassTokenBlock])
@pytest.mark.parametrize(("dropout", "drop_path_rate"), [(0.0, 0.0), (0.0, 0.5), (0.2, 0.5)])
def test_recomputed_block_is_the_same_to_the_bit(dropout, drop_path_rate, kind, autocast):
    runs = []
    for recompute in (False, True):
        trained, x = block(kind, dropout=dropout).train(), normal(8, 5, 32).requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = trained(x, drop_path_rate, recompute)
        drawn_next = torch.rand(3)
        out.square().sum().backward()
        runs.append([out, x.grad, drawn_next, *(parameter.grad for parameter in trained.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("registered")
def test_recomputed_blocks_hand_the_factors_of_drop_path_on(residual, monkeypatch):
    """As without recomputing: by identity, through what a checkpoint keeps."""
    runs, products = [], []
    multiply = gradients.multiply
    monkeypatch.setattr(gradients, "multiply", lambda x, factors: products.append(factors is not None) or multiply(x, factors))
    for recompute in (False, True):
        kinds = (Block, Block, ClassTokenBlock)
        blocks, x = nn.Sequential(*(block(kind).train() for kind in kinds)), normal(8, 5, 32).to(residual).requires_grad_()
        torch.manual_seed(3)
        stream = x
        products.clear()
        with torch.autocast("cpu", torch.bfloat16):
            for one in blocks:
                stream = one(stream, 0.5, recompute)
        stream.square().sum().backward()
        # One by each norm that a branch ends before; the class token's MLP, after which none comes, does it itself.
        assert products.count(True) == 4 + 1
        runs.append([stream, x.grad, *(parameter.grad for parameter in blocks.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(5, 32), (5, 3, 32), (5, 5, 3, 32)], ids=str)
@pytest.mark.parametrize("way", ["plain", "hooked", "dropout"])
def test_an_mlp_multiplies_examples_of_every_shape(shape, way):
    mlp, x, residual, factors = Mlp(32, 64).train(), normal(*shape), normal(*shape, seed=1), torch.tensor([2.0, 0.0, 1.0, -1.0, 3.0])
    expected = residual + factors.view(5, *[1] * (len(shape) - 1)) * mlp(x)
    if way == "hooked":
        mlp.fc2.register_forward_hook(lambda module, args, out: None)
    if way == "dropout":
        mlp.dropout = 1e-9
    torch.testing.assert_close(mlp(x, residual, factors), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.usefixtures("unchecked_types")
def test_factors_without_a_residual_or_of_other_examples_are_refused(branch, dropout):
    module, x = BRANCHES[branch](dropout=dropout).train(), normal(5, 3, 32)
    with pytest.raises(ValueError, match="factors multiply what is added to a residual, but there is none"):
        module(x, None, torch.ones(5))
    with pytest.raises(ValueError, match=r"factors are \[3\] torch.float32, but \[5\]"):
        module(x, x, torch.ones(3))


@pytest.mark.parametrize(("dropout", "reads"), [(0.0, False), (0.2, True)])
def test_recomputing_reads_the_random_state_for_dropout_alone(dropout, reads, monkeypatch):
    asked, real = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (asked.append(True), real())[1])
    for module in (block(dropout=dropout).train(), block(dropout=dropout).eval()):
        module(normal(2, 5, 32).requires_grad_(), 0.5, recompute=True).sum().backward()
        assert bool(asked) == (reads and module.training)
        asked.clear()


def test_hooks_on_a_recomputed_block_run_once():
    trained, calls = block(), []
    trained.register_forward_hook(lambda module, args, out: calls.append("block"))
    trained.norm2.register_forward_hook(lambda module, args, out: calls.append("norm2"))
    trained(normal(2, 5, 32).requires_grad_(), recompute=True).sum().backward()
    assert calls == ["norm2", "block", "norm2"]


def test_nothing_is_recomputed_without_gradients():
    with torch.no_grad():
        assert torch.equal(block()(normal(2, 5, 32), recompute=True), block()(normal(2, 5, 32)))
