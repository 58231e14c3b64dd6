"""Who takes part in a contest of whole steps, what is counted, and what becomes of one who trains another model."""

import math
import weakref
from dataclasses import replace

import bench_step
import peers
import pytest
import steps
import torch
import twins
from cases import case_of, model_of
from problem import OURS, STEP
from race import ALL, Track
from steps import (
    Contest,
    Trainer,
    apart,
    assert_equal_losses,
    first_losses,
    nominal_flops,
    our_trainer,
    peer_trainer,
    run_of,
    train_two_steps,
)

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.model.cost import forward_flops
from polyvit_fast.model.modules import drop_path_ramp
from polyvit_fast.model.polyvit import PolyViT


def trainer(losses=(1.0, 0.9), flops=1.0):
    left = iter(losses)
    return Trainer(step=lambda: None, loss=lambda: next(left), flops=flops)


def contest(ways, **changes):
    return Contest(title="contest", amount=4, unit="images", contenders=ways, **changes)


def test_all_libraries_make_the_step_that_ours_makes():
    case = case_of()
    model = model_of(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = first_losses(our_trainer(case.config, model, captured=False))
    assert ours[1] < ours[0]
    for build in (twins.timm_vit, twins.hugging_face_vit):
        losses = first_losses(peer_trainer(case, build, model, compiled=False, backend=None))
        assert losses == pytest.approx(ours, rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_peer_that_is_all_in_bf16_computes_the_same_loss_but_loses_small_updates():
    case = case_of()
    model = model_of(case)
    ours = first_losses(our_trainer(case.config, model, captured=False))
    pure = peer_trainer(case, twins.timm_vit, model, compiled=False, backend=None, pure=True)
    first, second = first_losses(pure)
    assert_equal_losses([first], ours[:1])
    assert ours[1] < second < first


def test_ours_has_the_residual_stream_of_its_case_on_a_gpu(monkeypatch):
    case = replace(case_of(), residual="bf16")
    assert case.config.compute.residual == ("bf16" if steps.HAS_GPU else "fp32")
    monkeypatch.setattr(steps, "HAS_GPU", True)
    assert (case.config.precision, case.config.compute.residual) == ("bf16", "bf16")
    narrow = next(rivals for rivals in bench_step.ON_A_GPU if "bf16 residual" in rivals.title)
    assert narrow.case().residual == "bf16"
    assert f"timm all in bf16 {peers.COMPILED}" in narrow.contenders


def test_a_peer_drops_branches_at_our_rates():
    case = next(rivals for rivals in bench_step.ON_A_GPU if "drop path" in rivals.title).case()
    assert case.model.rescale_drop_path  # as timm does
    small = replace(case, model=replace(case.model, dim=32, depth=3, num_heads=2, mlp_dim=64), task=replace(case.task, batch=1))
    twin = twins.twin_of(twins.timm_vit, model_of(small), small.model, small.task, steps.batch_of(small.task)[0])
    rates = [[getattr(drop, "drop_prob", 0.0) for drop in (block.drop_path1, block.drop_path2)] for block in twin.module.blocks]
    assert rates == [[pytest.approx(rate)] * 2 for rate in drop_path_ramp(3, 0.1)]


def test_a_multi_label_task_is_trained_alike():
    # So many tokens that the second class token of theirs has little weight.
    case = case_of(Audio(clip_seconds=1.6, num_mel_bins=1024, channels=1), loss="sigmoid", multi_label=True, batch=2)
    model = PolyViT.from_config(case.config)
    ours = first_losses(our_trainer(case.config, model, captured=False))
    assert_equal_losses(first_losses(peer_trainer(case, twins.hugging_face_ast, model, compiled=False, backend=None)), ours)


def test_tasks_apart_have_the_weights_of_the_shared_model(monkeypatch):
    monkeypatch.setattr(steps, "LR", 1e-12)  # else a task's step changes the weights for the next
    case = case_of()
    config = run_of(case.model, {"a": case.task, "b": replace(case.task, num_classes=3)})
    model = PolyViT.from_config(config)
    mixed, alone = our_trainer(config, model, captured=False), apart(config, model, captured=False)
    assert mixed.flops == alone.flops
    assert first_losses(mixed) == pytest.approx(first_losses(alone), rel=1e-5)
    assert alone.peak_gib is None


def test_who_trains_something_else_is_absent_for_that_reason():
    def broken():
        raise RuntimeError("no memory\nmore")

    ways = {OURS: trainer, "same": trainer, "other": lambda: trainer((1.0, 0.97)), "nan": lambda: trainer((math.nan, 1.0))}
    trainers, absent = train_two_steps(ways | {"missing": "not installed", "broken": broken}, steps.FURTHEST_LOSS)
    assert list(trainers) == [OURS, "same"]
    assert absent["other"] == "ValueError: its losses are 1 and 0.97, those of the first contender 1 and 0.9"
    assert "nan" in absent["nan"]
    assert (absent["missing"], absent["broken"]) == ("not installed", "RuntimeError: no memory")


def test_losses_may_differ_where_the_contest_says_so_but_not_be_nan():
    ways = {OURS: trainer, "other": lambda: trainer((5.0, 4.0)), "nan": lambda: trainer((math.nan, 1.0))}
    assert list(train_two_steps(ways, math.inf)[0]) == [OURS, "other"]


def test_a_contest_is_raced_and_tells_what_a_step_is():
    found = Track(rounds=2, calls=3, phase=ALL).raced(STEP, lambda: contest({OURS: lambda: trainer(flops=2e9)}))
    assert len(found.seconds[OURS]) == 6
    info = found.infos[OURS]
    assert info["tflops"] > 0
    assert (info["kind"], info["amount"], info["peak_gib"]) == ("step", 4, None)


def test_only_those_who_were_asked_for_are_built():
    group = contest({OURS: trainer, "timm": lambda: pytest.fail("built")}).enter(STEP, {OURS})
    assert ([lane.name for lane in group.lanes], group.absent) == ([OURS], {})


def test_who_trains_something_else_leaves_its_memory_to_the_next():
    kept = []

    def other():
        found = trainer((5.0, 4.0))
        kept.append(weakref.ref(found))
        return found

    def after():
        assert kept[0]() is None
        return trainer()

    assert list(train_two_steps({OURS: trainer, "other": other, "after": after}, steps.FURTHEST_LOSS)[0]) == [OURS, "after"]


def test_a_peer_is_recorded_by_its_compiler_which_is_told_of_each_step(monkeypatch):
    modes, steps_begun = [], []
    monkeypatch.setattr(torch, "compile", lambda module, mode, **_: modes.append(mode) or module)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps_begun.append(0))
    case = case_of()
    for recorded in (False, True):
        first_losses(peer_trainer(case, twins.timm_vit, model_of(case), compiled=True, backend=None, recorded=recorded))
    assert modes == [None, "reduce-overhead"]
    assert len(steps_begun) == 2


@pytest.mark.parametrize("size", ["Ti", "S"])
def test_small_models_are_held_against_a_recorded_peer(size):
    rivals = next(rivals for rivals in bench_step.ON_A_GPU if rivals.title.startswith(f"ViT-{size}"))
    assert f"timm {peers.RECORDED}" in rivals.contenders


def test_nominal_flops_are_those_that_torch_counts_in_another_library():
    from torch.utils.flop_counter import FlopCounterMode

    case = case_of()
    twin = twins.twin_of(twins.timm_vit, model_of(case), case.model, case.task, steps.batch_of(case.task)[0])
    for module in twin.module.modules():
        module.fused_attn = False  # torch's counter does not know the CPU's
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin.module(twin.pixels)
    assert counter.get_total_flops() == case.task.batch * nominal_flops(case.model, case.task)
    assert forward_flops(case.model, case.task.modality, 7) <= nominal_flops(case.model, case.task)


COSTS = [("ViT-B", 35.1, 197), ("ViViT-B", 903, 3137), ("ViT-S", 9.2, 197), ("AST-B", 261, 1213), ("ViT-L", 123, 197), ("ViT-Ti", 2.5, 197)]


@pytest.mark.parametrize(("name", "gflops", "tokens"), COSTS)
def test_models_on_a_gpu_have_the_cost_that_their_names_stand_for(name, gflops, tokens):
    rivals = next(rivals for rivals in bench_step.ON_A_GPU if rivals.title.startswith(name))
    case = rivals.case()
    assert case.task.modality.num_tokens == tokens
    assert nominal_flops(case.model, case.task) / 1e9 == pytest.approx(gflops, rel=0.02)
    assert set(rivals.contenders) <= bench_step.ways_of(case, None).keys()


def test_nine_tasks_fill_one_model():
    tasks = bench_step.nine_tasks()
    assert len(tasks) == 9
    assert {task.micro_batches for task in tasks.values()} == {1}
    assert all(task.batch % 2 == 0 for task in tasks.values())
    assert len({rivals.title for rivals in bench_step.ON_A_GPU}) == len(bench_step.ON_A_GPU)
