import pytest
from tiny_runs import tile_task, tiny_config

from polyvit_fast.cli.locations import change_locations, split_locations
from polyvit_fast.data.sources.manifest import Folder
from polyvit_fast.data.sources.shards import Shards

CONFIG = tiny_config(
    tasks={"a": tile_task(train=Folder(path="old"), val=Shards(paths=("x.tar",))), "b": tile_task(test=Folder(path="test"))}
)


def test_flags_about_tasks_are_told_from_those_of_the_command():
    flags = ["runs/x", "--tasks", "a", "b", "--tasks.a.val.paths", "y.tar", "z.tar", "--split", "val", "--tasks.a.train.path=new"]
    locations, others = split_locations(flags)
    assert locations == ["--tasks.a.val.paths", "y.tar", "z.tar", "--tasks.a.train.path=new"]
    assert others == ["runs/x", "--tasks", "a", "b", "--split", "val"]


def test_locations_change_and_nothing_else_does():
    flags = ["--tasks.a.val.paths", "y.tar", "z.tar", "--tasks.a.train.path=new", "--tasks.b.test.path", "t"]
    changed = change_locations(CONFIG, flags, "eval x")
    assert changed.tasks["a"].train == Folder(path="new")
    assert changed.tasks["a"].val == Shards(paths=("y.tar", "z.tar"))
    assert changed.tasks["b"].test == Folder(path="t")
    assert (
        change_locations(changed, ["--tasks.a.train.path", "old", "--tasks.a.val.paths", "x.tar", "--tasks.b.test.path", "test"], "x")
        == CONFIG
    )
    assert change_locations(CONFIG, [], "eval x") is CONFIG


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--tasks.a.steps", "3"],
            "--tasks.a.steps cannot be changed: the weights belong to the configuration that the run was trained with",
        ),
        (["--tasks.a.train.path", "x", "--tasks.a.modality.size", "3"], "--tasks.a.modality.size cannot be changed"),
        (["--tasks.c.val.path", "x"], "there is no task c; there are a, b"),
        (["--tasks.a.test.path", "x"], "task a has no test files"),
    ],
)
def test_other_fields_are_refused_with_a_reason(flags, words):
    with pytest.raises(ValueError, match=words):
        change_locations(CONFIG, flags, "eval x")
