import copy
import io
import threading
from collections import Counter

import pytest
import torch
from compare import assert_within_rule, largest_difference
from foreign_models import (
    FAMILIES,
    SIZES,
    clip,
    dinov2,
    hugging_face_vit,
    is_zero,
    long,
    normal,
    randomised,
    siglip,
    siglip2,
    timm_vit,
    timm_vit_with_layer_scale,
    tokens_of,
    torchvision_vit,
    videomae,
)
from low_rank import LowRank
from torch import nn

from polyvit_fast import fuse, unfuse
from polyvit_fast.drop_in.fused import fused_adapter
from polyvit_kernels import ops

WHOLE = {"layer_norm": 1, "layer_norm_residual": 4, "attention": 2, "linear_add": 2, "mlp": 2}
CALLS = dict.fromkeys(FAMILIES, WHOLE) | {
    "Hugging Face CLIP": {**WHOLE, "layer_norm": 2},  # it has a norm before the blocks
    "timm ViT with qk-norm": {**WHOLE, "layer_norm": 5},  # of queries and of keys
}


@pytest.fixture
def calls(monkeypatch):
    """How often each operation is called."""
    counter = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counter[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("attention", "layer_norm", "layer_norm_residual", "linear_add", "mlp", "linear_gelu"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return counter


def results(model, batch, call=None):
    """The output and every gradient; those of parameters that it does not depend on are missing, or zeros in a compiled model."""
    model.zero_grad()
    output = tokens_of(model(batch) if call is None else call(batch))
    output.backward(normal(*output.shape, seed=1).to(output.dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {"output": output.detach()} | gradients


def assert_as_exact(fused, plain, batch, dtype=torch.float32, call=None):
    """Hold the output and every gradient of `fused` to the rule; `plain` is the same model as it was."""
    true = results(copy.deepcopy(plain).double(), batch.double())
    assert_within_rule(results(fused, batch, call), results(plain, batch), true, dtype)


def pair(model):
    """The model fused, and as it was."""
    plain = copy.deepcopy(model)
    fuse(model)
    return model, plain


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_models_are_as_exact_as_their_own_code(name, mode, calls):
    model, batch = FAMILIES[name](**({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if "AST" in name else {}))
    fused, plain = pair(model.train(mode == "train"))
    tokens_of(fused(batch))
    assert calls == CALLS[name]
    assert_as_exact(fused, plain, batch)


@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize(
    "name", ["timm ViT", "Hugging Face CLIP", *long(*(name for name in FAMILIES if name not in ("timm ViT", "Hugging Face CLIP")))]
)
def test_fused_models_on_the_kernels_themselves(name):
    model, batch = FAMILIES[name]()
    fused, plain = pair(model.eval())
    assert_as_exact(fused, plain, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_models_under_autocast(name):
    model, batch = FAMILIES[name]()
    fused, plain = pair(model.eval())
    true = results(copy.deepcopy(plain).double(), batch.double())
    with torch.autocast("cpu", torch.bfloat16):
        found, baseline = results(fused, batch), results(plain, batch)
    worst = max(largest_difference(baseline[name], true[name]) for name in true)
    for name in filter(is_zero, list(true)):
        assert true.pop(name).abs().max() < 1e-6
        assert max(found.pop(name).abs().max(), baseline.pop(name).abs().max()) < worst
    assert_within_rule(found, baseline, true, torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_unfuse_gives_the_very_model_back(name):
    model, batch = FAMILIES[name]()
    model.eval()
    names, parameters, before = list(model.state_dict()), list(model.parameters()), tokens_of(model(batch))
    kinds = [type(module) for module in model.modules()]
    fuse(model)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [type(module) for module in model.modules()] == kinds
    unfuse(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(tokens_of(model(batch)), before)


def test_nothing_but_the_one_model_changes(calls):
    kinds = [nn.LayerNorm, nn.MultiheadAttention, nn.Linear, nn.GELU, type(timm_vit()[0].blocks[0])]
    before = [(kind, kind.forward, dict(vars(kind))) for kind in kinds]
    model, batch = timm_vit()
    other, norm = timm_vit()[0], nn.LayerNorm(64)
    fuse(model)
    assert all(kind.forward is forward and dict(vars(kind)) == members for kind, forward, members in before)
    other(batch), norm(normal(2, 64))
    assert not calls
    model(batch)
    assert calls


def test_threads_with_a_fused_and_a_plain_model_do_not_meet():
    fused, plain = pair(timm_vit()[0].eval())
    batch, found = timm_vit()[1], {}
    expected = {"fused": fused(batch), "plain": plain(batch)}

    def work(name, model):
        found[name] = [model(batch) for _ in range(20)]

    threads = [threading.Thread(target=work, args=item) for item in [("fused", fused), ("plain", plain)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, expected[name]) for name in expected for output in found[name])


def test_what_the_report_says():
    model, _ = timm_vit(proj_drop_rate=0.1, drop_path_rate=0.2, scale_attn_norm=True)
    model.blocks[1].attn.norm = nn.Identity()
    report = fuse(model)
    left = {entry.path: entry.why for entry in report.left}
    assert left == {
        "blocks.0": "attn: Attention is left",
        "blocks.0.attn": "the heads' outputs are normalised (norm is a LayerNorm)",
    }
    replaced = {entry.path: entry.why for entry in report.replaced}
    assert replaced.keys() == {
        *("blocks.0.norm1", "blocks.0.attn.norm", "blocks.0.norm2", "blocks.0.mlp"),
        *("blocks.1", "blocks.1.norm1", "blocks.1.attn", "blocks.1.norm2", "blocks.1.mlp", "norm"),
    }
    drops = dict.fromkeys(["blocks.0.mlp", "blocks.1.mlp", "blocks.1.attn", "blocks.1"], 0.1)
    assert {path: why for path, why in replaced.items() if why} == {
        path: f"its own forward runs in training, where it drops with up to {rate}" for path, rate in drops.items()
    }
    assert str(report).splitlines()[0] == "replaced: 10 modules"
    assert "  blocks.*.norm*        4 × LayerNorm" in str(report)


@pytest.mark.parametrize("which", ["parts and blocks", "blocks"])
@pytest.mark.parametrize("name", ["Hugging Face ViT", "Hugging Face VideoMAE", "timm ViT", "torchvision ViT"])
def test_outputs_may_be_changed_in_place(name, which):
    model, batch = FAMILIES[name]()
    fused, plain = pair(model.eval())

    def add_one(module, args, output):
        (output[0] if isinstance(output, tuple) else output).add_(1)

    for entry in fuse(fused).replaced:
        if which != "blocks" or entry.what.endswith(("Block", "Layer")):
            for each in (fused, plain):
                each.get_submodule(entry.path).register_forward_hook(add_one)
    torch.testing.assert_close(tokens_of(fused(batch)), tokens_of(plain(batch)), rtol=1e-4, atol=1e-4)


# What a call asks for beyond the plain value


def assert_own_code_runs(model, call, calls, blocks=("attention", "linear_add")):
    """Not only close: the same bits, from the same random state, and none of the operations of `blocks`."""
    fused, plain = pair(model)
    torch.manual_seed(0)
    found = call(fused)
    assert not any(calls[name] for name in blocks), calls
    torch.manual_seed(0)
    torch.testing.assert_close(found, call(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rates", [{"proj_drop_rate": 0.3, "attn_drop_rate": 0.3}, {"attn_drop_rate": 0.3}, {"proj_drop_rate": 0.3}], ids=str
)
def test_timm_dropout_in_training(rates, calls):
    model, batch = timm_vit(**rates)
    assert_own_code_runs(model, lambda m: m(batch), calls)


def test_dropout_matters_in_training_alone(calls):
    model, batch = timm_vit(proj_drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3)
    fused, plain = pair(model.eval())
    assert_as_exact(fused, plain, batch)
    assert calls["linear_add"] == 2


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.usefixtures("registered")
def test_drop_path_in_training(scale, autocast, calls):
    model, batch = timm_vit(depth=3, drop_path_rate=0.5)
    for block in model.blocks[1:]:  # the first one drops nothing
        block.drop_path1.scale_by_keep = block.drop_path2.scale_by_keep = scale
    batch, found = batch.repeat(6, 1, 1, 1), {}
    fused, plain = pair(model)
    exact = copy.deepcopy(plain).double()
    for name, one, inputs in (("fused", fused, batch), ("plain", plain, batch), ("exact", exact, batch.double())):
        torch.manual_seed(3)  # by which they drop the same
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and name != "exact"):
            found[name] = results(one, inputs)
    assert calls == {**WHOLE, "attention": 3, "linear_add": 3, "layer_norm_residual": 6, "mlp": 3}
    assert_within_rule(found["fused"], found["plain"], found["exact"], torch.bfloat16 if autocast else torch.float32)
    torch.manual_seed(4)
    assert not torch.allclose(fused(batch), found["fused"]["output"].float(), atol=1e-2)


@pytest.mark.usefixtures("registered")
def test_drop_path_and_layer_scale_together(calls):
    model, batch = timm_vit_with_layer_scale(drop_path_rate=0.5)
    batch, found = batch.repeat(6, 1, 1, 1), {}
    fused, plain = pair(model)
    for name, one in (("fused", fused), ("plain", plain), ("exact", copy.deepcopy(plain).double())):
        torch.manual_seed(3)  # by which they drop the same
        found[name] = results(one, batch.double() if name == "exact" else batch)
    assert calls == WHOLE
    assert_within_rule(found["fused"], found["plain"], found["exact"], torch.float32)


@pytest.mark.parametrize("build", [timm_vit_with_layer_scale, dinov2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_scale_smaller_than_half_precision_can_fold(dtype, build):
    """In fp16 a weight times 1e-5 would be one of a few numbers near zero; there, branches are multiplied."""
    model, _ = build(depth=1) if build is timm_vit_with_layer_scale else build(num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "lambda1")):
                parameter.copy_(1e-5 * (1 + normal(*parameter.shape).abs()))
    fused, plain = pair(model.eval())
    block = next(entry.path for entry in fuse(fused).replaced if entry.what.endswith(("Block", "Dinov2Layer")))
    x = normal(2, 5, 64)
    with torch.autocast("cpu", dtype):
        found, baseline = (m.get_submodule(block)(x) - x for m in (fused, plain))
    true = plain.double().get_submodule(block)(x.double()) - x.double()
    assert true.abs().max() < 1e-3
    assert (found - true).square().mean().sqrt() <= 2 * (baseline - true).square().mean().sqrt()


def test_drop_path_that_is_no_longer_plain_is_called(calls):
    model, batch = timm_vit(drop_path_rate=0.5)
    fused, plain = pair(model)
    for each in (fused, plain):
        each.blocks[1].drop_path1.register_forward_hook(lambda module, args, output: 0 * output)
    torch.manual_seed(0)
    found = fused(batch)
    assert calls["linear_add"] == 1
    torch.manual_seed(0)
    torch.testing.assert_close(found, plain(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rates", [{"hidden_dropout_prob": 0.3}, {"attention_probs_dropout_prob": 0.3}], ids=str)
def test_hugging_face_dropout_in_training(rates, calls):
    model, batch = hugging_face_vit(**rates)
    assert_own_code_runs(model, lambda m: m(batch).last_hidden_state, calls, blocks=["linear_add"])


@pytest.mark.parametrize("rates", [{"hidden_dropout_prob": 0.3}, {"attention_probs_dropout_prob": 0.3}], ids=str)
def test_videomae_dropout_in_training(rates, calls):
    model, batch = videomae(**rates)
    assert_own_code_runs(model, lambda m: m(batch).last_hidden_state, calls, blocks=["linear_add"])


@pytest.mark.parametrize("build", [clip, siglip, siglip2])
def test_dropout_of_attention_in_training(build, calls):
    model, batch = build(attention_dropout=0.3)
    assert_own_code_runs(model, lambda m: tokens_of(m(batch)), calls)


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"attention_dropout": 0.3}], ids=str)
def test_torchvision_dropout_in_training(rates, calls):
    model, batch = torchvision_vit(**rates)
    # One example: torch's attention puts the tokens before the batch, and dropout draws in the order of memory.
    assert_own_code_runs(model, lambda m: m(batch[:1]), calls, blocks=["linear_add"])


def test_timm_masks(calls):
    model, batch = timm_vit()
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[:, 3] = False
    assert_own_code_runs(model, lambda m: m(batch, attn_mask=mask), calls)
    assert_own_code_runs(model, lambda m: m(batch, is_causal=True), calls)


def test_hugging_face_masks(calls):
    model, batch = hugging_face_vit()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[:, 3] = 0
    assert_own_code_runs(model, lambda m: m(batch, attention_mask=mask).last_hidden_state, calls)


def test_causal_attention_of_clip_s_texts(calls):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**SIZES, vocab_size=20, max_position_embeddings=8)
    model, words = randomised(CLIPTextModel(config)), torch.tensor([[3, 5, 7, 19], [2, 4, 6, 19]])
    assert_own_code_runs(model, lambda m: m(words).last_hidden_state, calls)


def test_masks_of_siglip2(calls):
    model, batch = siglip2()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    shapes = torch.tensor([[2, 2], [2, 3]])
    assert_own_code_runs(model.model, lambda m: m(batch, mask, shapes).last_hidden_state, calls)


@pytest.mark.parametrize("build", [videomae, clip])
def test_attention_weights_of_other_hugging_face_models(build, calls):
    model, batch = build(attn_implementation="eager")
    fused, plain = pair(model.eval())
    tokens_of(fused(batch))
    assert calls["linear_add"] == 2
    calls.clear()
    found, expected = (m(batch, output_attentions=True).attentions for m in (fused, plain))
    assert len(found) == 2
    assert not calls["attention"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_pooling_head_of_siglip(calls):
    model, batch = siglip(vision_use_head=True)
    fused, plain = pair(model.eval())
    torch.testing.assert_close(fused(batch).pooler_output, plain(batch).pooler_output, rtol=1e-5, atol=1e-5)
    assert calls == {**WHOLE, "layer_norm": 2, "mlp": 3}  # one query attends to all tokens: torch's own forward
    assert [entry.path for entry in fuse(fused, verify=batch).left] == ["head"]


@pytest.mark.parametrize("build", [siglip, siglip2])
def test_heads_of_72(build):
    """As so400m has; on a GPU PyTorch attends for them, and the rest runs on the kernels."""
    model, batch = build(hidden_size=144, num_attention_heads=2)
    plain = copy.deepcopy(model.eval())
    assert not fuse(model, verify=batch).left
    torch.testing.assert_close(tokens_of(model(batch)), tokens_of(plain(batch)), rtol=1e-4, atol=1e-4)


def test_attention_weights_of_hugging_face(calls):
    model, batch = hugging_face_vit(attn_implementation="eager")
    fused, plain = pair(model)
    assert fused(batch).attentions is None
    assert calls["linear_add"] == 2
    calls.clear()
    found, expected = (m(batch, output_attentions=True).attentions for m in (fused, plain))
    assert len(found) == 2
    assert not calls["attention"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.is_tensor(fused.layers[0].attention(normal(2, 5, 64))[1])
    assert "outside a fused block" in str(fuse(fused))


def test_hidden_states_of_hugging_face(calls):
    model, batch = hugging_face_vit()
    fused, plain = pair(model.eval())
    found, expected = (m(batch, output_hidden_states=True).hidden_states for m in (fused, plain))
    assert len(found) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_calls_of_torch_attention_that_ask_for_more(calls):
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x, y = normal(2, 5, 64), normal(2, 5, 64, seed=1)
    fused, plain = pair(attention)
    asks = [
        lambda m: m(x, x, x),
        lambda m: m(x, y, y, need_weights=False),
        lambda m: m(x, x, y, need_weights=False),
        lambda m: m(x, x, x, torch.zeros(2, 5, dtype=torch.bool), False),
        lambda m: m(x, x, x, need_weights=False, attn_mask=torch.zeros(5, 5)),
        lambda m: m(x[0], x[0], x[0], need_weights=False),
    ]
    for ask in asks:
        assert torch.equal(ask(fused)[0], ask(plain)[0])
        assert not calls
    torch.testing.assert_close(fused(x, x, x, None, False), plain(x, x, x, None, False))
    torch.testing.assert_close(fused(query=x, key=x, value=x, need_weights=False), plain(x, x, x, None, False))
    assert calls["attention"] == 2


# What is done to a model after it was fused


def linears(model):
    blocks = model.encoder.layer if hasattr(model, "encoder") else model.layers if hasattr(model, "layers") else model.blocks
    return [(block, name) for block in blocks for name, part in block.named_modules() if type(part) is nn.Linear]


@pytest.mark.parametrize("build", [timm_vit, hugging_face_vit, videomae, timm_vit_with_layer_scale])
@pytest.mark.parametrize("index", range(6))
def test_adapters_put_in_afterwards_are_used(build, index):
    model, batch = build()
    fused, plain = pair(model)
    for changed in (fused, plain):
        torch.manual_seed(0)
        found = linears(changed)
        block, name = found[index % (len(found) // 2)]
        block.set_submodule(name, LowRank(block.get_submodule(name)))
    assert_as_exact(fused, plain, batch)
    assert "up.weight" in " ".join(name for name, p in fused.named_parameters() if p.grad is not None)
    assert fuse(fused).replaced


@pytest.mark.parametrize(
    "build", [timm_vit, hugging_face_vit, torchvision_vit, videomae, clip, dinov2, lambda: timm_vit(init_values=0.1, qk_norm=True)]
)
def test_hooks_run_as_often_and_change_as_much_as_before(build):
    model, batch = build()
    plain = copy.deepcopy(model)
    paths = [path for path, _ in model.named_modules() if path]
    fuse(model)
    for path in paths:
        seen, outputs = [], []
        for each in (model, plain):
            module = each.get_submodule(path)
            count = Counter()

            def hook(module, args, output, count=count):
                count["calls"] += 1
                return output * 1.01 if isinstance(output, torch.Tensor) else (output[0] * 1.01, *output[1:])

            handle = module.register_forward_hook(hook)
            try:
                outputs.append(tokens_of(each(batch)))
            except (TypeError, AttributeError):  # an output that cannot be scaled, or has no fields then
                outputs.append(torch.zeros(1))
            handle.remove()
            seen.append(count["calls"])
        assert seen[0] == seen[1], path
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_hooks_before_and_hooks_of_all_modules_run_as_often():
    model, batch = timm_vit()
    fused, plain = pair(model)
    counts = []
    for each in (fused, plain):
        count = Counter()
        handles = [m.register_full_backward_hook(lambda m, a, b, c=count: c.update([type(m).__name__])) for m in each.blocks.modules()]
        handles += [m.register_forward_pre_hook(lambda m, a, c=count: c.update([type(m).__name__])) for m in each.modules()]
        each(batch).sum().backward()
        for handle in handles:
            handle.remove()
        counts.append(count)
    assert counts[0] == counts[1]
    for each in (fused, plain):
        count = Counter()
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, o, c=count: c.update([type(m).__name__]))
        each(batch)
        handle.remove()
        counts.append(count)
    assert counts[2] == counts[3]


def test_parametrised_weights_are_used():
    class Larger(nn.Module):
        def forward(self, weight):
            return 1.1 * weight

    fused, plain = pair(timm_vit()[0])
    for each in (fused, plain):
        for part in (each.blocks[0].mlp.fc1, each.blocks[0].attn.qkv, each.blocks[1].attn.proj, each.blocks[1].norm1):
            torch.nn.utils.parametrize.register_parametrization(part, "weight", Larger())
    assert_as_exact(fused, plain, timm_vit()[1])


def test_replaced_activation_and_switched_dropout_are_used():
    fused, plain = pair(timm_vit()[0])
    for each in (fused, plain):
        each.blocks[0].mlp.act = nn.ReLU()
        each.blocks[1].attn.proj_drop.p = 1.0
        each.blocks[1].mlp.norm = nn.LayerNorm(128)
    assert_as_exact(fused, plain, timm_vit()[1])


def test_loaded_tied_and_converted_parameters_are_read():
    fused, plain = pair(timm_vit()[0])
    batch = timm_vit()[1]
    fresh = {name: value * 0.9 for name, value in plain.state_dict().items()}
    for assign in (False, True):
        fused.load_state_dict(fresh, assign=assign)
        plain.load_state_dict(fresh)
        assert_as_exact(fused, plain, batch)
    for each in (fused, plain):
        each.blocks[1].mlp.fc1.weight = each.blocks[0].mlp.fc1.weight
    assert_as_exact(fused, plain, batch)
    torch.testing.assert_close(fused.double()(batch.double()), plain.double()(batch.double()))


# What is done with a whole fused model


def test_a_copy_has_its_own_parameters(calls):
    model, batch = hugging_face_vit()
    fused, plain = pair(model.eval())
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    calls.clear()
    torch.testing.assert_close(tokens_of(copied(batch)), tokens_of(plain(batch)), rtol=1e-5, atol=1e-5)
    assert calls == WHOLE
    unfuse(copied)
    assert fused_adapter(fused.layers[0])


def test_a_whole_model_written_and_read_is_still_fused(calls):
    model, batch = hugging_face_vit()
    fused, plain = pair(model.eval())
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    torch.testing.assert_close(tokens_of(read(batch)), tokens_of(plain(batch)), rtol=1e-5, atol=1e-5)
    assert calls == WHOLE


def compiling_looks_like_exporting() -> bool:
    """Whether torch.compile takes `torch.compiler.is_exporting()` for true, as in torch 2.11."""
    return bool(torch.compile(lambda x: x * torch.compiler.is_exporting(), fullgraph=True, backend="eager")(torch.ones(())))


@pytest.mark.parametrize("name", ["timm ViT", *long(*(name for name in FAMILIES if name != "timm ViT"))])
def test_compiled_in_one_graph(name, unchecked_types, registered):
    model, batch = FAMILIES[name]()
    fused, plain = pair(model)
    torch.compiler.reset()  # the outermost function is one for all models of Hugging Face
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    assert_as_exact(fused, plain, batch, call=compiled)
    assert len(graphs) == 1
    nodes = [node for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
    # Where transformers cannot see that a mask masks nothing, it gives it to attention: SigLIP2's own, and any in torch 2.11.
    masked = name == "Hugging Face SigLIP2" or (name.startswith("Hugging Face") and compiling_looks_like_exporting())
    fewest = 7 if masked else 9
    assert Counter(str(node.target) for node in nodes if "polyvit" in str(node.target)).total() >= fewest


def test_hooks_and_adapters_in_a_compiled_model(unchecked_types):
    model, batch = timm_vit(depth=1)
    fused, plain = pair(model)
    for each in (fused, plain):
        torch.manual_seed(0)
        each.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, output: 1.1 * output)
        each.blocks[0].attn.qkv = LowRank(each.blocks[0].attn.qkv)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_as_exact(fused, plain, batch, call=compiled)


def test_compiled_models_are_refused():
    model, _ = timm_vit()
    with pytest.raises(ValueError, match="the model has been compiled: call fuse before"):
        fuse(torch.compile(model, backend="eager"))
    model.blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"blocks\.1 has been compiled"):
        fuse(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_of_hugging_face(use_reentrant, calls):
    fused, plain = pair(hugging_face_vit()[0])
    fused.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_as_exact(fused, plain, hugging_face_vit()[1])
    assert calls["attention"] == 4  # forward, and again for the backward
    assert not calls["linear_add"]


def test_checkpointed_blocks_of_timm(calls):
    model, batch = timm_vit()
    fused, plain = pair(model)
    fused.set_grad_checkpointing()
    assert_as_exact(fused, plain, batch)
    assert calls["linear_add"] == 4


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .FSDPLinear. returned a view:UserWarning")  # as torch.nn.Linear does
@pytest.mark.parametrize(("layers_too", "expected"), [(False, WHOLE), (True, {"layer_norm": 5, "attention": 2})])
def test_sharded_after_fuse(layers_too, expected, one_process, calls):
    from torch.distributed.fsdp import fully_shard

    fused, plain = pair(hugging_face_vit()[0])
    for layer in fused.layers:
        for part in [part for part in layer.modules() if layers_too and type(part) is nn.Linear]:
            fully_shard(part, mesh=one_process)
        fully_shard(layer, mesh=one_process)
    fully_shard(fused, mesh=one_process)
    batch, found = hugging_face_vit()[1], {}
    found["output"] = fused(batch).last_hidden_state
    assert calls == expected
    found["output"].backward(normal(2, 5, 64, seed=1))
    gradients = {name: p.grad.full_tensor() for name, p in fused.named_parameters() if p.grad is not None}
    true = results(copy.deepcopy(plain).double(), batch.double())
    assert_within_rule(found | gradients, results(plain, batch), true, torch.float32)


def test_data_parallel_after_fuse(one_process, calls):
    model, batch = timm_vit()
    fused, plain = pair(model)
    assert_as_exact(fused, plain, batch, call=nn.parallel.DistributedDataParallel(fused))
    assert calls == WHOLE


def test_parameters_lent_for_a_call_are_used():
    fused, plain = pair(timm_vit()[0])
    lent = {name: 0.9 * value.detach() for name, value in plain.named_parameters()}
    batch = timm_vit()[1]
    found, expected = (torch.func.functional_call(model, lent, (batch,)) for model in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # timm's check of the picture's size
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace_method. is deprecated:DeprecationWarning")
def test_traced_as_if_never_fused(calls):
    model, batch = timm_vit()
    fused, plain = pair(model.eval())
    traced = torch.jit.trace(fused, batch, check_trace=False)
    assert not calls
    torch.testing.assert_close(traced(batch), plain(batch))


@pytest.mark.parametrize(
    ("name", "strict"),
    [("Hugging Face ViT", False), ("timm ViT", False), ("timm ViT", True), pytest.param("torchvision ViT", True, marks=pytest.mark.long)],
)
def test_exported_as_if_never_fused(name, strict, unchecked_types):
    model, batch = FAMILIES[name]()
    fused, plain = pair(model.eval())
    program = torch.export.export(fused, (batch,), strict=strict)
    assert not any("polyvit" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(tokens_of(program.module()(batch)), tokens_of(plain(batch)), rtol=1e-5, atol=1e-5)


def test_tensors_of_other_kinds_go_the_old_way(calls):
    model, batch = timm_vit()
    fuse(model.eval())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(batch)).shape == (2, 10)
    with torch.device("meta"):
        empty = timm_vit_on_meta()
    fuse(empty)
    assert empty(batch.to("meta")).shape == (2, 10)
    assert not calls


def timm_vit_on_meta():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=4, num_classes=10)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_every_mode_and_precision_gives_the_dtype_and_value_of_the_original(guard, precision):
    model, batch = timm_vit()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fused, plain = pair(model.to(dtype).eval())
    with guard(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found, expected = fused(batch.to(dtype)), plain(batch.to(dtype))
        for x in [normal(2, 5, 64).to(dtype)] + [normal(2, 5, 64).bfloat16()] * (precision == "autocast"):
            for part in ("", "norm1", "attn", "mlp"):
                a, b = (m.blocks[0].get_submodule(part)(x) for m in (fused, plain))
                assert a.dtype == b.dtype, part
    assert found.dtype == expected.dtype
    assert found.requires_grad == expected.requires_grad
    tolerance = 1e-5 if precision == "fp32" else 0.1
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Being fused and unfused


def test_fused_twice_is_fused_once():
    model, _ = timm_vit()
    first, second = fuse(model), fuse(model)
    assert first == second
    unfuse(model)
    unfuse(model)
    assert not any(fused_adapter(module) for module in model.modules())


def test_another_s_forward_is_left_alone():
    model, batch = timm_vit()
    model.blocks[0].mlp.forward = lambda x: x
    report = fuse(model)
    assert {entry.path: entry.why for entry in report.left} == {
        "blocks.0": "mlp: Mlp is left",
        "blocks.0.mlp": "something else has replaced its forward",
    }
    unfuse(model)
    assert torch.equal(model.blocks[0].mlp(batch), batch)


def test_a_wrapper_around_a_fused_forward_must_go_before_unfuse():
    model, _ = timm_vit()
    fuse(model)
    mlp = model.blocks[0].mlp
    mlp.old_forward, mlp.forward = mlp.forward, lambda x: mlp.old_forward(x) + 1
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp was wrapped after fuse"):
        unfuse(model)


@pytest.mark.parametrize("build", [timm_vit, torchvision_vit])
def test_the_library_that_computes_attention_can_be_named(build, monkeypatch):
    named = []
    attend = ops.attention
    monkeypatch.setattr(ops, "attention", lambda qkv, backend: named.append(backend) or attend(qkv))
    model, batch = build()
    fuse(model, attention="cudnn")
    model(batch).sum().backward()
    assert named == ["cudnn"] * 2
    fuse(model)
    model(batch)
    assert named == ["cudnn"] * 2 + ["auto"] * 2


@pytest.mark.usefixtures("unchecked_types")
def test_a_library_that_is_not_there_changes_nothing():
    model, _ = timm_vit()
    with pytest.raises(ValueError, match="attention by 'cudn' is unknown"):
        fuse(model, attention="cudn")
    assert not any(fused_adapter(module) for module in model.modules())
