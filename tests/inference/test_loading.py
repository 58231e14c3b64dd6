import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import polyvit_fast as pf
from polyvit_fast import experiments
from polyvit_fast.config import ComputeOptions, DataOptions
from polyvit_fast.inference import loading
from polyvit_fast.inference.loading import move_to
from polyvit_fast.train.evaluate import find_checkpoint


def test_the_moving_average_is_taken_where_there_is_one(run, model):
    found = find_checkpoint(run.folder, "newest")
    groups = {name: found.load_tensors(name) for name in ("model", "ema")}
    assert any(not torch.equal(groups["model"][name], groups["ema"][name]) for name in groups["ema"])
    for weights, group in (("auto", "ema"), ("ema", "ema"), ("model", "model")):
        loaded = pf.load(run.folder, weights=weights)
        assert loaded.weights == group
        assert all(torch.equal(value, groups[group][name]) for name, value in loaded.model.state_dict().items())
        assert not loaded.model.training


def test_checkpoints_by_name_and_step(run):
    assert [pf.load(run.folder, which).step for which in ("newest", "best", 12, "12")] == [12] * 4
    assert pf.load(str(run.folder)).folder == run.folder
    with pytest.raises(ValueError, match="holds no checkpoint '5'; there are newest, best and the steps 12"):
        pf.load(run.folder, 5)


def test_nothing_that_it_was_trained_on_need_exist(run, tmp_path):
    picture = tmp_path / "picture.jpg"
    shutil.copy(run.files("shapes")[0], picture)
    files = Path(run.config.tasks["shapes"].train.root)
    files.rename(tmp_path / "away")
    try:
        model = pf.load(run.folder)
        assert model.classes["shapes"][:3] == ("circle", "cross", "ring")
        assert len(model.predict(picture, "shapes")) == 1
    finally:
        (tmp_path / "away").rename(files)


def test_the_weights_folder_is_enough(run, tmp_path):
    shutil.copytree(run.folder / "checkpoints", tmp_path / "checkpoints")
    model = pf.load(tmp_path)
    assert model.config == replace(run.config, out=str(run.folder))


def test_another_configuration_in_the_folder_is_logged_and_not_believed(run, tmp_path, monkeypatch):
    shutil.copytree(run.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(path.read_text().replace('"num_heads": 2', '"num_heads": 4'))
    logged = []
    monkeypatch.setattr(loading._logger, "warning", lambda form, text: logged.append(text))
    model = pf.load(tmp_path / "copy")
    assert model.config.model.num_heads == 2
    assert len(logged) == 1
    assert logged[0].endswith("its own is used (its own -> the folder's): model.num_heads: 2 -> 4")


def test_what_is_no_run_is_named(run, tmp_path, unchecked_types):
    with pytest.raises(ValueError, match=r"the run folder .*nothing does not exist"):
        pf.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"step_00000012 is a checkpoint of a run; give its run folder, .*run, and its step 12"):
        pf.load(run.folder / "checkpoints" / "step_00000012")
    for name in ("config.json", "versions.json"):
        shutil.copy(run.folder / name, tmp_path)
    with pytest.raises(ValueError, match="holds no whole checkpoint yet"):
        pf.load(tmp_path)
    with pytest.raises(ValueError, match="weights = 'best' is none of"):
        pf.load(run.folder, weights="best")
    with pytest.raises(ValueError, match="device = 'gpu' is none of 'cpu', 'cuda' and 'auto'"):
        pf.load(run.folder, device="gpu")


def test_a_run_without_an_average_has_none(tmp_path):
    smoke = experiments.load("smoke")
    tasks = {"pictures": replace(smoke.tasks["pictures"], steps=1)}
    pf.train(replace(smoke, tasks=tasks, device="cpu"), out=tmp_path)
    model = pf.load(tmp_path)
    assert model.weights == "model"
    assert model.classes["pictures"] == ("0", "1", "2", "3", "4")  # its samples have no names
    with pytest.raises(ValueError, match="weights = ema: the run kept no moving average"):
        pf.load(tmp_path, weights="ema")


def test_a_run_of_a_gpu_is_moved_to_the_cpu():
    smoke = replace(experiments.load("smoke"), device="cpu", precision="fp32")
    on_gpu = replace(smoke, device="cuda", compute=ComputeOptions(attention="cudnn"), data=DataOptions(decoding="gpu", num_threads=3))
    assert move_to(on_gpu, "cpu") == replace(smoke, data=DataOptions(num_threads=3))
    if not torch.cuda.is_available():
        assert move_to(on_gpu, "auto") == move_to(on_gpu, "cpu")
        with pytest.raises(ValueError, match="PyTorch finds no NVIDIA GPU here"):
            move_to(smoke, "cuda")


def modules_after(code: str) -> set[str]:
    code += "; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_and_its_functions_load_no_decoder():
    assert not {"torch", "numpy", "tyro", "rich"} & modules_after("import polyvit_fast as pf")
    loaded = modules_after("import polyvit_fast as pf; pf.load; pf.train; pf.TrainedModel; pf.fuse")
    assert "polyvit_fast.inference.loading" in loaded
    assert not {"nvidia.dali", "av", "matplotlib", "torchmetrics", "tensorboard", "pyarrow", "triton", "polyvit_fast.cli"} & loaded
