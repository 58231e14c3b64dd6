"""Which kernel runs with which blocks, on which GPU."""

from polyvit_kernels.tiles.lookup import architecture, num_processors, pick, pick_for, rows
from polyvit_kernels.tiles.tile import ANY, DTYPES, Backend, Tile, Variant

__all__ = ["ANY", "DTYPES", "Backend", "Tile", "Variant", "architecture", "num_processors", "pick", "pick_for", "rows"]
