import copy
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import pytest
from tiny_runs import Tile, tile_task, tiny_config

import polyvit_fast.probe.probing
import polyvit_fast.train.loop  # noqa: F401
from polyvit_fast.config import ConfigError, Modality, Model, Optim, Record, Source, Task, Train
from polyvit_fast.config.record import check_range, field_types
from polyvit_fast.data import Audio, Folder, Image, Manifest, Shards, Synthetic, Video

if TYPE_CHECKING:
    from nowhere import Nothing

pytestmark = pytest.mark.usefixtures("unchecked_types")


def list_records(base: type) -> Iterator[type]:
    for record in base.__subclasses__():
        yield record
        yield from list_records(record)


OURS = [record for record in list_records(Record) if record.__module__.startswith("polyvit_fast.")]


def test_all_classes_of_a_configuration_are_records():
    names = {record.__name__ for record in OURS}
    assert names >= {"Train", "Task", "Model", "Optim", "DataOptions", "ComputeOptions", "LogOptions", "DistributedOptions"}
    assert names >= {"Preprocessing", "Modality", "Source", "Image", "Video", "Audio", "Folder", "Manifest", "Shards", "Synthetic"}
    assert names >= {"DemoFiles", "_StoredClasses", "TokenGrid", "ThoroughImage"}


@pytest.mark.parametrize("record", OURS, ids=lambda record: record.__name__)
def test_each_field_of_each_record_is_checked(record):
    """None fits no field of ours but those that say so; it is refused whatever `__post_init__` does, and before it."""
    assert is_dataclass(record)
    kinds = field_types(record)
    assert kinds.keys() == {field.name for field in fields(record)}
    for one in fields(record):
        if kinds[one.name] in (object, None) or "None" in str(kinds[one.name]) or "Any" in str(kinds[one.name]):
            continue
        instance = object.__new__(type("Made", (record,), dict.fromkeys(getattr(record, "__abstractmethods__", ()))))
        for other in fields(record):
            default = other.default_factory() if other.default_factory is not MISSING else other.default
            object.__setattr__(instance, other.name, None if other.name == one.name else default)
        with pytest.raises(ConfigError) as caught:
            instance.__post_init__()
        assert " must be " in str(caught.value)
        assert caught.value.field in kinds
        assert str(caught.value).startswith(caught.value.field)


def test_defaults_of_ours_are_of_their_types():
    for record in (Model, Optim, Image, Video, Audio, Synthetic):
        made = record()
        for one in fields(record):
            assert getattr(made, one.name) is one.default


def test_paths_lists_and_whole_numbers_are_welcome():
    assert Folder(path=Path("a/b")) == Folder(path="a/b")
    assert Manifest(path=Path("a.csv"), root=Path("r"), classes=Path("c")) == Manifest(path="a.csv", root="r", classes="c")
    assert Shards(paths=[Path("a.tar"), "b.tar"]) == Shards(paths=("a.tar", "b.tar"))
    assert hash(Shards(paths=["a.tar"])) == hash(Shards(paths=("a.tar",)))
    assert tiny_config(out=Path("runs/x")).out == "runs/x"
    assert tiny_config(init={"trunk": Path("w.safetensors")}).init_parts == {"trunk": "w.safetensors"}
    assert type(Optim(lr=1).lr) is float


def test_replace_is_checked_as_well():
    with pytest.raises(ConfigError, match=r"steps = 3.5 must be a whole number"):
        replace(tile_task(), steps=3.5)
    with pytest.raises(ConfigError, match=r'tasks\["a"\] = Tile\(…\) must be a Task'):
        replace(tiny_config(), tasks={"a": Tile()})


@dataclass(frozen=True, kw_only=True)
class Mine(Source):
    """With a `__post_init__` that calls no other."""

    folder: Path
    limit: int = None  # type: ignore[assignment] # as many write it
    scale: float = 1
    note: "Nothing" = "free"
    kept: list[int] = field(default_factory=list)
    made: ClassVar[list] = []

    def __post_init__(self) -> None:
        assert isinstance(self.folder, Path)
        self.made.append(self.scale)

    def samples(self, task):
        return []


class Plain(Mine):
    """No dataclass of its own, with a constructor of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(folder=f"data/{name}", scale=2)


def test_classes_of_users_are_checked_whatever_they_do():
    mine = Mine(folder="x")
    assert (mine.folder, mine.limit, mine.scale, type(mine.scale), mine.note) == (Path("x"), None, 1.0, float, "free")
    assert Mine.made[-1] == 1.0
    assert Mine(folder="x", note=3).note == 3  # its type cannot be evaluated, so everything fits
    assert Plain("y").folder == Path("data/y")
    for wrong, message in (
        ({"limit": 2.5}, "limit = 2.5 must be"),
        ({"kept": (1,)}, "kept = "),
        ({"folder": 3}, "folder = 3 must be a path"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mine(**{"folder": "x"} | wrong)


def test_types_are_looked_up_where_a_class_was_written():
    module = ModuleType("written_elsewhere")
    sys.modules[module.__name__] = module
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom pathlib import Path as Location\n"
        "from polyvit_fast.config import Optim\n@dataclass(frozen=True, kw_only=True)\nclass Further(Optim):\n    location: Location\n"
    )
    exec(text, vars(module))
    further = module.Further(location="a", lr=1)
    assert (further.location, type(further.lr)) == (Path("a"), float)


def test_records_are_copied_pickled_and_frozen():
    config = tiny_config()
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.seed = 3


@dataclass(frozen=True)
class Numbers:
    one: float = 0.5
    several: tuple[float, ...] = (0.0, 2.0)


@pytest.mark.parametrize(
    ("interval", "name", "message"),
    [
        ("[0, 1]", "one", ""),
        ("[0.5, 1]", "one", ""),
        ("[0, 0.5]", "one", ""),
        ("(0.5, 1]", "one", r"one = 0.5 must be in \(0.5, 1\]"),
        ("[0, 0.5)", "one", r"one = 0.5 must be in \[0, 0.5\)"),
        ("[1, inf)", "one", "one = 0.5 must be at least 1"),
        ("[1000, 2000]", "one", "one = 0.5 must be at least 1,000"),
        ("(0, inf)", "several", r"several\[0\] = 0.0 must be positive"),
        ("[0, 1]", "several", r"several\[1\] = 2.0 must be in \[0, 1\]"),
        ("[-3, 1.5]", "several", r"several\[1\] = 2.0 must be at most 1.5"),
    ],
)
def test_a_number_outside_its_interval_is_named(interval, name, message):
    with pytest.raises(ConfigError, match=f"^{message}$") if message else nullcontext():
        check_range(Numbers(), interval, name)


def test_negative_numbers_are_called_so():
    with pytest.raises(ConfigError, match=r"weight_decay = -1.0 must not be negative"):
        Optim(weight_decay=-1)


def test_a_record_says_what_to_write_instead():
    assert Task.suggest(3) == "write Task(…)"
    assert Model.suggest("Ti") == 'write MODELS["Ti"]'
    assert Model.suggest("XL") == Model.suggest(["Ti"]) == "write Model(…)"
    assert Source.suggest(Path("a/b.TSV")) == 'write Manifest(path="a/b.TSV")'
    assert "Image(), Video() or Audio()" in Modality.suggest("image")


def test_checks_cost_next_to_nothing():
    tasks = {"a": tile_task(modality=Image()), "b": tile_task(modality=Video())}
    Train(tasks=tasks)
    start = time.process_time()
    for _ in range(100):
        Train(tasks=tasks)
    assert time.process_time() - start < 1  # seconds for a hundred; a tenth of that on an idle CPU
