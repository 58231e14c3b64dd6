import json
from pathlib import Path

import pytest

from polyvit_fast.train.run_folder.locate import is_run, locate_run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two runs, of which one has logged, and other things that are no run."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "smoke"):
        (tmp_path / "runs" / name / "checkpoints" / "step_00000012").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "metrics.jsonl").touch()
    (tmp_path / "runs" / "demo" / "checkpoints" / "step_00000012" / "state.json").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "vit"}')
    return tmp_path


def test_a_run_is_known_by_what_it_has_left(here):
    for name in ("runs/demo", "runs/smoke"):
        assert locate_run(Path(name)) == Path(name)
    begun = here / "begun"
    begun.mkdir()
    (begun / "config.json").write_text(json.dumps({"experiment": "demo", "config": {}}))
    assert is_run(begun)
    for text in ("{", "[1]", '{"experiment": "demo"}'):
        (begun / "config.json").write_text(text)
        assert not is_run(begun)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/dmo", "the run folder runs/dmo does not exist (in {here}/runs); perhaps you meant runs/demo"),
        ("demo", "the run folder demo does not exist (in {here}); perhaps you meant runs/demo"),
        ("nothing", "the run folder nothing does not exist (in {here})"),
        ("runs", "runs is not a run folder but holds some; perhaps you meant runs/demo or runs/smoke"),
        ("empty", "empty is not a run folder: it is empty (polyvit-fast train makes one, under runs/ unless --out)"),
        ("full", "full is not a run folder: it has no config.json (polyvit-fast train makes one, under runs/ unless --out)"),
        ("notes.txt", "notes.txt is a file, and no run folder"),
        ("foreign", "foreign/config.json does not describe a run: it needs the fields experiment and config (another library's model"),
        ("runs/demo/metrics.jsonl", "runs/demo/metrics.jsonl is a file of a run; give its run folder, runs/demo"),
        ("runs/demo/checkpoints", "runs/demo/checkpoints is a folder of a run; give its run folder, runs/demo"),
        (
            "runs/demo/checkpoints/step_00000012",
            "runs/demo/checkpoints/step_00000012 is a checkpoint of a run; give its run folder, runs/demo, and its step 12",
        ),
        ("runs/demo/checkpoints/step_00000012/state.json", "state.json is a file of a run; give its run folder, runs/demo"),
    ],
)
def test_what_is_no_run_is_said_and_what_may_be_meant(here, path, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared
        locate_run(Path(path))
    assert message.format(here=here) in str(caught.value)


def test_many_runs_are_counted(here):
    for number in range(4):
        (here / "runs" / f"a{number}" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="perhaps you meant runs/a0 or runs/a1 or runs/a2 and 3 more"):
        locate_run(Path("runs"))
