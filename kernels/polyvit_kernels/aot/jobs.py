"""Which kernels the rows of the tile table need on which GPUs."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice

from polyvit_kernels.tiles import ANY, PACKAGES, Tile, Variant

_MODULES = {
    "attention_short_": "attention_short",
    "attention_long_": "attention_long",
    "linear_": "linear",
    "dgelu_": "linear",
    "layer_norm_": "layer_norm",
    "patch_embed_": "patch_embed",
    "sgd_": "update",
    "adamw_": "update",
}

BACKEND_CHOICE = "attention"
"""The op whose rows choose between our kernels, which have ops of their own, and libraries."""


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """One kernel to compile: the `index`-th of a row, for a dtype and the GPU `arch`."""

    tile: Tile
    dtype: str
    arch: int
    index: int

    def __str__(self) -> str:
        low, high = self.tile.tokens
        return f"{self.tile.op} {self.dtype} sm_{self.arch} tokens {low}..{high} features {self.tile.features}, kernel {self.index}"

    def variant(self) -> Variant:
        """The kernel to compile."""
        return next(islice(variants(self.tile, self.dtype), self.index, None))


@dataclass(frozen=True, kw_only=True)
class CompiledTile:
    """A row for one GPU and dtype; `kernels` are indices of the list of jobs."""

    tile: Tile
    dtype: str
    arch: int
    kernels: tuple[int, ...]


def variants(tile: Tile, dtype: str) -> Iterator[Variant]:
    """The kernels of a row, with the budget that it states; none where a library is the backend. Raises ValueError for an unknown op."""
    if tile.backend not in PACKAGES:
        return iter(())
    module = next((module for prefix, module in _MODULES.items() if tile.op.startswith(prefix)), None)
    if module is None:
        raise ValueError(f"no module compiles the rows of {tile.op}: add it to jobs._MODULES")
    budget = {"programs_per_sm": tile.programs_per_sm, "allowed_spills": tile.allowed_spills}
    return (replace(variant, **budget) for variant in import_module(f"{PACKAGES[tile.backend]}.{module}").variants(tile, dtype))


def list_jobs(table: Sequence[Tile], archs: Sequence[int], dtypes: Sequence[str]) -> tuple[list[CompiledTile], list[CompileJob]]:
    """Each row on each GPU in each dtype, and each distinct kernel once. A row with none of these dtypes is compiled for all of its own."""
    entries: list[CompiledTile] = []
    indices: dict[Hashable, int] = {}
    jobs: list[CompileJob] = []
    for tile in (tile for tile in table if tile.op != BACKEND_CHOICE):
        for arch in (arch for arch in archs if arch in tile.archs):
            for dtype in [dtype for dtype in dtypes if dtype in tile.dtypes] or tile.dtypes:
                target = compile_arch(tile, arch, archs)
                kernels = []
                for index, variant in enumerate(variants(tile, dtype)):
                    job = indices.setdefault(_identify(variant, target), len(jobs))
                    if job == len(jobs):
                        jobs.append(CompileJob(tile=tile, dtype=dtype, arch=target, index=index))
                    kernels.append(job)
                entries.append(CompiledTile(tile=tile, dtype=dtype, arch=arch, kernels=tuple(kernels)))
    return entries, jobs


def compile_arch(tile: Tile, arch: int, archs: Sequence[int]) -> int:
    """The GPU to compile for, so that `arch` runs the code: before Hopper, code for the oldest GPU of a generation runs on all of them."""
    return arch if arch >= 90 else min(a for a in archs if a in tile.archs and a // 10 == arch // 10)


def _identify(variant: Variant, arch: int) -> Hashable:
    parts = (sorted(variant.signature.items()), sorted(variant.constants.items(), key=lambda pair: pair[0]), sorted(variant.divisible))
    options = (variant.num_warps, variant.num_stages, variant.max_registers, variant.programs_per_sm, variant.allowed_spills)
    return (variant.kernel.__module__, variant.kernel.__name__, str(parts), *options, arch)


def format_limits(*limits: int) -> str:
    """A row's limits in words: a single one is the most, two are the fewest and the most."""
    if limits[-1] < ANY:
        return "..".join(map(str, limits))
    return "any" if limits[0] in (1, ANY) else f"{limits[0]}.."
