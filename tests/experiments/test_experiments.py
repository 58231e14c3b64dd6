"""Every experiment of the package trains, and those of the paper have its settings."""

import importlib
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from long_forms import mark_long

from polyvit_fast import experiments
from polyvit_fast.config import MODELS, Model, Train
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.model.cost import num_parameters
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.loop import train
from polyvit_fast.train.output.cost_report import estimate_cost, write_notes
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.schedule import LearningRates, count_steps, make_step_plan

TINY = Model(dim=48, depth=1, num_heads=4, mlp_dim=96)
SINGLE = {"vit_b16_imagenet": "imagenet", "vivit_b16_kinetics400": "kinetics400", "ast_b16_audioset": "audioset"}
RECIPE = {  # arXiv 2111.12993's released settings: classes, batch, U_j, lr_scale, loss, mixup, drop path
    "imagenet": (1000, 512, 20_000, 0.03, "sigmoid", 0.0, 0.0),
    "cifar100": (100, 512, 10_000, 0.03, "sigmoid", 0.0, 0.0),
    "cifar10": (10, 512, 10_000, 0.03, "sigmoid", 0.0, 0.0),
    "pets": (37, 512, 500, 0.03, "sigmoid", 0.0, 0.0),
    "resisc45": (45, 512, 2_500, 0.1, "sigmoid", 0.0, 0.0),
    "kinetics400": (400, 64, 100_680, 0.1, "softmax", 0.0, 0.0),
    "moments": (339, 64, 123_640, 0.25, "softmax", 0.0, 0.0),
    "audioset": (527, 64, 15_900, 0.5, "sigmoid", 0.3, 0.3),
    "vggsound": (309, 64, 134_700, 0.5, "softmax", 0.3, 0.3),
}


def shrunk(config: Train, folder) -> Train:
    """One step of each task on made-up samples with a tiny model; everything else is the experiment's own."""
    tasks = {
        name: replace(
            task,
            train=Synthetic(num_samples=4),
            val=Synthetic(num_samples=2, seed=1),
            steps=1,
            batch=2,
            micro_batches=min(2, task.micro_batches),
        )
        for name, task in config.tasks.items()
    }
    adaptors = min(1, config.model.num_adaptor_layers)
    optim = replace(config.optim, warmup_steps=0)  # in which these few steps would end
    return replace(config, tasks=tasks, model=replace(TINY, num_adaptor_layers=adaptors), optim=optim, device="cpu", out=str(folder))


@pytest.mark.parametrize("name", mark_long(experiments.names(), ["demo", "smoke", "polyvit_b16"]))  # which has the tasks of the others
def test_every_experiment_trains_and_evaluates(name, tmp_path):
    config = shrunk(experiments.load(name), tmp_path)
    outcome = train(config, name, ["test"])
    assert outcome.step == len(make_step_plan(config))
    for task, row in outcome.metrics.items():
        assert row["num_examples"] == 2
        assert 0 <= row[config.tasks[task].metric] <= 1
        assert math.isfinite(row["loss"])
    before, after = PolyViT.from_config(config).state_dict(), checkpoint.find_newest(tmp_path).load_tensors("model")
    assert {task for task in config.tasks if not torch.equal(before[f"heads.{task}.weight"], after[f"heads.{task}.weight"])} == set(
        config.tasks
    )


@pytest.mark.parametrize("name", experiments.names())
def test_docstrings_state_command_cost_and_result(name):
    text = importlib.import_module(f"polyvit_fast.experiments.{name}").__doc__
    assert f"Command: polyvit-fast train {name}" in text
    assert "\nCost" in text
    assert "\nResult" in text


