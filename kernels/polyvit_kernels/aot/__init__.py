"""Ahead of time: compiling every row of the tile table without a GPU, its budget, and the C library."""
