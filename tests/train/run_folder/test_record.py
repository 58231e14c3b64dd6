import json
import os
import platform
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from tiny_runs import change

from polyvit_fast.config import Modality, Model, Optim, Source, StepPlan, Task, Train
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.train.run_folder import record
from polyvit_fast.train.run_folder.record import describe_run, differences, from_json, load_run, resume_differences, to_json


@dataclass(frozen=True, kw_only=True)
class Noise:
    strength: float = 0.5
    colour: Literal["white", "pink"] = "white"


@dataclass(frozen=True, kw_only=True)
class Patch(Modality):
    name: ClassVar[str] = "patch"
    size: int = 16
    mean: tuple[float, ...] = (0.5, 0.25)
    noises: tuple[Noise, ...] = ()
    mask: float | None = None

    @property
    def grid(self):
        return (1, self.size, self.size, 3)

    @property
    def tubelet(self):
        return (1, 8, 8)

    @property
    def normalisation(self):
        return self.mean, self.mean

    @property
    def eval_views(self):
        return 1

    def decoder(self, *, batch, train, num_threads):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    folder: Path = Path("train")
    limit: int | None = None

    def samples(self, task):
        return []


@dataclass(frozen=True, kw_only=True)
class Other(Files):
    pass


def reversed_order(config: Train) -> StepPlan:
    return [(name,) for name in reversed(config.tasks)]


def task(**changes) -> Task:
    return Task(**({"modality": Patch(), "train": Files(), "val": Files(), "num_classes": 3, "steps": 5} | changes))


def config(**changes) -> Train:
    return change(Train(tasks={"still": task(), "motion": task(batch=32)}, model=Model(dim=64, num_heads=2)), **changes)


def stored(train: Train) -> dict:
    """As it comes back from a file."""
    return json.loads(json.dumps(to_json(train), allow_nan=False))


def stored_by_0_5(train: Train) -> dict:
    """As version 0.5 stored it: without groups."""
    values = stored(train)
    for group in ("data", "compute", "log", "distributed"):
        values |= values.pop(group)
    return values | {"type": "Train"}


RICH = {
    "optim": Optim(name="adamw", lr=3e-4, betas=(0.8, 0.95)),
    "seed": 7,
    "precision": "bf16",
    "residual": "bf16",
    "tasks": {
        "still": task(modality=Patch(mean=(0.1, 0.2, 0.3), noises=(Noise(colour="pink"), Noise(strength=1.0)), mask=0.25)),
        "motion": task(train=Files(folder=Path("a/b"), limit=9), multi_label=True, loss="sigmoid"),
    },
}


def test_values_come_back_onto_the_experiments_record():
    changed = config(**RICH)
    default = config(**RICH | {"optim": Optim(), "seed": 0, "model": Model(), "device": "cuda"})
    assert from_json(default, stored(changed)) == changed
    # Kinds come from the default alone: floats stay floats, tuples tuples, paths paths.
    plain = config(tasks={"still": task(modality=Patch(noises=(Noise(),))), "motion": task(train=Files(folder=Path("x")))})
    again = from_json(plain, stored(changed))
    assert again == changed
    assert hash(again.tasks["still"].modality) == hash(changed.tasks["still"].modality)
    assert to_json(again) == to_json(changed)


def test_the_form_is_plain_and_names_types():
    values = stored(config(**RICH))
    assert values == to_json(config(**RICH))
    assert values["type"] == "Train"
    assert list(values["tasks"]) == ["still", "motion"]
    assert values["tasks"]["still"]["modality"]["noises"][0] == {"type": "Noise", "strength": 0.5, "colour": "pink"}
    assert values["tasks"]["motion"]["train"] == {"type": "Files", "folder": "a/b", "limit": 9}
    assert values["optim"]["betas"] == [0.8, 0.95]


def test_numbers_keep_the_kind_of_the_field():
    values = stored(config())
    values["optim"]["lr"] = 2
    values["tasks"]["still"]["modality"]["noises"] = [to_json(config(**RICH))["tasks"]["still"]["modality"]["noises"][0]]
    default = config(tasks={"still": task(modality=Patch(noises=(Noise(strength=1),))), "motion": task()})  # an int where a float may be
    again = from_json(default, values)
    assert (again.optim.lr, type(again.optim.lr)) == (2.0, float)
    assert again.tasks["still"].modality == Patch(noises=(Noise(strength=0.5, colour="pink"),))


