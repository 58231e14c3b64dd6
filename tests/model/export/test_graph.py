"""The plain module computes what the model does, and its graph takes any batch."""

import pytest
import torch
from export_cases import CASES, build, draw_levels

from polyvit_fast.model.export.graph import PlainModule, describe_layout, lay_out, trace


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_models(name):
    polyvit, _, vit = build(name)
    levels = draw_levels(vit)
    with torch.no_grad():
        found = PlainModule(vit).eval()(lay_out(vit, levels))
        torch.testing.assert_close(found, polyvit(levels, "classes"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["picture", "clip, 2 frames", "sound, 3 channels", "mean of two tokens", "masked clip"])
def test_the_graph_takes_any_batch(name, unchecked_types):
    polyvit, _, vit = build(name, torch.float32)
    program = trace(vit)
    assert not [node for node in program.graph.nodes if "polyvit" in str(node.target)]
    polyvit = polyvit.double()
    for batch in (1, 3, 5):
        levels = draw_levels(vit, batch, seed=batch, dtype=torch.float32)
        with torch.no_grad():
            found = program.module()(lay_out(vit, levels)).double()
            torch.testing.assert_close(found, polyvit(levels.double(), "classes"), rtol=0, atol=1e-5)


def test_layouts():
    shapes = {"picture": (2, 3, 32, 48), "clip, 2 frames": (2, 8, 3, 32, 48), "plain sound": (2, 64, 48)}
    for name, shape in shapes.items():
        _, _, vit = build(name)
        assert lay_out(vit, draw_levels(vit)).shape == shape
    assert describe_layout(build("clip, 2 frames")[2]) == "[batch, 8 frames, 3 channels, 32 rows, 48 columns]"
    assert describe_layout(build("plain sound")[2]) == "[batch, 64 rows, 48 columns]"
    assert describe_layout(build("picture")[2]) == "[batch, 3 channels, 32 rows, 48 columns]"
