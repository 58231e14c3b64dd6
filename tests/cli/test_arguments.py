from dataclasses import dataclass
from pathlib import Path

import pytest

from polyvit_fast import experiments
from polyvit_fast.cli.arguments import load_config, load_run, split_run, split_subject


@dataclass(frozen=True, kw_only=True)
class Options:
    """Do something with a run."""

    top: int = 5
    """How many."""


def test_the_subject_comes_first():
    assert split_subject(["demo", "--seed", "1"], "train EXPERIMENT") == ("demo", ["--seed", "1"])
    for arguments in ([], ["--seed", "1"]):
        with pytest.raises(ValueError, match=r"usage: polyvit-fast train EXPERIMENT \[--field value \.\.\.\]"):
            split_subject(arguments, "train EXPERIMENT")


def test_a_run_and_its_options(capsys):
    assert split_run(Options, ["runs/a", "--top", "2"], "show") == (Path("runs/a"), Options(top=2))
    with pytest.raises(ValueError, match="usage: polyvit-fast show RUN"):
        split_run(Options, ["--top", "2"], "show")
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit, match="0"):
            split_run(Options, [flag], "show")
        text = capsys.readouterr().out
        assert "polyvit-fast show RUN" in text
        assert "Do something with a run." in text


def test_flags_change_an_experiment():
    assert load_config("smoke", ["--seed", "3", "--tasks.clips.batch", "4"], "train").tasks["clips"].batch == 4
    assert load_config("smoke", [], "train") == experiments.load("smoke")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        load_run(tmp_path, "newest")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds no whole checkpoint yet"):
        load_run(tmp_path, "newest")
