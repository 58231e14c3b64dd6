import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast import config as config_module
from polyvit_fast.config import ComputeOptions, DataOptions, DistributedOptions, LogOptions, Model, Optim, Task, Train
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.sources.synthetic import Synthetic


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Train(tasks={}), "tasks is empty"),
        (lambda: tiny_config(tasks={"a b": tile_task()}), "task name 'a b'"),
        (lambda: tiny_config(decoding="gpu"), "--decoding gpu needs --device cuda"),
        (lambda: tiny_config(attention="cudnn"), "--attention cudnn needs --device cuda"),
        (lambda: tiny_config(residual="bf16"), "--residual bf16 needs --precision bf16"),
        (lambda: tiny_config(sharded=True, optim=Optim(clip="process")), "--optim.clip process needs each process's whole gradient"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("field", ["num_class_tokens", "pool", "positions"])
def test_tasks_of_one_tokenizer_have_one_kind_of_tokens(field):
    other = {"num_class_tokens": 2, "pool": "mean", "positions": "sinusoidal"}[field]
    with pytest.raises(ValueError, match=f"hence one tokenizer, but a has {field} = .* and b has {other}; make them equal"):
        tiny_config(tasks={"a": tile_task(), "b": tile_task(modality=replace(Tile(), **{field: other}))})


@pytest.mark.parametrize(
    ("init", "parts"),
    [
        ("", {}),
        ("runs/mine@best", {"": "runs/mine@best"}),
        ("a=b/c.npz", {"a": "b/c.npz"}),
        ("tile=x,trunk=y=z", {"tile": "x", "trunk": "y=z"}),
        ({"b": "x"}, {"b": "x"}),
    ],
)
def test_sources_of_initial_weights(init, parts):
    assert tiny_config(init=init).init_parts == parts


def test_an_unknown_part_of_initial_weights_is_named():
    with pytest.raises(ValueError, match="init names the part 'c'; there are trunk, tile, a, b"):
        tiny_config(init="tile=x,c=y")


def test_tasks_of_one_modality_must_have_one_grid():
    with pytest.raises(ValueError, match=r"tasks a and b have the same modality tile.*make them equal"):
        tiny_config(tasks={"a": tile_task(), "b": tile_task(modality=Tile(size=24))})


def test_any_field_can_be_set_on_the_command_line(config):
    flags = "--tasks.a.steps 5 --tasks.b.modality.size 16 --optim.lr 0.5 --schedule uniform --model.depth 3 --no-resume"
    flags += " --precision bf16 --residual bf16 --num-threads 5 --keep 7 --grad-reduce bf16"
    changed = tyro.cli(Train, default=config, args=flags.split())
    assert (changed.precision, changed.compute.residual, changed.data.num_threads) == ("bf16", "bf16", 5)
    assert (changed.log, changed.distributed.grad_reduce) == (replace(config.log, keep=7), "bf16")
    assert (changed.tasks["a"].steps, changed.optim.lr, changed.schedule, changed.model.depth, changed.resume) == (
        5,
        0.5,
        "uniform",
        3,
        False,
    )
    assert changed.tasks["b"] == config.tasks["b"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tasks.a.step 5", ["Unrecognized", "Perhaps you meant", "--tasks.a.steps"]),
        ("--tasks.a.steps five", ["tasks.a.steps", "INT"]),
        ("--tasks.a.steps 0", ["tasks.a", "steps = 0 must be at least 1"]),
        ("--data.num-threads 5", ["Unrecognized", "Perhaps you meant", "--num-threads INT"]),
        ("--num-threads -1", ["data", "num_threads = -1 must not be negative"]),
        ("--residual bf16 --precision fp32", ["--residual bf16 needs --precision bf16"]),
    ],
)
def test_wrong_flags_are_named(config, capsys, flags, words):
    with pytest.raises(SystemExit):
        tyro.cli(Train, default=config, args=flags.split())
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert all(word in printed for word in words)


