import csv
import os
import sys

import numpy as np
import pytest
import torch

from polyvit_fast.inference.results import Features
from polyvit_fast.inference.tables import check_features_file, open_table, write_features

COLUMNS: dict[str, type] = {"file": str, "rank": int, "probability": float}
ROWS = [("a, b.jpg", 1, 0.5), ('"c".jpg', 2, 1e-9), ("d\ne.jpg", 3, 1.0)]


def test_csv(tmp_path):
    path = tmp_path / "new" / "a.CSV"
    with open_table(path, COLUMNS) as add:
        add(ROWS[:2])
        add(ROWS[2:])
        add([(os.fsdecode(b"caf\xe9.jpg"), 4, 0.0)])
    with open(path, newline="", errors="surrogateescape") as file:
        found = list(csv.DictReader(file))
    assert [(row["file"], int(row["rank"]), float(row["probability"])) for row in found[:3]] == ROWS
    assert os.fsencode(found[3]["file"]) == b"caf\xe9.jpg"


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    with open_table(tmp_path / "a.parquet", COLUMNS) as add:
        add(iter(ROWS[:2]))
        add([(os.fsdecode(b"caf\xe9.jpg"), 4, 0.0)])
    table = parquet.read_table(tmp_path / "a.parquet")
    assert [str(field.type) for field in table.schema] == ["string", "int64", "double"]
    assert table["file"].to_pylist() == ["a, b.jpg", '"c".jpg', "caf\\xe9.jpg"]
    assert table["probability"].to_pylist() == [0.5, 1e-9, 0.0]


def test_pyarrow_is_named_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = "a.parquet: Parquet needs pyarrow, which is not installed: pip install pyarrow, or take another ending"
    with pytest.raises(ValueError, match=message), open_table(tmp_path / "a.parquet", COLUMNS):
        pass
    with pytest.raises(ValueError, match=message):
        check_features_file(tmp_path / "a.parquet", "cls")
    check_features_file(tmp_path / "a.npz", None)


def test_names_and_folders_that_cannot_be(tmp_path):
    with (
        pytest.raises(ValueError, match=r"a\.txt: the name of a table ends in \.csv or \.parquet"),
        open_table(tmp_path / "a.txt", COLUMNS),
    ):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"a\.csv cannot be written: File exists"),
        open_table(tmp_path / "file" / "a.csv", COLUMNS),
    ):
        pass
    with pytest.raises(ValueError, match=r"a\.csv: the name of a file of features ends in \.npz or \.parquet"):
        check_features_file(tmp_path / "a.csv", "cls")


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_features_of_several_chunks(tmp_path, suffix):
    path, values = tmp_path / "new" / f"a.{suffix}", torch.randn(5, 8)
    chunks = [Features(values[:3], ["a", "b", "c"]), Features(values[3:], ["d", "é"])]
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    check_features_file(path, "cls")
    assert write_features(path, chunks) == (5, 8)
    if suffix == "npz":
        with np.load(path) as stored:
            found, names = stored["features"], stored["names"].tolist()
    else:
        from pyarrow import parquet

        table = parquet.read_table(path)
        found, names = np.array(table["features"].to_pylist(), np.float32), table["file"].to_pylist()
    np.testing.assert_array_equal(found, values.numpy())
    assert names == ["a", "b", "c", "d", "é"]
