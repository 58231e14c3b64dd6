import json
from dataclasses import dataclass, replace

import pytest
from tiny_runs import Tile, change, tile_task, tiny_config

from polyvit_fast import experiments
from polyvit_fast.config import Source, Train
from polyvit_fast.data import Folder, Image, Manifest, Shards, Synthetic
from polyvit_fast.train.run_folder.config_json import to_json
from polyvit_fast.train.run_folder.rebuild import RECORDS, OwnClassError, rebuild


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
        ({"modality": Tile()}, r"tasks\.a\.modality: Tile is no class of polyvit_fast"),
        ({"modality": Image(), "val": Mine()}, r"tasks\.a\.val: Mine is no class of polyvit_fast"),
    ],
)
def test_what_is_a_users_own_is_named(changes, message):
    smoke = replace(experiments.load("smoke"), tasks={"a": tile_task(**changes)})
    with pytest.raises(OwnClassError, match=message):
        rebuild(stored(smoke))


def test_a_users_own_sources_and_schedule_are_left_out_where_nothing_is_read_or_trained():
    own = {"train": Mine(), "test": Mine(num_samples=3), "val": Synthetic(num_samples=7)}
    config = replace(experiments.load("smoke"), tasks={"a": tile_task(modality=Image(), **own)}, schedule=my_schedule)
    with pytest.raises(OwnClassError, match=r"tasks\.a\.train: Mine is no class"):
        rebuild(stored(config))
    found = rebuild(stored(config), with_sources=False)
    task = found.tasks["a"]
    assert (task.modality, task.val, found.model) == (Image(), Synthetic(num_samples=7), config.model)
    assert found.schedule == f"{__name__}:my_schedule"
    for source in (task.train, task.test):
        with pytest.raises(ValueError, match=r"listed by the class .*:Mine, which only the run's experiment has"):
            source.samples(task)


def test_a_class_that_is_called_like_one_of_the_package_is_a_users_where_that_is_known():
    values = stored(experiments.load("smoke"))
    with pytest.raises(OwnClassError, match=r"tasks\.clips\.modality: Video is no class of polyvit_fast"):
        rebuild(values, own={"Video"})


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