def test_a_function_is_stored_by_name_and_taken_from_the_experiment():
    own = config(schedule=reversed_order)
    assert to_json(own)["schedule"] == f"{__name__}:reversed_order"
    assert from_json(own, stored(own)).schedule is reversed_order
    assert from_json(own, stored(config(schedule="uniform"))).schedule == "uniform"
    moved = stored(own) | {"schedule": "polyvit_experiment_mine:reversed_order"}  # the same file, loaded from another place
    assert from_json(own, moved).schedule is reversed_order
    for default in (own, config()):
        with pytest.raises(ValueError, match=r"schedule: the run used the function mine:lost; the experiment has .* here"):
            from_json(default, stored(own) | {"schedule": "mine:lost"})


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("sed", 3, "sed: the stored configuration has it, the experiment does not"),
        ("optim.momentums", 3, "optim.momentums: the stored configuration has it"),
        ("tasks.sound", {}, "tasks.sound: the stored configuration has it"),
        ("tasks.motion.modality.type", "Video", "tasks.motion.modality: the experiment has a Patch here, the stored configuration 'Video'"),
        ("tasks.motion", 3, "tasks.motion = 3: the experiment has a Task here"),
        ("tasks.motion.batch", "many", "tasks.motion.batch = 'many' does not fit"),
        ("tasks.motion.batch", 2.5, "tasks.motion.batch = 2.5 does not fit"),
        ("tasks.motion.batch", None, "tasks.motion.batch = None does not fit"),
        ("tasks.motion.batch", True, "tasks.motion.batch = True does not fit"),
        ("tasks.motion.batch", -1, "tasks.motion: batch = -1 must be at least 1"),
        ("optim.name", "lion", "optim.name = 'lion' does not fit"),
        ("optim.betas", [0.9], "optim.betas = [0.9] does not fit"),
        ("optim.betas", 0.9, "optim.betas = 0.9 does not fit"),
        ("resume", 1, "resume = 1 does not fit"),
        ("tasks.still.modality.mask", {"type": "Mask"}, "tasks.still.modality.mask = {'type': 'Mask'} does not fit"),
        ("tasks.still.train.folder", 3, "tasks.still.train.folder = 3 does not fit"),
    ],
)
def test_what_does_not_fit_is_named(where, value, told):
    values = stored(config())
    *parents, name = where.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared
        from_json(config(), values)
    assert told in str(caught.value)


def test_a_missing_field_is_named():
    values = stored(config())
    del values["tasks"]["motion"]["modality"]["size"]
    with pytest.raises(ValueError, match=r"tasks\.motion\.modality\.size: the experiment has it, the stored configuration does not"):
        from_json(config(), values)
    with pytest.raises(ValueError, match="the configuration: the experiment has a Train here, the stored configuration None"):
        from_json(config(), {})


@dataclass(frozen=True, kw_only=True)
class Odd(Files):
    thing: object = None