def test_a_run_is_planned_without_a_decoder():
    # polyvit_b16 holds the tasks of all experiments of the paper.
    code = (
        "import sys; sys.modules |= {'nvidia': None, 'av': None}; from polyvit_fast import cli; sys.exit(cli.run(['plan', 'polyvit_b16']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def on_meta(model, config):
    with torch.device("meta"):
        return num_parameters(PolyViT.from_config(replace(config, model=model)))


@pytest.mark.parametrize(
    ("size", "num_adaptor_layers", "count"), [("B", 0, 92_683_471), ("B", 6, 177_737_935), ("L", 0, 312_480_463), ("L", 12, 614_789_839)]
)
def test_parameters_of_polyvit(size, num_adaptor_layers, count):
    assert on_meta(replace(MODELS[size], num_adaptor_layers=num_adaptor_layers), experiments.load("polyvit_b16")) == count


def test_polyvit_has_the_released_settings():
    config = experiments.load("polyvit_b16")
    found = {
        name: (task.num_classes, task.batch, task.steps, task.lr_scale, task.loss, task.mixup, task.drop_path_rate)
        for name, task in config.tasks.items()
    }
    assert found == RECIPE
    assert config.model == MODELS["B"]
    assert {name: modality.num_tokens for name, modality in config.modalities.items()} == {"image": 577, "video": 1569, "audio": 401}
    assert {name for name, task in config.tasks.items() if task.metric == "mAP"} == {"audioset"}
    assert {name for name, task in config.tasks.items() if task.zero_head} == {"kinetics400", "moments", "audioset", "vggsound"}
    assert (config.optim.name, config.optim.momentum, config.optim.clip_norm, config.optim.weight_decay) == ("sgd", 0.9, 1.0, 0.0)


def test_polyvit_s_schedule():
    config = experiments.load("polyvit_b16")
    plan = make_step_plan(config)
    rates = LearningRates(config, plan)
    assert len(rates) == len(plan) == 417_920
    assert count_steps(plan) == {name: recipe[2] for name, recipe in RECIPE.items()}
    top = dict.fromkeys(RECIPE, 0.0)
    for step in range(47_330, 47_330 + 20_000):
        [name] = plan[step]
        top[name] = max(top[name], rates[step])
    # The rates are highest where the warm-up ends; the rarest task, pets, has its first step after that at most 1 % further on.
    assert top == pytest.approx({name: recipe[3] for name, recipe in RECIPE.items()}, rel=0.01)
    assert rates[47_330 // 2] == pytest.approx(RECIPE[plan[47_330 // 2][0]][3] / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "count", "warmup_steps"),
    [("vit_b16_imagenet", 86_859_496, 500), ("vivit_b16_kinetics400", 88_929_424, 8_390), ("ast_b16_audioset", 86_360_591, 795)],
)
def test_single_task_baselines_are_polyvit_s_tasks_alone(name, count, warmup_steps):
    # 86,859,496 is also timm's vit_base_patch16_384; the others are sums over the layers of the paper's model.
    config, polyvit = experiments.load(name), experiments.load("polyvit_b16")
    assert config.tasks == {SINGLE[name]: polyvit.tasks[SINGLE[name]]}
    assert on_meta(config.model, config) == count
    assert config.optim == replace(polyvit.optim, warmup_steps=warmup_steps)
    assert config.out == f"runs/{name}"


@pytest.mark.parametrize("name", ["polyvit_b16", *SINGLE])
def test_costs_in_the_docstring_are_those_of_the_plan(name):
    text = importlib.import_module(f"polyvit_fast.experiments.{name}").__doc__
    report = estimate_cost(experiments.load(name))
    assert f"{report.num_parameters:,} parameters" in text
    assert f"{report.num_steps:,} steps" in text
    assert f"{report.training_flops / 1e18:.3g} EFLOP" in text
    assert max(report.peak_bytes(row) for row in report.tasks) <= 0.8 * 24 * 2**30
    # Nobody has the files here: every task says so.
    assert sum("No samples of" in note for note in write_notes(report)) == len(report.tasks)


def test_the_command_that_makes_an_experiments_files_is_in_its_docstring():
    assert experiments.find_maker("schedules") == "python -m polyvit_fast.experiments.schedules_data"
    assert not experiments.find_maker("demo")
    assert not experiments.find_maker("vit_b16_imagenet")
