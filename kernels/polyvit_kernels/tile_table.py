"""The rows that `tiles.pick` reads, the first that fits wins. `benchmarks/tune.py` rewrites the rows of the card that it runs on."""


_AMPERE = (80,)
_SMALL = (86, 89, 120)  # 99 KB of shared memory per block, mma.sync
_HOPPER = (90,)
_BLACKWELL = (100,)
_ALL = (80, 86, 89, 90, 100, 120)

_ATTENTION = ()

_MLP = ()

_LAYER_NORM = ()

_PATCH_EMBED = ()

_UPDATE = ()

TABLE = (*_ATTENTION, *_MLP, *_LAYER_NORM, *_PATCH_EMBED, *_UPDATE)
