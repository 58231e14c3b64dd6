"""Which kernel runs with which blocks, on which GPU."""

from polyvit_kernels.tiles.json_rows import dump_rows, load_rows
from polyvit_kernels.tiles.lookup import architecture, num_sms, pick, pick_for, rows, rows_for
from polyvit_kernels.tiles.tile import ANY, DTYPES, PACKAGES, Backend, Tile, Variant

__all__ = [
    "ANY",
    "DTYPES",
    "PACKAGES",
    "Backend",
    "Tile",
    "Variant",
    "architecture",
    "dump_rows",
    "load_rows",
    "num_sms",
    "pick",
    "pick_for",
    "rows",
    "rows_for",
]
