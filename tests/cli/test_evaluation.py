import csv
import json

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
