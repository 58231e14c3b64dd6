"""The rows of the tile table that were measured: read from its source, and written back into it."""

import ast
import os
import runpy
from collections.abc import Sequence
from pathlib import Path

from polyvit_kernels.tiles import ANY, Tile

NAME = "_MEASURED"
LINE_LENGTH = 140

Class = tuple[str, tuple[int, int], int]
"""What a row is for on a card: op, tokens, features."""


def class_of(row: Tile) -> Class:
    """The calls that a row is for."""
    return row.op, row.tokens, row.features


def read(path: Path) -> tuple[Tile, ...]:
    """The measured rows of a table's source."""
    return runpy.run_path(str(path))[NAME]


def merged(rows: Sequence[Tile], found: Sequence[Tile], arch: int, classes: set[Class]) -> tuple[Tile, ...]:
    """`rows` with those of one card replaced by what was found; of that card, rows of classes that are no more are left out."""
    replaced = {class_of(row) for row in found}
    kept = [row for row in rows if row.archs != (arch,) or class_of(row) in classes - replaced]
    return tuple(sorted((*kept, *found), key=lambda row: (row.archs, row.op, row.features, row.tokens)))


def rewrite(path: Path, rows: Sequence[Tile]) -> None:
    """Make `rows` the measured rows of a table's source; every other line stays, and the file is whole at any moment."""
    text = path.read_text()
    (place,) = (node for node in ast.parse(text).body if isinstance(node, ast.Assign) and _assigns(node))
    assert place.end_lineno
    lines = text.splitlines(keepends=True)
    # A comment may follow the tuple on its last line.
    after = lines[place.end_lineno :]
    new = "".join([*lines[: place.lineno - 1], tuple_text(rows), *after])
    draft = path.with_suffix(".draft")
    draft.write_text(new)
    os.replace(draft, path)


def _assigns(node: ast.Assign) -> bool:
    return [target.id for target in node.targets if isinstance(target, ast.Name)] == [NAME]


def tuple_text(rows: Sequence[Tile]) -> str:
    """The statement, four lines a row, where the formatter's own way takes eleven."""
    if not rows:
        return f"{NAME} = ()\n"
    return f"{NAME} = (\n{''.join(map(row_text, rows))})  # fmt: skip\n"


def row_text(row: Tile) -> str:
    """A row as Python."""
    plain = Tile(op=row.op, archs=row.archs)
    first = [f'op="{row.op}"', f"archs={row.archs}"]
    first += [f"tokens=({row.tokens[0]}, {_number(row.tokens[1])})"] if row.tokens != plain.tokens else []
    first += [f"features={_number(row.features)}"] if row.features != plain.features else []
    first += [f"dtypes={_tuple(row.dtypes)}"] if row.dtypes != plain.dtypes else []
    first += [f'backend="{row.backend}"'] if row.backend != plain.backend else []
    second = []
    if row.blocks:
        first += [f"num_warps={row.num_warps}", f"num_stages={row.num_stages}"]
        second += [f"blocks={{{', '.join(f'{_quoted(name)}: {value}' for name, value in row.blocks.items())}}}"]
    second += [f'source="{row.source}"']
    parts = [first, second] if len(_line(second)) <= LINE_LENGTH + 1 else [first, second[:1], second[1:]]
    return f"    Tile(\n{''.join(map(_line, parts))}    ),\n"


def _line(parts: list[str]) -> str:
    return f"        {', '.join(parts)},\n"


def _number(value: int) -> str:
    return "ANY" if value == ANY else str(value)


def _tuple(words: tuple[str, ...]) -> str:
    return f"({', '.join(map(_quoted, words))}{',' if len(words) == 1 else ''})"


def _quoted(word: str) -> str:
    return f'"{word}"'
