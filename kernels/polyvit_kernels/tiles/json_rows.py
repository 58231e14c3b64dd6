"""Rows of the tile table as JSON, one a line: the form in which a tuner hands on what it measured.

A row holds the fields of `Tile` that differ from their defaults; null stands for no limit of tokens or features.
"""

import json
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from polyvit_kernels.tiles.tile import ANY, Tile


def load_rows(path: Path | Traversable) -> tuple[Tile, ...]:
    """The rows of a file, in their order. Raises ValueError that names the file where it is no list of rows."""
    try:
        return tuple(_decode(**row) for row in json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of rows of the tile table: {error}") from error


def dump_rows(rows: Iterable[Tile], path: Path) -> None:
    """Write the rows to a file, in their order. A process that is killed meanwhile leaves the file that was there."""
    text = "[\n" + ",\n".join(json.dumps(_encode(row), allow_nan=False) for row in rows) + "\n]\n"
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _decode(*, archs: list[int], **values: Any) -> Tile:
    if "tokens" in values:
        low, high = values["tokens"]
        values["tokens"] = (low, ANY if high is None else high)
    if "features" in values and values["features"] is None:
        values["features"] = ANY
    if "dtypes" in values:
        values["dtypes"] = tuple(values["dtypes"])
    return Tile(archs=tuple(archs), **values)


def _encode(row: Tile) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    limits = {
        "tokens": [None if limit == ANY else limit for limit in row.tokens],
        "features": None if row.features == ANY else row.features,
    }
    return {field.name: limits.get(field.name, values[field.name]) for field in fields(row) if values[field.name] != _default(field)}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