def test_help_has_a_box_for_each_group_with_short_flags(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(Train, default=config, args=["--help"])
    _, *titles_and_texts = re.split(r"^\W*([\w.]+) options\W*$", capsys.readouterr().out, flags=re.MULTILINE)
    boxes = dict(zip(titles_and_texts[::2], titles_and_texts[1::2], strict=True))
    for group in ("data", "compute", "log", "distributed"):
        options = getattr(config, group)
        assert type(options).__doc__ in " ".join(re.sub(r"[-│]{2,}|│", "", boxes[group]).split())
        for field in fields(options):
            assert re.search(rf"^\W* --{field.name.replace('_', '-')}\b", boxes[group], re.MULTILINE), field.name


def test_every_field_has_its_help():
    source = [line for file in Path(config_module.__file__).parent.glob("*.py") for line in file.read_text().splitlines()]
    for record in (Model, Optim, DataOptions, ComputeOptions, LogOptions, DistributedOptions, Train, Task):
        for field in fields(record):
            if field.name in {"tasks", "model", "optim", "data", "compute", "log", "distributed", "modality", "train", "val"}:
                continue
            lines = [i for i, line in enumerate(source) if line.startswith(f"    {field.name}: ")]
            assert any(source[i + 1].startswith('    """') for i in lines), f"{record.__name__}.{field.name}"


def test_records_cannot_be_changed(config):
    with pytest.raises(AttributeError):
        config.seed = 3
    assert replace(config, seed=3).seed == 3


@pytest.mark.parametrize(
    ("field", "first", "second"), [("spectrogram", "kaldi", "mbt"), ("sample_rate_hz", 16_000, 8_000), ("num_mel_bins", 128, 64)]
)
def test_sounds_with_different_spectrograms_cannot_have_one_tokenizer(field, first, second):
    tasks = {
        name: Task(modality=Audio(**{field: value}), train=Synthetic(), val=Synthetic(), num_classes=2, steps=1)
        for name, value in (("a", first), ("b", second))
    }
    named = "grid" if field == "num_mel_bins" else f"{field} = {first} and b has {second}"
    with pytest.raises(ValueError, match=f"tasks a and b have the same modality audio, hence one tokenizer, but a has {named}"):
        Train(tasks=tasks)


def test_only_some_tasks_are_a_run_of_their_own(config):
    tasks = {name: tile_task(steps=steps) for name, steps in (("a", 60), ("b", 30), ("c", 10))}
    whole = replace(config, tasks=tasks, out="runs/all", optim=replace(config.optim, warmup_steps=15))
    part = whole.only(["c", "a"])
    assert list(part.tasks.items()) == [("a", tasks["a"]), ("c", tasks["c"])]  # in the experiment's order, which decides the plan
    assert part.out == "runs/all-only-a-c"
    assert part.optim == replace(whole.optim, warmup_steps=11)  # 15 of 100 steps are 10.5 of 70
    assert whole.only(["b"]) == replace(whole, tasks={"b": tasks["b"]}, out="runs/all-only-b", optim=replace(whole.optim, warmup_steps=5))
    assert replace(whole, out="").only(["b"]).out == ""
    with pytest.raises(ValueError, match="--only: there is no task x; there are a, b, c"):
        whole.only(["a", "x"])


class OtherTile(Tile):
    name = "other"


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("", ""),
        ("runs/first@best", "runs/first@best"),
        ({"tile": "A", "other": "B"}, {"trunk": "A", "other": "B"}),
        ("tile=A,other=B,a=C,b=D", {"trunk": "A", "other": "B", "b": "D"}),
        ({"trunk": "T", "tile": "A"}, {"trunk": "T"}),
        ({"a": "C"}, {}),
    ],
)
def test_some_tasks_begin_with_what_they_have_in_the_whole_run(config, init, expected):
    tasks = {"a": tile_task(), "b": tile_task(modality=OtherTile())}
    assert replace(config, tasks=tasks, init=init).only(["b"]).init == expected
