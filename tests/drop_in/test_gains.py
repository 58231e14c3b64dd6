"""What `fuse` says that it saves, counted: the operators that torch runs over tensors as large as the tokens, fused and not."""

import copy
from collections import Counter

import pytest
import torch
from foreign_models import FAMILIES, normal, timm_vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyvit_fast import fuse
from polyvit_fast.drop_in.gains import gains, measured
from polyvit_fast.drop_in.parts import MlpPart

PRODUCTS = {"mlp": 2, "mlp_backward": 4, "linear_add_backward": 2}
"""How many kernels over the tokens our operations are, if not one: their products, which have everything else in them."""
# Copies of attention for a CPU; FlashAttention on a GPU needs none.
UNCOUNTED = ("clone", "empty", "detach", "ones_like")


class Kernels(TorchDispatchMode):
    """Counts the operators, views aside, that read or write a tensor with as many numbers as the tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.counts = tokens, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), outputs))
        addresses = {t.untyped_storage().data_ptr() for t in read}
        is_view = all(t.untyped_storage().data_ptr() in addresses for t in written)
        name = func._schema.name.partition("::")[2]
        if not is_view and max(t.numel() for t in (*read, *written)) >= self.tokens and not name.startswith(UNCOUNTED):
            self.counts[name] += PRODUCTS.get(name, 1)
        return outputs


def count(block, x, *more):
    """The kernels over the tokens, forward and backward."""
    x = x.clone().requires_grad_()
    with Kernels(x.numel()) as forward:
        y = block(x, *more)
    with Kernels(x.numel()) as backward:
        y.backward(torch.ones_like(y))
    return forward.counts, backward.counts


# Norms are one operator either way. EVA and torchvision have products of their own making that the counts below do not describe.
COUNTED = [name for name in FAMILIES if not name.startswith(("timm EVA", "torchvision"))]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", COUNTED)
def test_a_fused_block_runs_as_many_kernels_fewer_as_said(name):
    # The GELU of ViViT's own configuration is written out in nine operators; what is said counts the one that torch has.
    model, _ = FAMILIES[name](**({"hidden_act": "gelu"} if "ViViT" in name else {}))
    plain = copy.deepcopy(model.eval())
    entry = next(entry for entry in fuse(model).replaced if entry.what.endswith(("Block", "Layer")))
    more = [None] if "CLIP" in name or "LIP" in name else []  # a mask
    counts = [count(m.get_submodule(entry.path), normal(64, 65, 64), *more) for m in (plain, model)]
    saved = [before.total() - after.total() for before, after in zip(*counts, strict=True)]
    assert saved == [sum(gain.forward for gain in entry.gains), sum(gain.backward for gain in entry.gains)], counts


def test_the_report_adds_up_blocks_and_what_lies_in_none():
    text = str(fuse(timm_vit(depth=3)[0]))
    title, *rows = text[text.index("gains: ") :].splitlines()
    assert title.startswith("gains: 9 kernels over the tokens fewer forward and 21 fewer backward than operation by operation, on a GPU")
    assert [row.split()[0] for row in rows[:1] + rows[3:4]] == ["Block", "LayerNorm"]
    assert "measured on an H100" in rows[4]
    assert all(row.endswith("(hopper-linear.jsonl)") for row in rows[5:])
    assert len(rows) == 7  # heads of 16 have not been measured


def test_heads_that_are_torch_s_on_a_gpu_are_named():
    model, _ = timm_vit(embed_dim=144, num_heads=2)
    (entry,) = (entry for entry in fuse(model.blocks[0].attn).replaced)
    assert [gain.what for gain in entry.gains] == ["attention itself stays PyTorch's, for heads of 72"]
    assert entry.measured == ()


def test_products_of_adapted_layers_are_no_gain():
    model, _ = FAMILIES["Hugging Face ViT"]()
    attention = model.layers[0].attention
    attention.q_proj = nn.Sequential(attention.q_proj)
    entry = next(entry for entry in fuse(attention).replaced)
    assert entry.gains == ()


def test_an_adapted_projection_is_added_by_itself():
    model, _ = timm_vit()
    whole = next(entry for entry in fuse(model).replaced if entry.what == "Block").gains[0]
    model.blocks[0].attn.proj = nn.Sequential(model.blocks[0].attn.proj)
    less = next(entry for entry in fuse(model).replaced if entry.what == "Block").gains[0]
    assert (whole.forward - less.forward, whole.backward - less.backward) == (1, 1)


def test_only_what_was_measured_is_quoted():
    layer = nn.Linear(4, 4)
    assert "exact GELU" in measured(MlpPart(layer, layer, "erf"))[0]
    assert measured(MlpPart(layer, layer, "tanh")) == ()
    assert gains(MlpPart(layer, layer, "quick"))[0][1:] == (3, 6)
