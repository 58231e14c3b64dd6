import csv
import json
import shutil
import subprocess
import sys

import pytest

from polyvit_fast import cli


def printed(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.out.split()), " ".join(captured.err.split())


def last_row(run):
    return json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])


def test_classes_and_predictions(trained, tmp_path, capsys):
    table = tmp_path / "answers.csv"
    assert cli.run(["eval", str(trained), "--per-class", "--predictions", str(table), "--device", "cpu"]) == 0
    out, _ = printed(capsys)
    assert "average precision" in out
    for name in ("shapes", "motion"):
        assert f"drawn: {trained / f'confusion-{name}.png'}" in out
        assert (trained / f"confusion-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (trained / "confusion-chords.png").exists()
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "task", "labels", "rank", "class", "probability"]
    metrics = last_row(trained)["tasks"]
    for task in ("shapes", "motion"):
        first = [row for row in rows if row["task"] == task and row["rank"] == "1"]
        assert len(first) == 9
        assert sum(row["labels"] == row["class"] for row in first) / 9 == pytest.approx(metrics[task]["top1"])
    several = {row["file"]: row["labels"] for row in rows if row["task"] == "chords"}
    assert any(";" in labels for labels in several.values())


def test_other_views(trained, capsys):
    assert cli.run(["eval", str(trained), "--tasks", "motion", "--views", "2x3"]) == 0
    row = last_row(trained)
    assert (row["split"], row["views"]) == ("val", {"motion": 6})
    assert cli.run(["eval", str(trained), "--tasks", "chords", "--views", "3"]) == 0
    assert last_row(trained)["views"] == {"chords": 3}


def test_other_splits(trained, capsys):
    for split, count in (("test", 6), ("train", 18)):
        assert cli.run(["eval", str(trained), "--split", split, "--tasks", "shapes", "--per-class"]) == 0
        row = last_row(trained)
        assert (row["split"], row["tasks"]["shapes"]["num_examples"]) == (split, count)
        assert (trained / f"confusion-shapes-{split}.png").exists()
    assert cli.run(["eval", str(trained), "--split", "test"]) == 0
    assert list(last_row(trained)["tasks"]) == ["shapes"]  # the only task that has test files


def test_a_run_that_cannot_be_written_is_evaluated_and_only_warned_of(trained, tmp_path, capsys):
    """Root may write anywhere but on a full disk, and to a file that is a folder."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("confusion-*"))
    for make_unwritable in (lambda path: path.symlink_to("/dev/full"), lambda path: path.mkdir()):
        (run / "evaluations.jsonl").unlink(missing_ok=True)
        make_unwritable(run / "evaluations.jsonl")
        assert cli.run(["eval", str(run), "--tasks", "shapes", "--per-class"]) == 0
        out, err = printed(capsys)
        assert "top1" in out
        assert "circle" in out
        assert "warning: nothing was recorded, for " in err
        assert "evaluations.jsonl cannot be written: " in err
    assert not (run / "confusion-shapes.png").exists()


def test_results_are_written_elsewhere(trained, tmp_path, capsys):
    before = (trained / "evaluations.jsonl").read_bytes() if (trained / "evaluations.jsonl").exists() else b""
    out = tmp_path / "results" / "mine.jsonl"
    for split in ("val", "train"):
        assert cli.run(["eval", str(trained), "--tasks", "shapes", "--split", split, "--per-class", "--out", str(out)]) == 0
    assert [json.loads(line)["split"] for line in out.read_text().splitlines()] == ["val", "train"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["confusion-shapes-train.png", "confusion-shapes.png", "mine.jsonl"]
    assert (trained / "evaluations.jsonl").read_bytes() == before if before else True
    capsys.readouterr()
    assert cli.run(["eval", str(trained), "--tasks", "shapes", "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in printed(capsys)[1]
    assert cli.run(["eval", str(trained), "--tasks", "shapes", "--out", str(out / "below a file")]) == 2
    text, err = printed(capsys)
    assert "top1" in text
    assert f"below a file cannot be written: {out} is a file, not a folder; name another file with --out" in err


def test_the_checkpoints_configuration_is_believed(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert cli.run(["eval", str(run), "--tasks", "shapes"]) == 0
    expected = last_row(run)["tasks"]["shapes"]
    path = run / "config.json"
    path.write_text(path.read_text().replace('"eval_crop": "centre"', '"eval_crop": "resize"'))
    code = "import sys; from polyvit_fast import cli; sys.exit(cli.run(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "eval", str(run), "--tasks", "shapes"], capture_output=True, text=True, check=True)
    assert done.stderr.count("warning: ") == 1
    assert 'its own is used (its own -> the folder\'s): tasks.shapes.modality.eval_crop: "centre" -> "resize"' in done.stderr
    assert {k: v for k, v in last_row(run)["tasks"]["shapes"].items() if k != "examples_per_second"} == {
        k: v for k, v in expected.items() if k != "examples_per_second"
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{run}/metrics.jsonl", "metrics.jsonl is a file of a run; give its run folder, "),
        ("{run}/checkpoints", "checkpoints is a folder of a run; give its run folder, "),
        ("{run}s", "does not exist (in "),
        ("{parent}", "is not a run folder but holds some; perhaps you meant {run}"),
        ("{parent}/files", "files is not a run folder: it has no config.json (polyvit-fast train makes one"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "plot"])
def test_what_is_no_run_is_named(trained, capsys, command, path, message):
    names = {"run": trained, "parent": trained.parent}
    assert cli.run([command, path.format(**names)]) == 2
    assert message.format(**names) in printed(capsys)[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--views 4x3",
            "task shapes: --views 4x3: image: a picture has one view in evaluation, the whole of it or its centre (eval_crop); choose",
        ),
        ("--tasks chords --views 4x3", "task chords: --views 4x3: audio: views are clips, such as 4, and not 4x3"),
        ("--tasks motion --views 4x2", "video: views are clips x crops with 1 or 3 crops, such as 4x3, and not 4x2"),
        ("--tasks motion --views 0", "--views 0 is no number of clips, such as 4, or of clips and crops, such as 4x3"),
        ("--tasks motion --split test", "task motion has no test files"),
        ("--tasks nothing --views 4", "has no task nothing; it has shapes, motion, chords"),
        ("--predictions answers.txt", "answers.txt: the name of a table ends in .csv or .parquet"),
    ],
)
def test_what_is_asked_wrongly_is_answered(trained, capsys, flags, message):
    assert cli.run(["eval", str(trained), *flags.split()]) == 2
    assert message in printed(capsys)[1]
