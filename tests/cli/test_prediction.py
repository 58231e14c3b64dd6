import csv

import numpy as np
import pytest
import torch
from image_files import photo
from image_kinds import saved

import polyvit_fast as pf
from polyvit_fast import cli
from polyvit_fast.cli.prediction import CHUNK_BATCHES
from polyvit_fast.data.stream import evaluation_size


def printed(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_everything(trained, mixed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # the folder's name is as long as the machine wants
    assert cli.run(["predict", str(trained), str(mixed)]) == 0
    out, err = printed(capsys)
    assert all(name in out for name in ("shapes", "motion", "chords", "a.jpg", "b.jpg", "c.mp4", "d.wav"))
    assert not any(name in out for name in ("text.jpg", "empty.wav", "cut.mp4", "notes.txt"))
    lines = [line for line in err.splitlines() if line]
    assert sum("text.jpg: not an image that can be decoded" in line for line in lines) == 1
    assert sum("empty.wav: the file is empty" in line for line in lines) == 1
    assert sum("cut.mp4: " in line for line in lines) >= 1  # as a video, and as a sound
    assert not any("notes.txt" in line for line in lines)


def test_a_table_holds_what_python_predicts(trained, mixed, tmp_path, capsys):
    out = tmp_path / "new" / "table.csv"
    assert cli.run(["predict", str(trained), str(mixed), "--top", "2", "--out", str(out), "--device", "cpu"]) == 0
    assert f"written: {out}, 4 predictions" in printed(capsys)[0]
    rows, model = read_csv(out), pf.load(trained)
    assert list(rows[0]) == ["file", "task", "rank", "class", "probability"]
    assert [(row["file"], row["task"], row["rank"]) for row in rows] == [
        (str(mixed / name), task, rank)
        for task, name in (("shapes", "a.jpg"), ("shapes", "deeper/b.jpg"), ("motion", "c.mp4"), ("chords", "d.wav"))
        for rank in ("1", "2")
    ]
    for row in rows:
        [expected] = model.predict(row["file"], row["task"], top=2)
        rank = int(row["rank"]) - 1
        assert row["class"] == expected.classes[rank]
        assert float(row["probability"]) == pytest.approx(expected.probabilities[rank], abs=1e-6)


def test_what_libraries_write_about_a_damaged_picture_is_said_once(trained, tmp_path, capfd):
    damaged, rng = bytearray(saved(photo(), "JPEG", progressive=True)), np.random.default_rng(0)
    for position in rng.integers(len(damaged) // 2, len(damaged) - 64, 6):
        damaged[position] ^= 0xFF
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(damaged)
    assert cli.run(["predict", str(trained), str(tmp_path), "--device", "cpu"]) == 0
    said = capfd.readouterr().err
    assert said.count("Corrupt JPEG data") == 1
    assert "1.jpg may be damaged (JPEG library: Corrupt JPEG data" in said


def test_a_parquet_table(trained, mixed, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "table.parquet"
    assert cli.run(["predict", str(trained), str(mixed / "a.jpg"), "--out", str(out)]) == 0
    table = parquet.read_table(out)
    assert table.column_names == ["file", "task", "rank", "class", "probability"]
    assert table.num_rows == 5
    assert table["rank"].to_pylist() == [1, 2, 3, 4, 5]
    [expected] = pf.load(trained).predict(mixed / "a.jpg", "shapes")
    assert table["class"].to_pylist() == list(expected.classes)
    assert table["probability"].to_pylist() == pytest.approx(expected.probabilities)


def test_many_files_are_computed_in_chunks(trained, tmp_path):
    files = sorted((trained.parent / "files" / "shapes" / "train").glob("*.jpg"))
    model = pf.load(trained)
    paths = [str(tmp_path / f"{number}-{path.name}") for number in range(3) for path in files]
    assert len(paths) > CHUNK_BATCHES * evaluation_size(model.tasks["shapes"])
    for path in paths:
        (tmp_path / path).write_bytes((files[0].parent / path.rpartition("-")[2]).read_bytes())
    out = tmp_path / "t.csv"
    assert cli.run(["predict", str(trained), *paths, "--out", str(out), "--top", "1"]) == 0
    rows = read_csv(out)
    assert [row["file"] for row in rows] == paths
    expected = [row.classes[0] for row in model.predict(files, "shapes", top=1)]
    assert [row["class"] for row in rows] == expected * 3


def test_a_task_that_is_named_takes_files_of_any_name(trained, mixed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (mixed / "picture.txt").write_bytes((mixed / "a.jpg").read_bytes())
    assert cli.run(["predict", str(trained), str(mixed / "picture.txt"), str(mixed / "a.jpg")]) == 0
    assert "picture.txt: by its name it is no file of the run's tasks; name one with --task if it is" in printed(capsys)[1]
    assert cli.run(["predict", str(trained), str(mixed / "picture.txt"), "--task", "shapes"]) == 0
    assert "picture.txt" in printed(capsys)[0]


def test_nothing_that_works_is_exit_code_65(trained, mixed, tmp_path, capsys):
    for more in ([], ["--out", str(tmp_path / "x.csv")]):
        assert cli.run(["predict", str(trained), str(mixed / "text.jpg"), *more]) == 65
        assert "text.jpg: not an image" in printed(capsys)[1]
    features = ["features", str(trained), str(mixed / "text.jpg"), "--modality", "image", "--out", str(tmp_path / "x.npz")]
    assert cli.run(features) == 65
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("predict", "usage: polyvit-fast predict RUN"),
        ("predict RUN", "usage: polyvit-fast predict RUN FILES ...: name files or folders after the run"),
        ("predict runs/nothing a.jpg", "the run folder runs/nothing does not exist"),
        ("predict RUN FOLDER/void", "there is no file of image, video, audio in"),
        ("predict RUN FOLDER --task shape", "has no task 'shape'; perhaps you meant 'shapes'"),
        ("predict RUN FOLDER --top 0", "--top 0 must be at least 1"),
        ("predict RUN FOLDER --out x.txt", "x.txt: the name of a table ends in .csv or .parquet"),
        ("predict RUN FOLDER --checkpoint 77", "holds no checkpoint '77'; there are newest, best and the steps 6"),
        ("features RUN FOLDER --out x.npz", "has several modalities: name one with modality="),
        ("features RUN FOLDER --out x.csv --modality image", "x.csv: the name of a file of features ends in .npz or .parquet"),
        ("features RUN FOLDER --out x.npz --modality image --layer 7", "layer = 7, but the model has 2 blocks: 0 to 2"),
    ],
)
def test_what_is_asked_wrongly_is_answered(trained, mixed, capsys, arguments, message):
    (mixed / "void").mkdir()
    words = [word.replace("RUN", str(trained)).replace("FOLDER", str(mixed)) for word in arguments.split()]
    assert cli.run(words) == 2
    assert message in " ".join(printed(capsys)[1].split())


def test_features_of_files(trained, mixed, tmp_path, capsys):
    model = pf.load(trained)
    for options, shape in (([], (2, 32)), (["--pool", "mean", "--layer", "1"], (2, 32)), (["--pool", "none"], (2, 1, 37, 32))):
        out = tmp_path / "features.npz"
        assert cli.run(["features", str(trained), str(mixed), "--task", "shapes", "--out", str(out), *options]) == 0
        found, error = printed(capsys)
        assert f"written: {out}, features {list(shape)}" in found
        assert "text.jpg: not an image" in error
        with np.load(out) as file:
            stored = dict(file)
        assert stored["names"].tolist() == [str(mixed / "a.jpg"), str(mixed / "deeper" / "b.jpg")]
        pool = {"--pool": options[1] if options else "cls"}["--pool"]
        layer = 1 if "--layer" in options else None
        expected = model.features(stored["names"].tolist(), task="shapes", layer=layer, pool=None if pool == "none" else pool)
        torch.testing.assert_close(torch.from_numpy(stored["features"]), expected.tensor)


def test_features_as_parquet(trained, mixed, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "features.parquet"
    command = ["features", str(trained), str(mixed), "--modality", "image", "--out", str(out)]
    assert cli.run(command) == 0
    table = parquet.read_table(out)
    expected = pf.load(trained).features(table["file"].to_pylist(), modality="image").tensor
    np.testing.assert_allclose(np.array(table["features"].to_pylist()), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert cli.run([*command, "--pool", "none"]) == 2
    assert "all tokens of a file are no row of a table; take .npz" in printed(capsys)[1]


@pytest.mark.parametrize("command", ["predict", "features", "eval"])
def test_help_shows_examples_on_lines_of_their_own(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.run([command, "--help"])
    lines = printed(capsys)[0].splitlines()
    assert sum(line.startswith(f"$ polyvit-fast {command} runs/demo") for line in lines) >= 2