@dataclass(frozen=True, kw_only=True)
class Typed(Files):
    type: str = ""


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (Odd(thing=float("inf")), "tasks.still.train.thing = inf has no JSON form; use a finite number or None"),
        (Odd(thing=[1, {2}]), "tasks.still.train.thing.1 = {2} has no JSON form"),
        (Odd(thing=np.zeros(1)), "tasks.still.train.thing = array([0.]) has no JSON form"),
        (Typed(), "tasks.still.train.type: a record may not have a field named type"),
    ],
)
def test_what_json_cannot_hold_is_named(source, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        to_json(config(tasks={"still": task(train=source)}))
    assert told in str(caught.value)


def test_differences_name_dotted_fields_and_both_values():
    old = config()
    still, motion = old.tasks["still"], old.tasks["motion"]
    changed_still = replace(still, modality=Patch(mean=(0.5,)), train=Other())
    new = replace(old, seed=3, tasks={"still": changed_still, "motion": replace(motion, batch=64)}, schedule=reversed_order)
    assert differences(stored(old), to_json(new)) == [
        "tasks.still.modality.mean: [0.5, 0.25] -> [0.5]",
        "tasks.still.train: Files -> Other",
        "tasks.motion.batch: 32 -> 64",
        f'schedule: "weighted" -> "{__name__}:reversed_order"',
        "seed: 0 -> 3",
    ]
    assert differences(stored(old), to_json(old)) == []


def test_differences_see_added_and_removed_fields_and_the_order_of_tasks():
    old = config()
    renamed = config(tasks={"still": task(), "sound": task(batch=32)})
    assert differences(to_json(old), to_json(renamed)) == ["tasks.motion: Task -> absent", "tasks.sound: absent -> Task"]
    swapped = config(tasks=dict(reversed(old.tasks.items())))
    assert differences(to_json(old), to_json(swapped)) == ["tasks: order still, motion -> motion, still"]
    values = to_json(old)
    assert differences(values, dict(reversed(values.items()))) == []
    assert differences({"a": 1, "b": True}, {"a": 1.0, "b": 1}) == ["b: true -> 1"]
    assert differences({"a": "absent"}, {}) == ['a: "absent" -> absent']


def test_a_resumed_run_may_differ_only_where_no_number_depends_on_it():
    old = config()
    free = {"out": "elsewhere", "log_every_steps": 1, "eval_every_steps": 9, "save_every_steps": 3, "keep": 5, "num_threads": 7}
    free |= {"prefetch": 1, "decode_timeout_seconds": 5.0, "max_bad_ratio": 0.5, "nonfinite_patience": 3, "resume": False}
    free["changed_files"] = "allow"
    free |= {"capture": False, "recompute": True, "sharded": True}
    assert set(free) == {name.split(".")[-1] for name in record.MAY_CHANGE}
    assert resume_differences(stored(old), to_json(change(old, **free))) == []
    old = replace(old, precision="bf16")
    for bound in ({"seed": 1}, {"residual": "bf16"}, {"device": "cuda"}, {"optim": Optim(lr=2.0)}, {"schedule": "uniform"}):
        found = resume_differences(stored(old), to_json(change(old, **bound, **free)))
        assert len(found) == 1, found
        assert next(iter(bound)) in found[0].partition(":")[0]


def test_a_run_of_an_earlier_version_has_the_defaults_of_later_fields():
    values = stored_by_0_5(config())
    del values["residual"], values["attention"]
    assert from_json(change(config(), precision="bf16", residual="bf16"), values) == config()
    assert resume_differences(values, to_json(config())) == []
    now = change(config(), device="cuda", attention="cudnn")
    assert resume_differences(values | {"device": "cuda"}, to_json(now)) == ['compute.attention: "auto" -> "cudnn"']


def test_an_earlier_version_normalised_all_tasks_of_a_modality_by_the_last_one():
    one, other = replace(Patch(), mean=(0.5, 0.25)), replace(Patch(), mean=(0.75, 1.0))
    now = config(tasks={"a": replace(task(), modality=one), "b": replace(task(), modality=other)})
    values = stored_by_0_5(now)
    assert from_json(now, values) == now
    del values["changed_files"]
    assert {name: found.modality for name, found in from_json(now, values).tasks.items()} == {"a": other, "b": other}
    assert resume_differences(values, to_json(now)) == ["tasks.a.modality.mean: [0.75, 1.0] -> [0.5, 0.25]"]


@pytest.mark.parametrize(("optimizer", "spectrogram"), [("sgd", "mbt"), ("adamw", "kaldi")])
def test_later_fields_of_inner_records_say_what_an_earlier_version_did(optimizer, spectrogram):
    audio = Audio(spectrogram=spectrogram)
    now = replace(config(), tasks={"a": replace(task(), modality=audio)}, optim=Optim(name=optimizer))
    values = stored_by_0_5(now)
    for name in ("accumulate", "clip", "absent"):
        del values["optim"][name]
    for name in ("mixup_pairs", "zero_head"):
        del values["tasks"]["a"][name]
    del values["tasks"]["a"]["modality"]["padding"]
    found, differing = from_json(now, values), resume_differences(values, to_json(now))
    if optimizer == "sgd":  # momentum and MBT's spectrogram are as they were
        assert (found, differing) == (now, [])
    else:
        was = replace(now, optim=replace(now.optim, absent="coast"))
        assert found == replace(was, tasks={"a": replace(now.tasks["a"], modality=replace(audio, padding="waveform"))})
        assert sorted(differing) == ['optim.absent: "coast" -> "auto"', 'tasks.a.modality.padding: "waveform" -> "auto"']
    assert not found.optim.rests


def test_a_run_folder_describes_its_run(tmp_path):
    folder = tmp_path / "runs" / "one"
    changed = config(seed=5)
    describe_run(folder, "demo", ["polyvit-fast", "train", "demo", "--out", "my run"], changed)
    describe_run(folder, "demo", ["polyvit-fast", "train", "demo"], changed)
    assert sorted(path.name for path in folder.iterdir()) == ["command.txt", "config.json", "versions.json"]
    run = load_run(folder, {"demo": config()}.__getitem__)
    assert (run.folder, run.experiment, run.config) == (folder, "demo", changed)
    assert run.commands == ["polyvit-fast train demo --out 'my run'", "polyvit-fast train demo"]
    assert run.versions["torch"] == torch.__version__
    assert run.versions["python"] == platform.python_version()
    assert run.versions["numpy"] == np.__version__
    assert run.versions.keys() == {"polyvit_fast", "commit", "python", "torch", "dali", "numpy", "av", "platform"}


def test_a_users_experiment_is_copied_and_used_when_his_own_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine, loaded = Path("mine.py"), []

    def load(name: str) -> Train:
        loaded.append(name)
        return config()

    mine.write_text("seed = 1\n")
    describe_run(Path("run"), "mine.py", ["polyvit-fast"], config(seed=9))
    assert Path("run/experiment.py").read_text() == "seed = 1\n"
    assert load_run(Path("run"), load).config.seed == 9
    mine.write_text("seed = 2\n")
    load_run(Path("run"), load)
    mine.unlink()
    load_run(Path("run"), load)
    assert loaded == ["mine.py", "run/experiment.py", "run/experiment.py"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", None, r"is not a run folder: it has no config\.json"),
        ("config.json", '{"experiment": "demo",\n "config": {', r"config\.json is broken: line 2, column 13: "),
        ("config.json", "[]", r"config\.json is broken: it holds no JSON object"),
        ("config.json", '{"experiment": 3}', r"config\.json does not describe a run: it needs the fields experiment and config"),
        ("config.json", b"\xff\xfe", r"config\.json is broken: it is not text"),
        (
            "config.json",
            '{"experiment": "demo", "config": {"type": "Train"}}',
            r"does not fit its experiment demo: tasks: the experiment has it",
        ),
        ("versions.json", None, r"is not a whole run folder: versions\.json is missing"),
    ],
)
def test_a_folder_that_is_no_run_is_told(tmp_path, name, content, told):
    describe_run(tmp_path, "demo", ["x"], config())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=told):
        load_run(tmp_path, lambda name: config())


def test_an_unwritable_run_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the run folder .*file/run cannot be written: Not a directory; choose another with --out"):
        describe_run(tmp_path / "file" / "run", "demo", ["x"], config())


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    describe_run(tmp_path, "demo", ["x"], config())
    before = (tmp_path / "config.json").read_text()

    def refuse(old, new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match="No space left on device"):
        describe_run(tmp_path, "demo", ["x"], config(seed=1))
    assert (tmp_path / "config.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["command.txt", "config.json", "versions.json"]


def test_the_commit_is_that_of_our_own_checkout_only(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert record._commit(tmp_path) == commit
    git("tag", "v1")
    (tmp_path / "file").write_text("2")
    assert record._commit(tmp_path) == f"{commit}-dirty"
    installed = tmp_path / "site-packages"
    installed.mkdir()
    assert record._commit(installed) is None
    (installed / ".git").write_text("gitdir: /nowhere")
    assert record._commit(installed) is None
