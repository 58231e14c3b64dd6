"""Runs of earlier versions are evaluated and resumed; tests/files/stored_configs holds what each version stored for `train smoke`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import change, tile_task, tiny_config

import polyvit_fast
from polyvit_fast import experiments
from polyvit_fast.config import Optim, Train
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.image.modality import Image
from polyvit_fast.train.run_folder import earlier_versions
from polyvit_fast.train.run_folder.config_json import from_json, to_json
from polyvit_fast.train.run_folder.earlier_versions import SCHEMA, LaterVersionError, check_schema, is_older_than_0_5, stamp, upgrade
from polyvit_fast.train.run_folder.record import resume_differences

VERSION = re.escape(polyvit_fast.__version__)
STORED = Path(__file__).parents[2] / "files" / "stored_configs"


def stored_by(version: str) -> dict:
    return json.loads((STORED / f"{version}.json").read_text())["config"]


def load_smoke() -> Train:
    """With what was the default of these fields when they had no auto."""
    return change(experiments.load("smoke"), device="cpu", precision="fp32", num_threads=2)


def without_groups(train: Train) -> dict:
    """As version 0.5 stored it: the fields of today's groups were fields of `Train`."""
    values = to_json(train)
    for group in ("data", "compute", "log", "distributed"):
        values |= values.pop(group)
    del values["early_stop_evaluations"]
    return values | {"type": "Train"}


@pytest.mark.parametrize("version", ["0.3.1", "0.4.1"])
def test_a_run_before_0_5_keeps_what_it_computed(version):
    values, smoke = stored_by(version), load_smoke()
    assert is_older_than_0_5(values)
    sounds = smoke.tasks["sounds"]
    sounds = replace(sounds, modality=replace(sounds.modality, padding="waveform"))
    then = replace(smoke, tasks=smoke.tasks | {"sounds": sounds}, optim=replace(smoke.optim, absent="coast"))
    assert from_json(smoke, upgrade(values)) == then
    assert resume_differences(values, to_json(then)) == []
    differing = ['tasks.sounds.modality.padding: "waveform" -> "auto"', 'optim.absent: "coast" -> "auto"']
    assert resume_differences(values, to_json(smoke)) == differing


@pytest.mark.parametrize("version", ["0.5.0", "0.6.0"])
def test_a_run_from_0_5_on_has_the_same_configuration(version):
    values, smoke = stored_by(version), load_smoke()
    assert not is_older_than_0_5(values)
    assert from_json(smoke, upgrade(values)) == smoke
    assert resume_differences(values, to_json(smoke)) == []


def test_values_of_fields_that_moved_or_were_renamed_are_kept():
    values, smoke = stored_by("0.5.0"), load_smoke()
    values |= {"num_threads": 7, "precision": "bf16", "residual": "bf16", "keep": 9, "sharded": True}
    values["tasks"]["clips"]["modality"] |= {"colour_jitter_chance": 0.25, "grey_chance": 0.5}
    found = from_json(smoke, upgrade(values))
    clips = found.tasks["clips"].modality
    assert (clips.colour_jitter_prob, clips.grey_prob) == (0.25, 0.5)
    tasks = smoke.tasks | {"clips": replace(smoke.tasks["clips"], modality=clips)}
    assert found == change(smoke, tasks=tasks, num_threads=7, precision="bf16", residual="bf16", keep=9, sharded=True)


def test_todays_configurations_stay_as_they_are():
    values = to_json(experiments.load("demo"))
    assert upgrade(values) == values


def test_a_stored_file_says_its_schema_and_its_version():
    values = to_json(experiments.load("demo"))
    assert stamp() == {"schema": SCHEMA, "version": polyvit_fast.__version__}
    assert upgrade({**stamp(), **values}) == values
    check_schema(stamp(), Path("config.json"))
    check_schema({}, Path("config.json"))
    later = {"schema": SCHEMA + 1, "version": "0.99.0"}
    with pytest.raises(
        LaterVersionError, match=rf"^runs/a was written by polyvit-fast 0\.99\.0, whose files this version, {VERSION}, does"
    ):
        check_schema(later, Path("runs/a"))


def test_the_number_decides_where_there_is_one(monkeypatch):
    """A field of a later schema is added to all before it; what tells 0.3 to 0.7 apart is not looked at."""
    monkeypatch.setitem(earlier_versions.ADDED, SCHEMA + 1, {"Optim": {"lookahead": 0}, "Task": {"copies": 1}})
    monkeypatch.setattr(earlier_versions, "SCHEMA", SCHEMA + 1)
    smoke = to_json(experiments.load("smoke"))
    for before in ({**smoke, "schema": SCHEMA}, stored_by("0.6.0"), stored_by("0.3.1")):
        upgraded = upgrade(before)
        assert upgraded["optim"]["lookahead"] == 0
        assert [task["copies"] for task in upgraded["tasks"].values()] == [1, 1, 1]
    kept = {"schema": SCHEMA + 1, "type": "Train", "tasks": {}, "optim": {"type": "Optim", "name": "adamw", "lookahead": 5}}
    assert upgrade(kept) == {name: value for name, value in kept.items() if name != "schema"}  # no groups, no `absent`
    assert upgrade({**kept, "schema": 0})["optim"] == {"absent": "coast", **earlier_versions.ADDED[1]["Optim"], **kept["optim"]}


