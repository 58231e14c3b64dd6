from dataclasses import replace

import pytest
import torch
from grids import SMALL, Clip, Picture, task
from sources import MODEL, as_source, draw, picture_source

from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.apply import Target, load_into
from polyvit_fast.model.tokenizer import sinusoids

TASKS = {"pets": ("picture", 4), "motion": ("clip", 5), "words": ("sound", 6)}
TWO = {name: SMALL[name] for name in ("picture", "clip")}
"""With tubelets of one size."""


def target(model=MODEL, modalities=TWO, classes=None, **options):
    tasks = {name: task(modalities[modality], count) for name, (modality, count) in TASKS.items() if modality in modalities}
    heads = {name: TASKS[name] for name in tasks}
    return Target(
        polyvit=PolyViT(model, modalities, heads, seed=1), model=model, modalities=modalities, tasks=tasks, classes=classes or {}, **options
    )


def rows(report):
    return {row.name: (row.origin, row.change) for row in report.rows}


def copied(goal, source, name, theirs):
    """Whether the model's tensor is the source's, which is found by its name in a PolyViT."""
    return torch.equal(goal.polyvit.state_dict()[name], source.state_dict()[theirs])


def test_a_vit_starts_all_modalities():
    goal, source = target(), picture_source()
    before = {name: tensor.clone() for name, tensor in goal.polyvit.state_dict().items()}
    report = load_into(goal, source)
    after, found = goal.polyvit.state_dict(), rows(report)
    assert found.keys() == after.keys()
    for name in after:
        if name.startswith(("blocks.", "norm.")):
            assert copied(goal, source, name, name)
            assert found[name] == (name, "")
        elif name.startswith("heads."):
            assert torch.equal(after[name], before[name])
            assert found[name] == ("", "nothing says that the source's classes are the same")
    for key in ("weight", "bias", "cls_token", "pos_embed"):
        assert copied(goal, source, f"tokenizers.picture.{key}", f"tokenizers.picture.{key}")
    clip = after["tokenizers.clip.weight"]
    assert torch.equal(clip[:, 1], source.tokenizers["picture"].tensors["weight"][:, 0])
    assert not clip[:, 0].any()
    assert found["tokenizers.clip.weight"] == ("picture: weight", "inflated to 2 frames (central)")
    assert found["tokenizers.clip.pos_embed"] == ("picture: pos_embed", "repeated for 2 frames")
    positions = source.tokenizers["picture"].tensors["pos_embed"]
    assert torch.equal(after["tokenizers.clip.pos_embed"], torch.cat([positions[:, :1], positions[:, 1:], positions[:, 1:]], 1))


def test_a_sound_has_a_pictures_positions_resized():
    modalities = {"sound": replace(SMALL["sound"])}
    goal, source = target(modalities=modalities), picture_source(modality=Picture(size=64, patch=16))
    found = rows(load_into(goal, source))
    assert found["tokenizers.sound.pos_embed"] == ("picture: pos_embed", "resized from 4 × 4 to 3 × 2 (bilinear)")
    ours, theirs = goal.polyvit.tokenizers["sound"].pos_embed, source.tokenizers["picture"].tensors["pos_embed"]
    corners = [theirs[0, 1], theirs[0, 4], theirs[0, 13], theirs[0, 16]]  # which stay where they are
    torch.testing.assert_close(torch.stack([ours[0, 1], ours[0, 2], ours[0, 5], ours[0, 6]]), torch.stack(corners))
    assert torch.equal(ours[:, 0], theirs[:, 0])


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (1, 0), (0, 1), (2, 1), (1, 2), (3, 3)])
def test_blocks_are_those_of_the_same_depth_whoever_owns_them(ours, theirs):
    model, goal = replace(MODEL, num_adaptor_layers=theirs), target(replace(MODEL, num_adaptor_layers=ours))
    source = as_source(draw(PolyViT(model, TWO, {}), seed=5), model, TWO)
    found = rows(load_into(goal, source))
    for name in goal.polyvit.state_dict():
        parts = name.split(".")
        if "blocks" not in parts:
            continue
        own = parts[1] if parts[0] == "tokenizers" else "picture"  # a source's first modality, where it has no other
        number = int(parts[parts.index("blocks") + 1]) + (ours if parts[0] == "blocks" else 0)
        rest = ".".join(parts[parts.index("blocks") + 2 :])
        there = f"tokenizers.{own}.blocks.{number}.{rest}" if number < theirs else f"blocks.{number - theirs}.{rest}"
        assert copied(goal, source, name, there)
        assert found[name][0] == (f"{own}: blocks.{number}.{rest}" if number < theirs else f"blocks.{number}.{rest}")


def test_class_tokens_of_another_number():
    two = replace(SMALL["picture"], num_class_tokens=2, pool="class_tokens")
    goal, source = target(modalities={"picture": two}), picture_source()
    drawn = goal.polyvit.tokenizers["picture"].cls_token.detach().clone()
    report = load_into(goal, source)
    assert rows(report)["tokenizers.picture.cls_token"] == ("picture: cls_token", "1 of 2 class tokens")
    token = goal.polyvit.tokenizers["picture"].cls_token
    assert torch.equal(token[:, :1], source.tokenizers["picture"].tensors["cls_token"])
    assert torch.equal(token[:, 1:], drawn[:, 1:])
    assert report.remarks == [
        "picture has num_class_tokens = 2, some.file was trained with 1",
        "picture has pool = class_tokens, some.file was trained with cls",
    ]
    none = replace(SMALL["picture"], num_class_tokens=0, pool="mean", positions="sinusoidal")
    report = load_into(target(modalities={"picture": none}), picture_source())
    assert report.left_out == {"picture: cls_token": "picture has none", "picture: pos_embed": "picture has none"}


