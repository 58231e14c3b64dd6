import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest

from polyvit_fast import data
from polyvit_fast.config import ComputeOptions, DataOptions, Modality, Model, Optim, Source, StepPlan, Task, Train
from polyvit_fast.train.run_folder.config_json import differences, from_json, to_json


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
    return Train(**({"tasks": {"still": task(), "motion": task(batch=32)}, "model": Model(dim=64, num_heads=2)} | changes))


def stored(train: Train) -> dict:
    """As it comes back from a file."""
    return json.loads(json.dumps(to_json(train), allow_nan=False))


RICH = {
    "optim": Optim(name="adamw", lr=3e-4, betas=(0.8, 0.95)),
    "seed": 7,
    "precision": "bf16",
    "compute": ComputeOptions(residual="bf16", recompute=True),
    "tasks": {
        "still": task(modality=Patch(mean=(0.1, 0.2, 0.3), noises=(Noise(colour="pink"), Noise(strength=1.0)), mask=0.25)),
        "motion": task(train=Files(folder=Path("a/b"), limit=9), multi_label=True, loss="sigmoid"),
    },
}


def test_stored_values_replace_those_of_the_experiment():
    changed = config(**RICH)
    default = config(**RICH | {"optim": Optim(), "seed": 0, "model": Model(), "device": "cuda"})
    assert from_json(default, stored(changed)) == changed
    # Types come from the default alone: floats stay floats, tuples tuples, paths paths.
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
    assert values["tasks"]["still"]["modality"]["noises"][0] == {"type": f"{__name__}:Noise", "strength": 0.5, "colour": "pink"}
    assert values["tasks"]["motion"]["train"] == {"type": f"{__name__}:Files", "folder": "a/b", "limit": 9}
    assert values["optim"]["betas"] == [0.8, 0.95]


def test_numbers_keep_the_type_of_the_field():
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
    moved = stored(own) | {"schedule": "polyvit_experiment_mine:reversed_order"}  # the same file, loaded from another path
    assert from_json(own, moved).schedule is reversed_order
    for default in (own, config()):
        with pytest.raises(ValueError, match=r"schedule: the run used the function mine:lost; the experiment has .* here"):
            from_json(default, stored(own) | {"schedule": "mine:lost"})


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("sed", 3, "sed: the stored configuration has it, the experiment does not"),
        ("optim.momentums", 3, "optim.momentums: the stored configuration has it"),
        ("tasks.sound", {}, "tasks.sound: the stored configuration has it"),
        ("tasks.motion.modality.type", "Video", "tasks.motion.modality: the experiment has a Patch here, the stored configuration 'Video'"),
        ("tasks.motion", 3, "tasks.motion = 3: the experiment has a Task here"),
        ("tasks.motion.batch", "many", 'tasks.motion.batch = "many" is text, and must be a whole number'),
        ("tasks.motion.batch", 2.5, "tasks.motion.batch = 2.5 must be a whole number"),
        ("tasks.motion.batch", None, "tasks.motion.batch = None must be a whole number"),
        ("tasks.motion.batch", True, "tasks.motion.batch = True must be a whole number"),
        ("tasks.motion.batch", -1, "tasks.motion: batch = -1 must be at least 1"),
        ("optim.name", "lion", 'optim.name = "lion" must be "sgd" or "adamw"'),
        ("optim.betas", [0.9], "optim.betas = (0.9,) must be a tuple of 2 numbers, and not 1"),
        ("optim.betas", 0.9, "optim.betas = 0.9 must be a tuple of 2 numbers"),
        ("resume", 1, "resume = 1 must be True or False: write True"),
        ("tasks.still.modality.mask", {"type": "Mask"}, "tasks.still.modality.mask = {'type': 'Mask'} does not fit"),
        ("tasks.still.train.folder", 3, "tasks.still.train.folder = 3 must be a path"),
    ],
)
def test_what_does_not_fit_is_named(where, value, message):
    values = stored(config())
    *parents, name = where.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared
        from_json(config(), values)
    assert message in str(caught.value)


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
    ("source", "message"),
    [
        (Odd(thing=float("inf")), "tasks.still.train.thing = inf has no JSON form; use a finite number or None"),
        (Odd(thing=[1, {2}]), "tasks.still.train.thing.1 = {2} has no JSON form"),
        (Odd(thing=np.zeros(1)), "tasks.still.train.thing = array([0.]) has no JSON form"),
        (Typed(), "tasks.still.train.type: a dataclass in a configuration may not have a field named type"),
    ],
)
def test_what_json_cannot_hold_is_named(source, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        to_json(config(tasks={"still": task(train=source)}))
    assert message in str(caught.value)


def test_differences_name_dotted_fields_and_both_values():
    old = config()
    still, motion = old.tasks["still"], old.tasks["motion"]
    changed_still = replace(still, modality=Patch(mean=(0.5,)), train=Other())
    new = replace(old, seed=3, tasks={"still": changed_still, "motion": replace(motion, batch=64)}, schedule=reversed_order)
    assert differences(stored(old), to_json(new)) == [
        "tasks.still.modality.mean: [0.5, 0.25] -> [0.5]",
        f"tasks.still.train: {__name__}:Files -> {__name__}:Other",
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


def test_a_class_of_a_users_own_is_known_by_its_name_wherever_its_module_lies():
    now = config()
    moved = json.loads(json.dumps(stored(now)).replace(f"{__name__}:", "polyvit_experiment_mine:"))
    of_0_7 = json.loads(json.dumps(stored(now)).replace(f"{__name__}:", ""))  # which stored no modules
    for values in (moved, of_0_7):
        assert values != stored(now)
        assert differences(values, to_json(now)) == []
        assert from_json(now, values) == now


def test_a_class_of_the_package_is_not_one_of_the_same_name():
    @dataclass(frozen=True, kw_only=True)
    class Synthetic(Files):
        num_samples: int = 1000
        seed: int = 0

    mine, theirs = config(tasks={"still": task(train=Synthetic())}), config(tasks={"still": task(train=data.Synthetic())})
    assert differences(to_json(mine), to_json(theirs)) == [f"tasks.still.train: {__name__}:Synthetic -> Synthetic"]
    with pytest.raises(
        ValueError, match=r"tasks\.still\.train: the experiment has a Synthetic here, the stored configuration '.*:Synthetic'"
    ):
        from_json(theirs, stored(mine))


def test_differences_leave_out_the_fields_to_ignore():
    old, new = config(), config(seed=3, model=Model(dim=32, num_heads=2), data=DataOptions(num_threads=5))
    assert differences(to_json(old), to_json(new), ignore={"seed", "data"}) == ["model.dim: 64 -> 32"]
