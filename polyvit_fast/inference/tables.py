"""Tables on the disk, written row by row: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyvit_fast.inference.results import Features
from polyvit_fast.media import printable

Row = Sequence[str | int | float]
AddRows = Callable[[Iterable[Row]], None]
PREDICTION_COLUMNS: dict[str, type] = {"file": str, "task": str, "rank": int, "class": str, "probability": float}
"""A row is one class of one file, the most probable class having rank 1."""


@contextmanager
def open_table(path: Path, columns: Mapping[str, type]) -> Iterator[AddRows]:
    """Inside, a function that adds rows to a new table, whose format is that of the ending of its name.

    Raises ValueError for another ending, a folder that cannot be written, or when pyarrow is missing.
    """
    check_table_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FORMATS[path.suffix.lower()](path, columns) as add:
            yield add
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def check_table_file(path: Path) -> None:
    """Raise ValueError when a table cannot be written there: for another ending, or without pyarrow."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the name of a table ends in {' or '.join(FORMATS)}")
    if path.suffix.lower() == ".parquet":
        import_pyarrow(path)


@contextmanager
def _open_csv(path: Path, columns: Mapping[str, type]) -> Iterator[AddRows]:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        yield writer.writerows


@contextmanager
def _open_parquet(path: Path, columns: Mapping[str, type]) -> Iterator[AddRows]:
    pyarrow, parquet = import_pyarrow(path)
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])

    def add(rows: Iterable[Row]) -> None:
        values = [dict(zip(columns, map(_to_cell, row), strict=True)) for row in rows]
        writer.write_table(pyarrow.Table.from_pylist(values, schema))

    with parquet.ParquetWriter(path, schema) as writer:
        yield add


def import_pyarrow(path: Path) -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. Raises ValueError when they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow, which is not installed: pip install pyarrow, or take another ending") from None
    return pyarrow, parquet


def _to_cell(value: str | int | float) -> str | int | float:
    return printable(value) if isinstance(value, str) else value  # names of files may be no UTF-8


FORMATS = {".csv": _open_csv, ".parquet": _open_parquet}


def check_features_file(path: Path, pool: str | None) -> None:
    """Raise ValueError when features cannot be written there: for another ending, without pyarrow, or all tokens as Parquet."""
    if path.suffix.lower() not in (".npz", ".parquet"):
        raise ValueError(f"{path}: the name of a file of features ends in .npz or .parquet")
    if path.suffix.lower() == ".parquet":
        import_pyarrow(path)
        if pool is None:
            raise ValueError(f"{path}: all tokens of a file are no row of a table; take .npz, or another pool")


def write_features(path: Path, chunks: Sequence[Features]) -> tuple[int, ...]:
    """Write features and names: arrays of an .npz, or columns of a Parquet table. The shape of all features together."""
    features = torch.cat([chunk.tensor for chunk in chunks]).numpy()
    names = [name for chunk in chunks for name in chunk.names]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".npz":
            with open(path, "wb") as file:
                np.savez(file, features=features, names=np.array(names))
        else:
            pyarrow, parquet = import_pyarrow(path)
            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.reshape(-1)), features.shape[1])
            parquet.write_table(pyarrow.table({"file": list(map(printable, names)), "features": column}), path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    return features.shape
