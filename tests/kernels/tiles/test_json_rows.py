"""Rows as JSON."""

import json

import pytest

from polyvit_kernels.tiles import ANY, Tile, dump_rows, load_rows
from polyvit_kernels.tiles.table import TABLE


def test_every_row_of_the_table_survives(tmp_path):
    dump_rows(TABLE, tmp_path / "rows.json")
    assert load_rows(tmp_path / "rows.json") == TABLE


def test_a_file_has_one_row_a_line_with_what_differs_from_the_defaults(tmp_path):
    path = tmp_path / "rows.json"
    dump_rows([Tile(op="a", archs=(90,), tokens=(257, ANY), blocks={"BLOCK": 64}), Tile(op="b", archs=(80, 86), features=64)], path)
    assert path.read_text().splitlines() == [
        "[",
        '{"op": "a", "archs": [90], "tokens": [257, null], "blocks": {"BLOCK": 64}},',
        '{"op": "b", "archs": [80, 86], "features": 64}',
        "]",
    ]


def test_no_rows_are_a_file_too(tmp_path):
    dump_rows([], tmp_path / "rows.json")
    assert load_rows(tmp_path / "rows.json") == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "Expecting value"),
        (json.dumps([{"op": "a"}]), "archs"),
        (json.dumps([{"op": "a", "archs": [90], "warps": 4}]), "warps"),
        (json.dumps([{"op": "a", "archs": [90], "tokens": [1]}]), "not enough values"),
        ("7", "not iterable"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, text, reason):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=f"rows.json is no list of rows of the tile table: .*{reason}"):
        load_rows(tmp_path / "rows.json")
