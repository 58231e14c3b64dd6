"""Other libraries' models with our weights are our model."""

import pytest
import torch
from cases import PICTURE, case_of, model_of
from ported import hugging_face_ast, hugging_face_vit, hugging_face_vivit, port, timm_vit
from steps import make_batch

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.video.modality import Video

CLIP = Video(size=32, short_side=32, frames=8, tubelet_frames=2)
SOUND = Audio(clip_seconds=0.64, num_mel_bins=48, channels=1)


@pytest.mark.parametrize(
    ("build", "modality", "gelu"),
    [
        (timm_vit, PICTURE, "erf"),
        (hugging_face_vit, PICTURE, "erf"),
        (hugging_face_vit, PICTURE, "tanh"),
        (hugging_face_vivit, CLIP, "tanh"),
    ],
)
def test_logits_are_ours(build, modality, gelu):
    case = case_of(modality, gelu)
    ours, (grid, _) = model_of(case), make_batch(case.task)
    ported = port(build, ours, case.model, case.task, grid)
    assert ported.module.training
    torch.testing.assert_close(ported.logits(ported.module, ported.pixels), ours(grid, "task"), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ast_is_ours_but_for_its_second_class_token():
    case = case_of(SOUND)
    ours, (grid, _) = model_of(case), make_batch(case.task)
    ported = hugging_face_ast(case.model, case.task, ours.state_dict(), grid)
    x = ours.tokenizers["audio"](grid)
    x = torch.cat([x[:, :1], x], 1)
    for block in ours.blocks:
        x = block(x)
    first = torch.nn.functional.layer_norm(ours.norm(x[:, 0]), (case.model.dim,))
    expected = ours.heads["task"](first)
    torch.testing.assert_close(ported.logits(ported.module, ported.pixels), expected, rtol=1e-3, atol=1e-4)


def test_a_model_that_gives_something_else_is_refused():
    case = case_of()
    ours, (grid, _) = model_of(case), make_batch(case.task)

    def build(model, task, state, grid):
        ported = timm_vit(model, task, state, grid)
        with torch.no_grad():
            ported.module.blocks[1].mlp.fc2.weight.neg_()
        return ported

    with pytest.raises(ValueError, match="from eager's"):
        port(build, ours, case.model, case.task, grid)


def test_what_a_library_lacks_is_named():
    tanh, colours = case_of(gelu="tanh"), case_of(Audio(clip_seconds=0.64, num_mel_bins=48))
    for build, case, message in ((timm_vit, tanh, "GELU"), (hugging_face_ast, colours, "one channel, the grid has 3")):
        with pytest.raises(ValueError, match=message):
            build(case.model, case.task, model_of(case).state_dict(), make_batch(case.task)[0])
