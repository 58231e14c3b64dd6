import json
from dataclasses import dataclass, replace

import pytest
from tiny_runs import change, tile_task, tiny_config

from polyvit_fast import experiments
from polyvit_fast.config import Source, Train
from polyvit_fast.data import Folder, Image, Manifest, Shards, Synthetic
from polyvit_fast.train.run_folder.config_json import to_json
from polyvit_fast.train.run_folder.rebuild import RECORDS, rebuild


def stored(config: Train) -> dict:
    """As it comes back from a file."""
    return json.loads(json.dumps(to_json(config)))


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_of_the_package_can_be_rebuilt(name):
    config = experiments.load(name)
    again = rebuild(stored(config))
    assert again == config
    assert to_json(again) == to_json(config)
    assert hash(again.model) == hash(config.model)


def test_every_source_can_be_rebuilt():
    sources = [Folder(path="a"), Manifest(path="a.csv", classes="c"), Shards(paths=("a-*.tar", "b.tar")), Synthetic(), None]
    for source in sources:
        task = tile_task(modality=Image(mean=(1.0, 2.0, 3.0)), val=Synthetic(), test=source, train=source or Synthetic())
        config = change(tiny_config(tasks={"a": task}), num_threads=5, schedule="uniform", precision="bf16", residual="bf16")
        assert rebuild(stored(config)) == config


def test_the_records_are_those_that_users_import():
    assert {"Train", "Task", "Image", "Video", "Audio", "Folder", "DataOptions", "Model", "Optim"} <= RECORDS.keys()


@dataclass(frozen=True, kw_only=True)
class Mine(Synthetic):
    """A user's own class."""


def my_schedule(config: Train) -> list[tuple[str, ...]]:
    return [("a",)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"a": tile_task()}}, r"tasks\.a\.modality: Tile is no class of polyvit_fast; give the configuration .* config=config"),
        ({"tasks": {"a": tile_task(modality=Image(), val=Mine())}}, r"tasks\.a\.val: Mine is no class of polyvit_fast"),
        ({"schedule": my_schedule}, r"schedule: [\w.]+:my_schedule is a function of your own; give the configuration"),
    ],
)
def test_what_is_a_users_own_is_named(changes, message):
    smoke = experiments.load("smoke")
    with pytest.raises(ValueError, match=message):
        rebuild(stored(replace(smoke, **changes)))


def test_wrong_values_are_named(unchecked_types):
    values = stored(experiments.load("smoke"))
    assert isinstance(Synthetic(), Source)
    for where, value, message in (
        ("batch", "many", r"tasks\.pictures"),
        ("batch", -1, r"tasks\.pictures: batch = -1 must be at least 1"),
        ("bach", 3, r"tasks\.pictures: .*bach"),
        ("loss", "hinge", r'tasks\.pictures: loss = "hinge" must be "softmax" or "sigmoid"'),
        ("modality", {"type": "Image", "size": "large"}, r"tasks\.pictures"),
        ("modality", 3, r"tasks\.pictures"),
    ):
        wrong = json.loads(json.dumps(values))
        wrong["tasks"]["pictures"][where] = value
        with pytest.raises(ValueError, match=message):
            rebuild(wrong)
    with pytest.raises(ValueError, match="the configuration is no Train"):
        rebuild({"type": "Model"})
