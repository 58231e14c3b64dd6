"""Whole steps: what each library trains, what is counted, and what becomes of one that trains another model."""

import math
import weakref
from dataclasses import replace

import bench_step
import peers
import pytest
import steps
import torch
from cases import case_of, model_of
from harness import OURS
from ported import hugging_face_ast, hugging_face_vit, port, timm_vit
from steps import Trainer, assert_equal_losses, config_of, first_losses, group_of, our_trainer, our_trainers_apart, peer_trainer
from test_harness import Benchmark

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.model.cost import forward_flops
from polyvit_fast.model.modules import drop_path_ramp
from polyvit_fast.model.polyvit import PolyViT


def trainer(losses=(1.0, 0.9), flops=1.0):
    left = iter(losses)
    return Trainer(step=lambda: None, loss=lambda: next(left), flops=flops)


def test_all_libraries_make_the_step_that_ours_makes():
    case = case_of()
    model = model_of(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = first_losses(our_trainer(case.config, model, captured=False))
    assert ours[1] < ours[0]
    for build in (timm_vit, hugging_face_vit):
        losses = first_losses(peer_trainer(case, build, model, backend=None))
        assert losses == pytest.approx(ours, rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_peer_that_is_all_in_bf16_computes_the_same_loss_but_loses_small_updates():
    case = case_of()
    model = model_of(case)
    ours = first_losses(our_trainer(case.config, model, captured=False))
    pure = peer_trainer(case, timm_vit, model, backend=None, pure=True)
    first, second = first_losses(pure)
    assert_equal_losses([first], ours[:1])
    assert ours[1] < second < first


def test_ours_has_the_residual_stream_of_its_case_on_a_gpu(monkeypatch):
    case = replace(case_of(), residual="bf16")
    assert case.config.compute.residual == ("bf16" if steps.HAS_GPU else "fp32")
    monkeypatch.setattr(steps, "HAS_GPU", True)
    assert (case.config.precision, case.config.compute.residual) == ("bf16", "bf16")
    narrow = next(case for case in bench_step.CASES if "bf16 residual" in case.title)
    assert narrow.case().residual == "bf16"
    assert f"timm all in bf16 {peers.COMPILED}" in narrow.candidates


def test_a_peer_drops_branches_at_our_rates():
    case = next(case for case in bench_step.CASES if "drop path" in case.title).case()
    assert case.model.rescale_drop_path  # as timm does
    small = replace(case, model=replace(case.model, dim=32, depth=3, num_heads=2, mlp_dim=64), task=replace(case.task, batch=1))
    ported = port(timm_vit, model_of(small), small.model, small.task, steps.make_batch(small.task)[0])
    rates = [[getattr(drop, "drop_prob", 0.0) for drop in (block.drop_path1, block.drop_path2)] for block in ported.module.blocks]
    assert rates == [[pytest.approx(rate)] * 2 for rate in drop_path_ramp(3, 0.1)]


def test_a_multi_label_task_is_trained_alike():
    # So many tokens that the second class token of theirs has little weight.
    case = case_of(Audio(clip_seconds=1.6, num_mel_bins=1024, channels=1), loss="sigmoid", multi_label=True, batch=2)
    model = PolyViT.from_config(case.config)
    ours = first_losses(our_trainer(case.config, model, captured=False))
    assert_equal_losses(first_losses(peer_trainer(case, hugging_face_ast, model, backend=None)), ours)


def test_tasks_apart_have_the_weights_of_the_shared_model(monkeypatch):
    monkeypatch.setattr(steps, "LR", 1e-12)  # else a task's step changes the weights for the next
    case = case_of()
    config = config_of(case.model, {"a": case.task, "b": replace(case.task, num_classes=3)})
    model = PolyViT.from_config(config)
    mixed, alone = our_trainer(config, model, captured=False), our_trainers_apart(config, model, captured=False)
    assert mixed.flops == alone.flops
    assert first_losses(mixed) == pytest.approx(first_losses(alone), rel=1e-5)
    assert alone.peak_gib is None


def test_who_trains_something_else_is_refused_before_it_is_timed():
    trainers = {
        OURS: trainer,
        "same": trainer,
        "other": lambda: trainer((1.0, 0.97)),
        "nan": lambda: trainer((math.nan, 1.0)),
        "missing": "no",
    }
    group = group_of("steps", 4, "images", trainers)
    for name, reason in {"other": "losses are 1 and 0.97, those of the first candidate 1 and 0.9", "nan": "nan", "missing": "no"}.items():
        group.enter(OURS, Benchmark())
        with pytest.raises(pytest.skip.Exception, match=reason):
            group.enter(name, Benchmark())
    group.enter("same", Benchmark())
    assert {entry.name for entry in group.entries} == {OURS, "same"}


def test_losses_may_differ_where_the_group_says_so_but_not_be_nan():
    trainers = {OURS: trainer, "other": lambda: trainer((5.0, 4.0)), "nan": lambda: trainer((math.nan, 1.0))}
    group = group_of("steps", 4, "images", trainers, math.inf)
    for name in (OURS, "other"):
        group.enter(name, Benchmark())
    with pytest.raises(pytest.skip.Exception, match="nan"):
        group.enter("nan", Benchmark())


def test_a_row_says_what_a_step_computes():
    group = group_of("steps", 4, "images", {OURS: lambda: trainer(flops=2e9)})
    group.enter(OURS, Benchmark())
    [row] = group.take_turns(2, 3)
    assert len(row.seconds) == 6
    assert row.info["tflops"] == pytest.approx(2e9 / (4 * row.unit_seconds) / 1e12)
    assert (row.amount, row.unit, row.info["peak_gib"]) == (4, "images", None)


def test_who_trains_something_else_leaves_its_memory_to_the_next():
    kept = []

    def other():
        found = trainer((5.0, 4.0))
        kept.append(weakref.ref(found))
        return found

    group = group_of("steps", 4, "images", {OURS: trainer, "other": other})
    group.enter(OURS, Benchmark())
    with pytest.raises(pytest.skip.Exception):
        group.enter("other", Benchmark())
    assert kept[0]() is None


def test_a_peer_is_captured_by_its_compiler_which_is_asked_before_each_step(monkeypatch):
    modes, steps_begun = [], []
    monkeypatch.setattr(torch, "compile", lambda module, mode, **_: modes.append(mode) or module)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps_begun.append(0))
    case = case_of()
    for captured in (False, True):
        first_losses(peer_trainer(case, timm_vit, model_of(case), compiled=True, backend=None, captured=captured))
    assert modes == [None, "reduce-overhead"]
    assert len(steps_begun) == 2


@pytest.mark.parametrize("size", ["Ti", "S"])
def test_small_models_have_a_captured_peer(size):
    case = next(case for case in bench_step.CASES if case.title.startswith(f"ViT-{size}"))
    assert f"timm {peers.REDUCED}" in case.candidates


def test_operations_of_a_peer_are_those_of_all_tokens_in_all_blocks():
    case = case_of()
    ours = our_trainer(case.config, model_of(case), captured=False)
    theirs = peer_trainer(case, timm_vit, model_of(case), backend=None)
    model, tokens = case.model, case.task.modality.num_tokens
    block = tokens * model.dim * (4 * model.dim + 2 * model.mlp_dim)  # torch's counter does not know a CPU's fused attention
    patches = (tokens - 1) * 16 * 16 * 3 * model.dim
    assert theirs.flops == 3 * case.task.batch * 2 * (model.depth * block + patches + model.dim * case.task.num_classes)
    assert ours.flops == 3 * case.task.batch * forward_flops(model, case.task.modality, case.task.num_classes)


TOKENS = [("ViT-B", 197), ("ViViT-B", 3137), ("ViT-S", 197), ("AST-B", 1213), ("ViT-L", 197), ("ViT-Ti", 197)]


@pytest.mark.parametrize(("name", "tokens"), TOKENS)
def test_models_on_a_gpu_have_the_tokens_that_their_names_stand_for(name, tokens):
    given = next(case for case in bench_step.CASES if case.title.startswith(name))
    case = given.case()
    assert case.task.modality.num_tokens == tokens
    assert set(given.candidates) <= bench_step.find_trainers(case, None).keys()


def test_nine_tasks_fill_one_model():
    tasks = bench_step.nine_tasks()
    assert len(tasks) == 9
    assert {task.micro_batches for task in tasks.values()} == {1}
    assert all(task.batch % 2 == 0 for task in tasks.values())
    assert len({case.title for case in bench_step.CASES}) == len(bench_step.CASES)