def test_records_in_a_sequence_are_upgraded_too():
    later = {"random_erasing_prob": 0.0, "random_erasing_area_ratios": [0.02, 0.4], "random_erasing_aspect_ratio": 0.3}
    assert upgrade({"data": {}, "all": [{"type": "Image"}, 3]})["all"] == [{"type": "Image", **later}, 3]


def test_a_field_that_a_version_did_not_know_has_the_default():
    values = without_groups(tiny_config())
    del values["residual"], values["attention"]
    assert from_json(tiny_config(precision="bf16", residual="bf16"), upgrade(values)) == tiny_config()
    assert resume_differences(values, to_json(tiny_config())) == []
    now = tiny_config(device="cuda", attention="cudnn")
    assert resume_differences(values | {"device": "cuda"}, to_json(now)) == ['compute.attention: "auto" -> "cudnn"']


def test_before_0_5_all_tasks_of_a_modality_had_the_normalisation_of_the_last_one():
    one, other = (Image(size=32, mean=(mean, 1.0, 2.0)) for mean in (0.5, 0.75))
    now = tiny_config(tasks={"a": tile_task(modality=one), "b": tile_task(modality=other)})
    values = without_groups(now)
    assert from_json(now, upgrade(values)) == now
    del values["changed_files"]
    assert {name: task.modality for name, task in from_json(now, upgrade(values)).tasks.items()} == {"a": other, "b": other}
    assert resume_differences(values, to_json(now)) == ["tasks.a.modality.mean: [0.75, 1.0, 2.0] -> [0.5, 1.0, 2.0]"]


@pytest.mark.parametrize(("optimizer", "spectrogram"), [("sgd", "mbt"), ("adamw", "kaldi")])
def test_later_fields_say_what_an_earlier_version_did(optimizer, spectrogram):
    audio = Audio(spectrogram=spectrogram)
    now = tiny_config(tasks={"a": tile_task(modality=audio)}, optim=Optim(name=optimizer))
    values = without_groups(now)
    for name in ("accumulate", "clip", "absent"):
        del values["optim"][name]
    for name in ("mixup_pairs", "zero_head"):
        del values["tasks"]["a"][name]
    del values["tasks"]["a"]["modality"]["padding"]
    found, differing = from_json(now, upgrade(values)), resume_differences(values, to_json(now))
    if optimizer == "sgd":  # momentum and MBT's spectrogram have not changed
        assert (found, differing) == (now, [])
    else:
        was = replace(now, optim=replace(now.optim, absent="coast"))
        assert found == replace(was, tasks={"a": replace(now.tasks["a"], modality=replace(audio, padding="waveform"))})
        assert sorted(differing) == ['optim.absent: "coast" -> "auto"', 'tasks.a.modality.padding: "waveform" -> "auto"']
    assert not found.optim.rests


@pytest.mark.parametrize("values", [{}, {"type": "Train"}, {"tasks": 3}, {"type": "Train", "tasks": {"a": 3, "b": {"modality": None}}}])
def test_what_is_no_configuration_is_refused_by_from_json_alone(values):
    with pytest.raises(ValueError, match="the experiment has"):
        from_json(tiny_config(), upgrade(values))


def test_what_0_6_did_not_know_is_off_whatever_the_experiment_says_now():
    values, smoke = stored_by("0.6.0"), load_smoke()
    pictures, optim = smoke.tasks["pictures"], Optim(name="adamw", lr=2e-3, warmup_steps=2, freeze=("blocks.*",), layer_decay=0.7)
    modality = replace(pictures.modality, random_erasing_prob=0.5, random_erasing_area_ratios=(0.1, 0.2), random_erasing_aspect_ratio=0.5)
    own = {"cutmix": 1.0, "loss_weight": 2.0, "lr_schedule": "cosine", "warmup_steps": 3}
    now = change(
        smoke,
        tasks=smoke.tasks | {"pictures": replace(pictures, modality=modality, **own)},
        optim=optim,
        eval_every_steps=5,
        early_stop_evaluations=2,
    )
    assert from_json(now, upgrade(values)) == smoke
    differing = {difference.partition(":")[0] for difference in resume_differences(values, to_json(now))}
    erasing = {f"tasks.pictures.modality.random_erasing_{name}" for name in ("prob", "area_ratios", "aspect_ratio")}
    assert differing == {"optim.freeze", "optim.layer_decay", *erasing, *(f"tasks.pictures.{name}" for name in own)}
    assert from_json(now, to_json(now)) == now