def test_fixed_positions_become_learned_ones():
    fixed = {"picture": replace(SMALL["picture"], positions="sinusoidal")}
    source = as_source(draw(PolyViT(MODEL, fixed, {})), MODEL, fixed)
    goal = target()
    report = load_into(goal, source)
    tokenizers = goal.polyvit.tokenizers
    assert rows(report)["tokenizers.picture.pos_embed"] == ("picture: pos_embed", "fixed sines and cosines")
    assert torch.equal(tokenizers["picture"].pos_embed[0, 1:], sinusoids(4, 32))
    assert torch.equal(tokenizers["clip"].pos_embed[0, 1:], sinusoids(4, 32).repeat(2, 1))
    assert "picture has positions = learned, some.file was trained with sinusoidal" in report.remarks


@pytest.mark.parametrize(
    ("ours", "theirs", "change"),
    [
        (("a", "b", "c", "d"), ("a", "b", "c", "d"), ""),
        (("a", "b", "c", "d"), ("d", "c", "b", "a"), "4 of 4 classes, by their names"),
        (("a", "x", "c", "y"), ("c", "z", "a", "b"), "2 of 4 classes, by their names"),
    ],
)
def test_rows_of_a_head_go_by_the_names_of_classes(ours, theirs, change):
    goal, source = target(classes={"pets": ours}), picture_source(classes=theirs)
    drawn = goal.polyvit.heads["pets"].weight.detach().clone()
    report = load_into(goal, source)
    for key in ("weight", "bias"):
        assert rows(report)[f"heads.pets.{key}"] == (f"head: {key}", change)
    for number, label in enumerate(ours):
        expected = source.heads["classes"].tensors["weight"][theirs.index(label)] if label in theirs else drawn[number]
        assert torch.equal(goal.polyvit.heads["pets"].weight[number], expected)


def test_a_head_for_other_classes_is_new():
    report = load_into(target(classes={"pets": ("k", "l", "m", "n")}), picture_source(classes=("a", "b", "c", "d")))
    assert rows(report)["heads.pets.weight"] == ("", "none of its classes is among the source's (a, b, c, …)")


def test_without_names_a_head_is_loaded_where_it_is_asked_for():
    goal, source = target(), picture_source()
    report = load_into(goal, source, ["picture", "pets"])
    assert copied(goal, source, "heads.pets.weight", "heads.classes.weight")
    assert {row.name.split(".")[0] for row in report.rows} == {"tokenizers", "heads"}
    assert not [row.name for row in report.rows if "clip" in row.name]
    report = load_into(target(), source, ["motion"])
    assert rows(report)["heads.motion.weight"] == ("", "nothing says that the source's classes are the same")


def test_a_run_gives_its_tasks_what_they_had():
    polyvit = draw(PolyViT(MODEL, TWO, {"pets": ("picture", 4), "old": ("clip", 5)}), seed=7)
    goal, source = target(), as_source(polyvit, MODEL, TWO)
    found = rows(load_into(goal, source))
    assert copied(goal, source, "heads.pets.weight", "heads.pets.weight")
    assert found["heads.motion.bias"] == ("", "the source has no head for it")


@pytest.mark.parametrize("name", ["dim", "depth", "num_heads", "mlp_dim"])
def test_sizes_that_differ_are_named(name):
    other = replace(MODEL, **{name: getattr(MODEL, name) * 2})
    message = rf"some.file \(test\) has {name} = {getattr(other, name)}, the model {getattr(MODEL, name)}. Take its sizes: --model.dim "
    with pytest.raises(ValueError, match=message):
        load_into(target(), picture_source(other))


def test_tokenizers_that_do_not_fit_are_named():
    wrong = {"clip": Clip(frames=6, size=16, tubelet_frames=3, patch=8)}
    source = as_source(PolyViT(MODEL, {"clip": SMALL["clip"]}, {}), MODEL, {"clip": SMALL["clip"]})
    message = "some.file, clip: weight does not fit the model's tokenizers.clip.weight: its tubelets have 2 frames, the model's 3"
    with pytest.raises(ValueError, match=message):
        load_into(target(modalities=wrong), source)


def test_nothing_is_changed_where_something_does_not_fit():
    goal = target(modalities={"picture": SMALL["picture"], "clip": Clip(frames=6, size=16, tubelet_frames=3, patch=4)})
    before = {name: tensor.clone() for name, tensor in goal.polyvit.state_dict().items()}
    message = "its tubelets have 8 × 8 pixels, the model's 4 × 4. To leave clip out, name what to load: trunk=some.file,picture=some.file"
    with pytest.raises(ValueError, match=message):
        load_into(goal, picture_source())
    assert all(torch.equal(tensor, before[name]) for name, tensor in goal.polyvit.state_dict().items())


def test_settings_that_differ_are_remarked():
    report = load_into(target(replace(MODEL, gelu="erf")), picture_source(replace(MODEL, norm_eps=1e-12)))
    assert report.remarks == [
        "the model has gelu = erf, some.file was trained with tanh (--model.gelu tanh)",
        "the model has norm_eps = 1e-06, some.file was trained with 1e-12 (--model.norm-eps 1e-12)",
    ]


def test_the_report_says_it_in_a_sentence_and_tensor_by_tensor():
    report = load_into(target(), picture_source())
    text = report.summarise()
    assert text.startswith("some.file (test): 44 tensors copied; tokenizers.clip.weight inflated to 2 frames (central); ")
    assert "; 4 new (heads.pets, heads.motion)" in text
    lines = report.lines()
    assert len(lines) == 44 + 2 + 4
    assert lines[-1].split(None, 1) == ["heads.motion.bias", "new: nothing says that the source's classes are the same"]
