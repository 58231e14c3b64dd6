"""A row of the tile table."""

from polyvit_kernels.tiles import Tile


def test_launch_gives_blocks_warps_and_stages():
    tile = Tile(op="a", archs=(80,), blocks={"BLOCK_M": 64}, num_warps=8, num_stages=3)
    assert tile.launch() == {"BLOCK_M": 64, "num_warps": 8, "num_stages": 3}


def test_launch_limits_registers_where_the_row_does():
    assert Tile(op="a", archs=(90,), max_registers=168).launch() == {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
