import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from polyvit_fast import experiments
from polyvit_fast.cli.arguments import (
    load_config,
    load_run,
    parse_options,
    refuse_arguments,
    split_options,
    split_run,
    split_subject,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Do something with a run."""

    top: int = 5
    """How many."""


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Do something so many times."""

    times: int
    """How often."""


def test_the_subject_comes_first():
    assert split_subject(["demo", "--seed", "1"], "train EXPERIMENT") == ("demo", ["--seed", "1"])
    for arguments in ([], ["--seed", "1"]):
        with pytest.raises(ValueError, match=r"usage: polyvit-fast train EXPERIMENT \[--field value \.\.\.\]"):
            split_subject(arguments, "train EXPERIMENT")


def test_a_run_and_its_options():
    assert split_run(Options, ["runs/a", "--top", "2"], "show") == (Path("runs/a"), Options(top=2))
    with pytest.raises(ValueError, match="usage: polyvit-fast show RUN"):
        split_run(Options, ["--top", "2"], "show")


def test_flags_change_an_experiment():
    assert load_config("smoke", ["--seed", "3", "--tasks.clips.batch", "4"], "train").tasks["clips"].batch == 4
    assert load_config("smoke", [], "train") == experiments.load("smoke")


def test_an_empty_run_folder_is_the_default():
    assert load_config("smoke", ["--out", ""], "train").out == "runs/smoke"
    assert load_config("smoke", ["--out", "", "--only", "clips"], "train").out == "runs/smoke-only-clips"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim.l 3", "Unrecognized flag --optim.l: perhaps you meant --optim.lr"),
        ("--tasks.clips.step=3", "Unrecognized flag --tasks.clips.step: perhaps you meant --tasks.clips.steps"),
        ("--steps 3", "Unrecognized flag --steps: perhaps you meant --tasks.pictures.steps or --tasks.clips.steps or"),
        ("--data.num_threads 3", "Unrecognized flag --data.num-threads: perhaps you meant --num-threads"),
        ("--tasks.birds.steps 3", "Unrecognized flag --tasks.birds.steps: there is no task birds; there are pictures, clips, sounds"),
        ("extra", "Unrecognized argument extra"),
        ("--resume False", "Unrecognized argument False: --resume switches on and --no-resume off, and nothing stands after them"),
        ("--optim.lr fast", "--optim.lr FLOAT: 'fast' is no number"),
        ("--tasks.clips.steps 3.5", "--tasks.clips.steps INT: '3.5' is no whole number"),
        ("--tasks.clips.steps -3", "tasks.clips: steps = -3 must be at least 1"),
        ("--tasks.clips.batch 6 --tasks.clips.micro-batches 4", "tasks.clips: batch = 6 does not divide into micro_batches = 4"),
        ("--device gpu", "--device gpu: it is one of auto, cpu, cuda; perhaps you meant cuda"),
        ("--out", "--out TEXT: its value is missing"),
        ("--optim.betas 0.9", "--optim.betas FLOAT FLOAT: its value is missing"),
        ("--decoding gpu --device cpu", "--decoding gpu needs --device cuda; leave it auto"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, message, capsys):
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        load_config("smoke", flags.split(), "train")
    assert "\n" not in str(found.value)
    assert capsys.readouterr() == ("", "")


def test_of_a_flag_given_twice_the_last_counts():
    assert load_config("smoke", ["--seed", "3", "--seed=-4"], "train").seed == -4


def test_flags_before_their_subject_are_moved_behind_it():
    with pytest.raises(ValueError, match="flags stand after demo: polyvit-fast train demo --seed 1"):
        split_subject(["--seed", "1", "demo"], "train EXPERIMENT")


def test_options_that_are_missing_or_unknown():
    with pytest.raises(ValueError, match="missing: --times INT How often"):
        parse_options(Needed, [], "show RUN")
    with pytest.raises(ValueError, match="Unrecognized flag --time: perhaps you meant --times; see `polyvit-fast show RUN --help`"):
        parse_options(Needed, ["--times", "1", "--time", "2"], "show RUN")
    assert split_options(Options, ["--top", "2", "--seed", "3"], "show") == (Options(top=2), ["--seed", "3"])
    with pytest.raises(ValueError, match="list takes no further arguments, but got a b"):
        refuse_arguments(["a", "b"], "list")
    refuse_arguments([], "list")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        load_run(tmp_path, "newest")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds no whole checkpoint yet"):
        load_run(tmp_path, "newest")


def test_the_last_only_counts_however_it_is_written():
    for flags in (["--only=motion"], ["--only", "shapes", "--only", "motion"], ["--only", "shapes", "--only=motion"]):
        assert list(load_config("demo", flags, "plan").tasks) == ["motion"]


def test_a_value_after_a_switch_is_named():
    with pytest.raises(ValueError, match="--resume switches on and --no-resume off, and nothing stands after them"):
        load_config("smoke", ["--no-resume=1"], "plan")
