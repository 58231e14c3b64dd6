import math
from dataclasses import dataclass, replace

import pytest
import torch
from grids import PAPER, PAPER_HEADS, SMALL, Picture, task
from torch.nn import functional

from polyvit_fast.config import MODELS, ComputeOptions, Model, Train
from polyvit_fast.model.class_token import ClassTokenBlock
from polyvit_fast.model.cost import num_parameters
from polyvit_fast.model.modules import Attention, Block, LayerNorm
from polyvit_fast.model.polyvit import PolyViT
from polyvit_kernels import ops

MODEL = Model(dim=32, depth=4, num_heads=4, mlp_dim=64)
HEADS = {"pets": ("picture", 3), "birds": ("picture", 4), "motion": ("clip", 5), "words": ("sound", 6)}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def polyvit(model=MODEL, heads=HEADS, seed=0):
    return PolyViT(model, {name: SMALL[name] for name, _ in heads.values()}, heads, seed=seed)


def spec_model(size, num_adaptor_layers=0, heads=PAPER_HEADS):
    model = replace(MODELS[size], num_adaptor_layers=num_adaptor_layers)
    with torch.device("meta"):
        return PolyViT(model, {name: PAPER[name] for name, _ in heads.values()}, heads)


COUNTS = {  # trunk, tokenizers of picture, clip, sound, heads; all nine tasks with no, half and only adaptors
    "Ti": ((5_338_752, 258_624, 891_456, 224_832, 534_031), (7_247_695, 12_586_063, 17_924_431)),
    "S": ((21_294_336, 517_248, 1_782_912, 449_664, 1_065_295), (25_109_455, 46_403_023, 67_696_591)),
    "B": ((85_056_000, 1_034_496, 3_565_824, 899_328, 2_127_823), (92_683_471, 177_737_935, 262_792_399)),
    "L": ((302_311_424, 1_379_328, 4_754_432, 1_199_104, 2_836_175), (312_480_463, 614_789_839, 917_099_215)),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_of_the_nine_task_model(size):
    parts, totals = COUNTS[size]
    model = spec_model(size)
    trunk = num_parameters(model.blocks) + num_parameters(model.norm)
    assert (trunk, *(num_parameters(model.tokenizers[name]) for name in PAPER), num_parameters(model.heads)) == parts
    depth = MODELS[size].depth
    assert tuple(num_parameters(spec_model(size, layers)) for layers in (0, depth // 2, depth)) == totals


def test_parameter_counts_of_the_single_modality_models():
    counts = []
    for modality in PAPER:
        heads = {task: head for task, head in PAPER_HEADS.items() if head[0] == modality}
        counts.append(num_parameters(spec_model("B", heads=heads)))
    assert counts == [87_007_144, 89_190_115, 86_598_212]


@pytest.mark.parametrize("num_adaptor_layers", [0, 2, 4])
def test_one_modality_alone_is_the_same_model(num_adaptor_layers):
    model = replace(MODEL, num_adaptor_layers=num_adaptor_layers)
    whole, alone = polyvit(model).eval(), polyvit(model, {"motion": ("clip", 5)}).eval()
    grid = normal(2, *SMALL["clip"].grid)
    assert torch.equal(whole(grid, "motion"), alone(grid, "motion"))
    alone.load_state_dict({name: value for name, value in whole.state_dict().items() if name in alone.state_dict()})
    assert torch.equal(whole(grid, "motion"), alone(grid, "motion"))


def all_token_blocks(model):
    """The shared blocks with the last in a form that gives all tokens."""
    last = Block.from_config(MODEL)
    last.load_state_dict(model.blocks[-1].state_dict())
    return [*model.blocks[:-1], last]


def test_logits_are_written_out():
    model = polyvit(replace(MODEL, num_adaptor_layers=1))
    grid = normal(2, *SMALL["picture"].grid)
    x = model.tokenizers["picture"](grid)
    assert (len(model.tokenizers["picture"].blocks), len(model.blocks)) == (1, 3)
    for block in all_token_blocks(model):
        x = block(x)
    torch.testing.assert_close(model(grid, "birds"), model.heads["birds"](model.norm(x)[:, 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_adaptor_layers", [0, 3, 4])
def test_the_last_block_gives_the_class_token_alone_unless_it_is_an_adaptor(num_adaptor_layers):
    model, rows = polyvit(replace(MODEL, num_adaptor_layers=num_adaptor_layers)), []
    blocks = [*model.tokenizers["picture"].blocks, *model.blocks]
    assert [type(block) for block in blocks] == [Block] * 3 + [Block if num_adaptor_layers == 4 else ClassTokenBlock]
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    model(normal(2, *SMALL["picture"].grid), "birds")
    assert rows == [5, 5, 5, 5 if num_adaptor_layers == 4 else 1]


@pytest.mark.parametrize("num_adaptor_layers", [0, 3, 4])
@pytest.mark.parametrize(("pool", "num_class_tokens"), [("cls", 2), ("class_tokens", 2), ("mean", 0), ("mean", 1)])
def test_heads_read_what_the_pool_says(pool, num_class_tokens, num_adaptor_layers):
    modality = replace(SMALL["clip"], pool=pool, num_class_tokens=num_class_tokens)
    model = PolyViT(replace(MODEL, num_adaptor_layers=num_adaptor_layers), {"clip": modality}, {"motion": ("clip", 5)})
    grid = normal(2, *modality.grid)
    x = model.tokenizers["clip"](grid)
    for block in all_token_blocks(model) if num_adaptor_layers < 4 else []:
        x = block(x)
    pooled = {
        "cls": lambda: model.norm(x)[:, 0],
        "class_tokens": lambda: model.norm(x)[:, :2].mean(1),
        "mean": lambda: model.norm(x[:, num_class_tokens:].mean(1)),
    }
    torch.testing.assert_close(model(grid, "motion"), model.heads["motion"](pooled[pool]()), rtol=1e-5, atol=1e-5)
    model(grid, "motion").square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("num_adaptor_layers", [0, 2, 4])
def test_features_are_all_tokens_after_any_block(num_adaptor_layers):
    model = polyvit(replace(MODEL, num_adaptor_layers=num_adaptor_layers)).eval()
    grid, tokenizer = normal(2, *SMALL["picture"].grid), model.tokenizers["picture"]
    x = tokenizer(grid, num_blocks=0)
    assert torch.equal(model.features(grid, "picture", layer=0), x)
    blocks = [*tokenizer.blocks, *(all_token_blocks(model) if num_adaptor_layers < 4 else [])]
    for number, block in enumerate(blocks, 1):
        x = block(x)
        torch.testing.assert_close(model.features(grid, "picture", layer=number), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.features(grid, "picture"), model.norm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.features(grid, "picture")[:, 0], model.norm(x)[:, 0], rtol=1e-5, atol=1e-5)


def test_features_of_what_is_not_there_are_refused():
    with pytest.raises(ValueError, match="the model has no modality 'smell'; it has picture, clip, sound"):
        polyvit().features(normal(1, 1, 16, 16, 3), "smell")
    for layer in (-1, 5):
        with pytest.raises(ValueError, match=f"layer = {layer}, but the model has 4 blocks: 0 to 4"):
            polyvit().features(normal(1, 1, 16, 16, 3), "picture", layer=layer)


def test_a_head_may_normalise_what_it_reads():
    model = PolyViT(replace(MODEL, norm_eps=1e-3), SMALL, HEADS, norm_heads=["words"])
    grid, head = normal(2, *SMALL["sound"].grid), model.heads["words"]
    head.norm.weight.data.uniform_(0.5, 2)
    head.norm.bias.data.normal_()
    read = model.features(grid, "sound")[:, 0]
    normed = functional.layer_norm(read, (32,), head.norm.weight, head.norm.bias, 1e-3)
    torch.testing.assert_close(model(grid, "words"), functional.linear(normed, head.weight, head.bias), rtol=1e-5, atol=1e-5)
    assert {name for name, _ in head.named_parameters()} == {"weight", "bias", "norm.weight", "norm.bias"}


def test_every_norm_has_the_eps_of_the_record():
    model = PolyViT(replace(MODEL, num_adaptor_layers=1, norm_eps=1e-3, last_norm_eps=0.5), SMALL, HEADS)
    norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, LayerNorm)}
    assert norms.pop("norm") == 0.5
    assert set(norms.values()) == {1e-3}
    assert len(norms) == 2 * 3 + 2 * 3


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("num_adaptor_layers", [0, 2, 4])
def test_recomputed_gradients_are_the_same_to_the_bit(num_adaptor_layers, dropout):
    runs = []
    for recompute in (False, True):
        model = polyvit(replace(MODEL, num_adaptor_layers=num_adaptor_layers, dropout=dropout)).train()
        torch.manual_seed(1)
        logits = model(normal(6, *SMALL["clip"].grid), "motion", 0.4, recompute)
        logits.square().sum().backward()
        runs.append([logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert len(runs[0]) > 40
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("num_adaptor_layers", [0, 2])
def test_with_recomputation_only_the_inputs_of_blocks_are_kept(num_adaptor_layers):
    model, kept = polyvit(replace(MODEL, num_adaptor_layers=num_adaptor_layers)).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(normal(6, *SMALL["clip"].grid), "motion", 0.4, True)
    assert sum(tensor.shape == (6, 9, 32) for tensor in kept) == 4
    assert not any(tensor.shape[-1] in (64, 96) for tensor in kept if tensor.shape[:1] == (6,))


def test_all_blocks_attend_by_the_library_that_is_named(monkeypatch):
    named, attend = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda qkv, backend: named.append(backend) or attend(qkv))
    model = PolyViT(replace(MODEL, num_adaptor_layers=1), SMALL, HEADS, attention="flash")
    model(normal(2, *SMALL["picture"].grid), "pets")
    assert named == ["flash"] * 3  # the last block computes the class token alone
    tasks = {name: task(SMALL[modality], num_classes) for name, (modality, num_classes) in HEADS.items()}
    of_configuration = PolyViT.from_config(Train(tasks=tasks, model=MODEL, device="cuda", compute=ComputeOptions(attention="cudnn")))
    assert {module.backend for module in of_configuration.modules() if isinstance(module, Attention)} == {"cudnn"}


@pytest.mark.parametrize("task", HEADS)
def test_a_task_uses_its_own_tokenizer_and_head_and_the_whole_trunk(task):
    model = polyvit(replace(MODEL, num_adaptor_layers=1))
    modality, num_classes = HEADS[task]
    logits = model(normal(2, *SMALL[modality].grid), task)
    assert logits.shape == (2, num_classes)
    logits.square().sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    roots = (f"tokenizers.{modality}.", f"heads.{task}.", "blocks.", "norm.")
    assert touched == {name for name, _ in model.named_parameters() if name.startswith(roots)}
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_class_token_sees_every_tubelet():
    grid = normal(1, *SMALL["clip"].grid).requires_grad_()
    polyvit()(grid, "motion").sum().backward()
    assert grid.grad.all()


@pytest.mark.parametrize(
    ("num_adaptor_layers", "rates"),
    [(0, [0.0, 0.1, 0.2, 0.3]), (1, [0.0, 0.1, 0.2, 0.3]), (2, [0.0, 0.3, 0.2, 0.3]), (4, [0.0, 0.1, 0.2, 0.3])],
)
def test_drop_path_rates_of_adaptors_and_trunk(num_adaptor_layers, rates):
    model, seen = polyvit(replace(MODEL, num_adaptor_layers=num_adaptor_layers)), []
    for block in [*model.tokenizers["picture"].blocks, *model.blocks]:
        block.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    model.train()(normal(2, *SMALL["picture"].grid), "pets", 0.3)
    assert seen == pytest.approx(rates)


def test_drop_path_acts_in_training_alone():
    model, grid = polyvit(), normal(64, *SMALL["picture"].grid)
    exact = model.eval()(grid, "pets")
    assert torch.equal(model(grid, "pets", 0.9), exact)
    assert torch.equal(model.train()(grid, "pets"), exact)
    assert not torch.equal(model(grid, "pets", 0.9), exact)


def test_two_builds_are_equal_whatever_torch_drew_before():
    torch.manual_seed(1)
    first = polyvit(seed=5).state_dict()
    torch.manual_seed(2)
    second, other = polyvit(seed=5).state_dict(), polyvit(seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if first[name].std() > 1e-8)


def test_initial_distributions():
    model = PolyViT(Model(dim=192, depth=4, num_heads=3, mlp_dim=768, num_adaptor_layers=1), SMALL, HEADS)
    tensors = dict(model.named_parameters())
    uniform = {"attn.qkv.weight": 192 + 192, "attn.proj.weight": 192 + 192, "mlp.fc1.weight": 192 + 768, "mlp.fc2.weight": 192 + 768}
    for name, tensor in tensors.items():
        path = name.split(".")
        if ".".join(path[-3:]) in uniform:
            bound = math.sqrt(6 / uniform[".".join(path[-3:])])
            assert 0.99 * bound < tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        elif path[0] in ("tokenizers", "heads") and path[2:] == ["weight"]:
            std = tensor[0].numel() ** -0.5
            assert tensor.std().item() == pytest.approx(std, rel=0.1)
            assert tensor.abs().max() <= 2 * std / 0.87962566103423978 * 1.0001
        elif path[-1] == "pos_embed":
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1)
        elif path[-2] in ("fc1", "fc2"):
            assert tensor.std().item() == pytest.approx(1e-6, rel=0.2)
        else:
            assert torch.equal(tensor, torch.ones_like(tensor) if "norm" in path[-2] and path[-1] == "weight" else torch.zeros_like(tensor))
    assert {name.rpartition(".")[2] for name in tensors} == {"weight", "bias", "cls_token", "pos_embed"}


def test_heads_may_start_at_zero_and_nothing_else_changes():
    usual, zeroed = polyvit().state_dict(), PolyViT(MODEL, SMALL, HEADS, zero_heads=["motion", "words"]).state_dict()
    zeros = {"heads.motion.weight", "heads.words.weight"}
    assert all(not zeroed[name].any() for name in zeros)
    assert all(torch.equal(tensor, zeroed[name]) for name, tensor in usual.items() if name not in zeros)


def test_no_two_tensors_have_the_same_values():
    model = polyvit()
    drawn = [parameter.flatten()[:4] for parameter in model.parameters() if parameter.numel() >= 4 and parameter.std() > 1e-8]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn) > 20


def test_model_of_a_configuration():
    tasks = {name: task(SMALL[modality], num_classes) for name, (modality, num_classes) in HEADS.items()}
    model, again = PolyViT.from_config(Train(tasks=tasks, model=MODEL, seed=3)), polyvit(seed=3)
    zeroed = PolyViT.from_config(Train(tasks=tasks | {"pets": replace(tasks["pets"], zero_head=True)}, model=MODEL))
    assert [name for name, head in zeroed.heads.items() if not head.weight.any()] == ["pets"]
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in model.named_children()] == ["tokenizers", "blocks", "norm", "heads"]


@dataclass(frozen=True, kw_only=True)
class Toned(Picture):
    """Pictures with a mean and a std of their own."""

    mean: float = 127.5
    std: float = 127.5

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (self.mean,) * 3, (self.std,) * 3


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_each_task_normalises_by_its_own_numbers_whatever_the_order(order):
    toned = {"a": Toned(size=16, patch=8), "b": Toned(size=16, patch=8, mean=100.0, std=60.0), "c": Toned(size=16, patch=8, std=30.0)}
    model = PolyViT.from_config(Train(tasks={name: task(toned[name], 3) for name in order}, model=MODEL)).eval()
    grid = torch.randint(0, 256, (2, 1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, modality in toned.items():
        alone = PolyViT.from_config(Train(tasks={name: task(modality, 3)}, model=MODEL)).eval()
        assert torch.equal(model(grid, name), alone(grid, name))
        assert not torch.equal(model(grid, name), model(grid + 1, name))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_unknown_task_and_modality_and_impossible_names():
    with pytest.raises(ValueError, match="the model has no task 'cats'; it has pets, birds, motion, words"):
        polyvit()(normal(1, 1, 16, 16, 3), "cats")
    with pytest.raises(ValueError, match=r"heads of the modalities \['smell'\], but there are only \['picture'\]"):
        PolyViT(MODEL, {"picture": Picture(size=16)}, {"pets": ("smell", 3)})
    for name in ("values", "type", "a.b", ""):
        with pytest.raises(ValueError, match=f"cannot be called {name!r}"):
            PolyViT(MODEL, {"picture": Picture(size=16)}, {name: ("picture", 3)})
