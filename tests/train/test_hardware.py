import os
from dataclasses import replace

import pytest
import torch
from tiny_runs import change, tiny_config

from polyvit_fast.train.distributed.process_group import World
from polyvit_fast.train.hardware import Gpus, choose_hardware, count_compute_threads, find_gpus
from polyvit_fast.train.loop import train

NONE, OLD, NEW = Gpus(), Gpus("NVIDIA V100", False, ""), Gpus("NVIDIA H100", True, "")
AUTO = change(tiny_config(), device="auto", precision="auto")


@pytest.mark.parametrize(
    ("gpus", "device", "precision", "expected"),
    [
        (NONE, "auto", "auto", ("cpu", "fp32")),
        (OLD, "auto", "auto", ("cuda", "fp32")),
        (NEW, "auto", "auto", ("cuda", "bf16")),
        (NEW, "cpu", "auto", ("cpu", "fp32")),
        (NEW, "auto", "fp32", ("cuda", "fp32")),
        (NONE, "auto", "bf16", ("cpu", "bf16")),
        (NONE, "cuda", "auto", ("cuda", "bf16")),  # for plan
        (OLD, "cuda", "auto", ("cuda", "fp32")),
        (NEW, "cpu", "bf16", ("cpu", "bf16")),
    ],
)
def test_auto_is_what_there_is(gpus, device, precision, expected):
    chosen = choose_hardware(change(AUTO, device=device, precision=precision), gpus).config
    assert (chosen.device, chosen.precision) == expected
    assert chosen == change(AUTO, device=expected[0], precision=expected[1])
    assert choose_hardware(chosen, NONE).config == chosen


def test_what_only_a_gpu_has_is_refused_once_the_device_is_known():
    for values in ({"decoding": "gpu"}, {"attention": "cudnn"}):
        config = change(AUTO, **values)
        assert choose_hardware(config, NEW).config.device == "cuda"
        with pytest.raises(ValueError, match="needs --device cuda; leave it auto"):
            choose_hardware(config, NONE)
    with pytest.raises(ValueError, match="--residual bf16 needs --precision bf16"):
        choose_hardware(change(AUTO, residual="bf16"), NONE)
    assert choose_hardware(change(AUTO, residual="bf16"), NEW).config.keeps_rounded


def test_what_was_chosen_is_described_with_its_reason():
    alone, of_eight = World(), World(local_size=8)
    chosen = choose_hardware(AUTO, NEW)
    assert chosen.describe() == "device cuda (NVIDIA H100, auto), precision bf16 (auto)"
    assert choose_hardware(AUTO, NONE).describe() == "device cpu (auto: PyTorch finds no NVIDIA GPU here), precision fp32 (auto)"
    cores = len(os.sched_getaffinity(0))
    assert chosen.describe_all(of_eight).endswith("1 decoding thread for each task (auto), 1 compute thread (auto)") or cores > 15
    set_by_hand = change(AUTO, device="cpu", precision="fp32", num_threads=3, compute_threads=2)
    text = "device cpu, precision fp32, 3 decoding threads for each task, 2 compute threads"
    assert choose_hardware(set_by_hand, NEW).describe_all(alone) == text


def test_each_process_computes_on_its_part_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert count_compute_threads(AUTO) == max(1, cores - 1)
    assert count_compute_threads(AUTO, World(local_size=cores)) == 1
    assert count_compute_threads(change(AUTO, compute_threads=5), World(local_size=cores)) == 5


@pytest.fixture
def began(tmp_path):
    """A run that began on the CPU with all left to the machine."""
    config = change(AUTO, out=str(tmp_path / "run"), save_every_steps=10, **({"device": "cpu"} if find_gpus().name else {}))
    train(config, "tiny", [])
    return change(config, device="auto")


def test_a_run_stays_where_it_began(began):
    """The same command goes on, also where a GPU has come, and it stores and logs what was chosen."""
    chosen = choose_hardware(began, NEW, resumes=True)
    assert (chosen.config.device, chosen.config.precision) == ("cpu", "fp32")
    assert chosen.describe() == "device cpu (as this run began), precision fp32 (as this run began)"
    assert choose_hardware(began, NEW).config.device == "cuda"
    assert choose_hardware(change(began, device="cuda"), NEW, resumes=True).config.precision == "bf16"
    log = (began.folder / "log.txt").read_text().splitlines()
    assert any("device cpu" in line and "precision fp32 (auto)" in line for line in log[:4])
    assert '"device": "cpu"' in (began.folder / "config.json").read_text()
    train(began, "tiny", [])
    assert "resumed from step 20 of 20" in (began.folder / "log.txt").read_text()


def test_a_run_of_a_gpu_is_refused_where_there_is_none(began):
    for file in (began.folder / "checkpoints").glob("step_*/config.json"):
        file.write_text(
            file.read_text().replace('"device": "cpu"', '"device": "cuda"').replace('"precision": "fp32"', '"precision": "bf16"')
        )
    with pytest.raises(ValueError, match=r"holds a run on a GPU \(device = cuda, precision = bf16\), but PyTorch finds no NVIDIA GPU here"):
        choose_hardware(began, NONE, resumes=True)
    chosen = choose_hardware(began, NEW, resumes=True).config
    assert (chosen.device, chosen.precision) == ("cuda", "bf16")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"device": "tpu", "precision": "fp32"}'])
def test_a_broken_checkpoint_says_nothing(began, text):
    for file in (began.folder / "checkpoints").glob("step_*/config.json"):
        file.write_text(text)
    assert not choose_hardware(began, NONE, resumes=True).resumes
    assert not choose_hardware(replace(began, out=""), NONE, resumes=True).resumes


def test_this_machine():
    found = find_gpus()
    assert bool(found.name) == (not found.problem)
    if not torch.cuda.is_available():
        assert found == NONE
