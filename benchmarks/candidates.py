"""Which calls get rows of their own when a card is tuned, and which rows are tried for them."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from polyvit_kernels.aot.images import SHARED_BYTES
from polyvit_kernels.ops import xformers_attention
from polyvit_kernels.tiles import ANY, Tile
from polyvit_kernels.tiles.table import TABLE

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
MOST_ACCUMULATORS = 128  # registers of a thread that a product may fill


@dataclass(frozen=True, kw_only=True)
class Case:
    """Calls of `op` with so many tokens and at most so many features: they get one row, which a call of the size `size` stands for.

    `small` is for Triton's interpreter. Of a size, the first number is how much there is (examples, rows), the others are the shape.
    """

    op: str
    size: tuple[int, ...]
    small: tuple[int, ...]
    tokens: tuple[int, int] = (1, ANY)
    features: int = ANY

    def question(self) -> tuple[int, int]:
        """The tokens and features that `size` asks the table with."""
        if self.op.startswith("attention"):
            return self.size[1], self.size[3]
        if self.op.startswith(("linear", "dgelu")):
            return self.size[0], self.size[1]
        return 1, self.size[1] if self.op.startswith("layer_norm") else 1

    def row(self, tile: Tile, arch: int, source: str) -> Tile:
        """`tile` as the row of this case on one card."""
        return replace(tile, archs=(arch,), tokens=self.tokens, features=self.features, dtypes=self.dtypes(), source=source)

    def dtypes(self) -> tuple[str, ...]:
        """bf16 is measured and fp16 is as fast; updates are of fp32."""
        return ("fp32",) if self.op.endswith("_update") else ("bf16", "fp16")


def _attention(op: str, *cases: tuple[tuple[int, int], tuple[int, int]]) -> tuple[Case, ...]:
    """Of heads of 64, for (token range, (examples, tokens))."""
    smalls = {50: 33, 197: 197, 256: 256}
    return tuple(
        Case(op=op, tokens=tokens, features=64, size=(*size, 12, 64), small=(1, smalls.get(size[1], 40), 1, 16)) for tokens, size in cases
    )


# ViT-B/32 and B/16 on images, 8 s and 25 s of sound, 32 frames: from the most used to the least, as time may run out.
_LENGTHS = (((257, 800), (64, 401)), ((801, 2000), (32, 1212)), ((2001, ANY), (8, 3137)))
_SHORT_FOR_LONG = ((129, 256), (128, 197))  # what no short backward has a row for goes to the long one
_ROWS, _MANY, _FEW = (25_216, 50_432, 788)
_LINEAR_SMALL = (20, 32, 48)

CASES: Mapping[str, tuple[Case, ...]] = {
    "attention": (
        *_attention("attention_short_forward", ((193, 208), (128, 197))),
        *_attention("attention_short_backward", ((129, 256), (128, 197))),
        *_attention("attention_long_forward", *_LENGTHS),
        *_attention("attention_long_backward", _SHORT_FOR_LONG, *_LENGTHS),
        *_attention("attention", ((1, 256), (128, 197)), *_LENGTHS),
        *_attention("attention_short_forward", ((1, 64), (512, 50)), ((209, 256), (100, 256))),
        *_attention("attention_short_backward", ((1, 64), (512, 50))),
    ),
    "mlp": (
        Case(op="linear_gelu_forward", tokens=(1025, ANY), size=(_ROWS, 768, 3072), small=_LINEAR_SMALL),
        Case(op="dgelu_backward", tokens=(1025, ANY), size=(_ROWS, 768, 3072), small=_LINEAR_SMALL),
        Case(op="linear_add_forward", tokens=(1025, ANY), size=(_ROWS, 3072, 768), small=_LINEAR_SMALL),
        Case(op="linear_add_forward", tokens=(1025, ANY), features=1536, size=(_ROWS, 768, 768), small=_LINEAR_SMALL),
        Case(op="linear_gelu_forward", tokens=(1025, ANY), features=512, size=(_MANY, 384, 1536), small=_LINEAR_SMALL),
        Case(op="dgelu_backward", tokens=(1025, ANY), features=512, size=(_MANY, 384, 1536), small=_LINEAR_SMALL),
        Case(op="linear_gelu_forward", tokens=(1, 1024), size=(_FEW, 768, 3072), small=_LINEAR_SMALL),
        Case(op="linear_add_forward", tokens=(1, 1024), size=(_FEW, 3072, 768), small=_LINEAR_SMALL),
    ),
    "layer_norm": tuple(
        Case(op=f"layer_norm_{direction}", features=features, size=(_MANY, dim), small=(9, dim // 16))
        for features, dim in ((1024, 768), (512, 384), (256, 192))
        for direction in ("forward", "backward")
    ),
    "update": tuple(Case(op=f"{name}_update", size=(86_567_656,), small=(3_000,)) for name in ("adamw", "sgd")),
    "patch_embed": tuple(
        Case(op=f"patch_embed_{direction}", size=(256, 1, 224, 1, 768), small=(2, 1, 32, 1, 48)) for direction in ("forward", "backward")
    ),
}

Choice = dict[str, int]
"""A row's blocks, with num_warps and num_stages among them."""


def candidates(case: Case, current: Tile, arch: int) -> list[Tile]:
    """The row in use, then all that are tried, each once."""
    choices = _SPACES[case.op](case, arch) if case.op in _SPACES else ()
    tiles = [current, *_on_hopper(case, arch), *(_tile(case.op, choice) for choice in choices), *_by_others(case)]
    return _distinct(tiles)


def neighbours(case: Case, tile: Tile) -> list[Tile]:
    """Rows that differ from a good one in a constant that matters less, or in their stages."""
    if tile.backend != "triton" or case.op == "attention":
        return []
    changes = [{name: value} for name, values in _MINOR.items() if name in tile.blocks for value in values]
    tiles = [replace(tile, blocks={**tile.blocks, **change}) for change in changes]
    tiles += [replace(tile, num_stages=stages) for stages in (tile.num_stages - 1, tile.num_stages + 1) if 1 <= stages <= 5]
    return [other for other in _distinct(tiles) if label(other) != label(tile)]


def label(tile: Tile) -> str:
    """What a row runs, in one line."""
    if tile.op == "attention" or tile.backend not in ("triton", "hopper"):
        return tile.backend
    words = [f"{name}={value}" for name, value in tile.blocks.items()] + [f"warps={tile.num_warps}", f"stages={tile.num_stages}"]
    if tile.backend == "hopper":
        words = ["hopper", *words, f"registers={tile.max_registers or 'free'}"]
    return " ".join(words)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _distinct(tiles: list[Tile]) -> list[Tile]:
    found: dict[str, Tile] = {}
    for tile in tiles:
        found.setdefault(label(tile), tile)
    return list(found.values())


def _tile(op: str, choice: Choice) -> Tile:
    blocks = {name: value for name, value in choice.items() if name not in ("num_warps", "num_stages")}
    return Tile(op=op, archs=(), blocks=blocks, num_warps=choice["num_warps"], num_stages=choice["num_stages"])


def _on_hopper(case: Case, arch: int) -> Iterator[Tile]:
    """The table's rows of kernels for Hopper that fit the case, with other limits of registers and other constants."""
    rows = (row for row in TABLE if row.op == case.op and row.backend == "hopper" and arch in row.archs and row.fits(*case.question()))
    for row in rows:
        knobs = {name: values for name, values in _HOPPER_KNOBS.items() if name in row.blocks}
        for registers, choice in itertools.product((row.max_registers, *_MOST_REGISTERS), _combinations(**knobs)):
            yield replace(row, blocks={**row.blocks, **choice}, max_registers=registers, programs_per_sm=1, allowed_spills=0)


def _by_others(case: Case) -> list[Tile]:
    """Backends: of attention as a whole, and torch's operators for what they can do alone."""
    if case.op == "attention":
        backends = ("triton", "cudnn", "flash", *(["xformers"] if xformers_attention.is_installed() else []))
        return [Tile(op=case.op, archs=(), backend=backend) for backend in backends]
    return [] if case.op.startswith("attention") else [Tile(op=case.op, archs=(), backend="torch")]


def _combinations(**values: tuple[int, ...]) -> Iterator[Choice]:
    return (dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values()))


def key_chunks(tokens: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Powers of two that hold the longest row of a class, of which only the last may reach beyond the shortest, the greatest first."""
    low, high = tokens
    sizes = (0, 16, 32, 64, 128, 256)
    for first, second, third in itertools.product(sizes, repeat=3):
        whole = first if not second else first + second if third else first
        ordered = first >= second >= third and first > 0
        if ordered and first + second + third >= high and (not second or whole < low):
            yield first, second, third


def _short_forward(case: Case, arch: int) -> Iterator[Choice]:
    block_d = _power_of_two(case.features)
    # Of keys, what holds the longest row with at most one more chunk of 64.
    for keys in (keys for keys in key_chunks(case.tokens) if sum(keys) < case.tokens[1] + 64):
        for choice in _combinations(BLOCK_M=(32, 64, 128), num_warps=(4, 8), num_stages=(1,)):
            yield {
                "BLOCK_D": block_d,
                "BLOCK_M": choice["BLOCK_M"],
                **dict(zip(("KEYS_0", "KEYS_1", "KEYS_2"), keys, strict=True)),
            } | choice


def _short_backward(case: Case, arch: int) -> Iterator[Choice]:
    fixed = {"BLOCK_D": _power_of_two(case.features), "BLOCK_M": _power_of_two(case.tokens[1])}
    for choice in _combinations(BLOCK_N=(16, 32, 64, 128), num_warps=(4, 8, 16), num_stages=(1, 2, 3)):
        if choice["BLOCK_N"] <= fixed["BLOCK_M"]:
            yield fixed | choice


def _long_forward(case: Case, arch: int) -> Iterator[Choice]:
    block_d = _power_of_two(case.features)
    for choice in _combinations(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)):
        if choice["BLOCK_M"] * (choice["BLOCK_N"] + block_d) <= 32 * choice["num_warps"] * MOST_ACCUMULATORS:
            yield {"BLOCK_D": block_d} | choice


def _long_backward(case: Case, arch: int) -> Iterator[Choice]:
    block_d = _power_of_two(case.features)
    for choice in _combinations(BLOCK=(64, 128), STEP=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)):
        block, step = choice.pop("BLOCK"), choice.pop("STEP")
        if block * (step + 2 * block_d) <= 32 * choice["num_warps"] * 2 * MOST_ACCUMULATORS:
            yield {"BLOCK_D": block_d, "BLOCK_M": block, "BLOCK_N": step, "KEYS_M": step, "KEYS_N": block} | choice


def _linear(case: Case, arch: int) -> Iterator[Choice]:
    shapes = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128))
    for (block_m, block_n), choice in itertools.product(shapes, _combinations(BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(3, 4))):
        accumulators = block_m * block_n // (32 * choice["num_warps"])
        shared = (block_m + block_n) * choice["BLOCK_K"] * 2 * choice["num_stages"]
        if 16 < accumulators <= MOST_ACCUMULATORS and shared <= SHARED_BYTES[arch]:
            parts = 4 if block_m * block_n >= 128 * 128 else 2
            yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": choice["BLOCK_K"], "GROUP_M": 8, "EPILOGUE_SUBTILES": parts} | choice


def _norm_forward(case: Case, arch: int) -> Iterator[Choice]:
    for choice in _combinations(ROWS=(1, 2, 4, 8, 16), num_warps=(1, 2, 4, 8), num_stages=(1,)):
        if 8 <= choice["ROWS"] * case.features // (32 * choice["num_warps"]) <= 64:
            yield choice


def _norm_backward(case: Case, arch: int) -> Iterator[Choice]:
    for choice in _combinations(ROWS=(1, 2, 4, 8), PROGRAMS=(2, 3, 4, 6), STAGES=(2,), num_warps=(4, 8, 16), num_stages=(1,)):
        if 4 <= choice["ROWS"] * case.features // (32 * choice["num_warps"]) <= 16 and choice["PROGRAMS"] * choice["num_warps"] <= 32:
            yield choice | {"PROGRAMS": choice["PROGRAMS"] * PROCESSORS[arch]}


def _update(case: Case, arch: int) -> Iterator[Choice]:
    return _combinations(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8), num_stages=(1,))


def _patch_forward(case: Case, arch: int) -> Iterator[Choice]:
    for choice in _combinations(BLOCK_M=(64, 128), BLOCK_N=(64, 128, 256), BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(2, 3, 4)):
        if 32 <= choice["BLOCK_M"] * choice["BLOCK_N"] // (32 * choice["num_warps"]) <= MOST_ACCUMULATORS:
            yield choice


def _patch_backward(case: Case, arch: int) -> Iterator[Choice]:
    return _combinations(BLOCK_M=(8, 16, 32, 64), BLOCK_K=(128, 256, 512), num_warps=(4, 8), num_stages=(1,))


_SPACES: Mapping[str, Callable[[Case, int], Iterator[Choice]]] = {
    "attention_short_forward": _short_forward,
    "attention_short_backward": _short_backward,
    "attention_long_forward": _long_forward,
    "attention_long_backward": _long_backward,
    "linear_gelu_forward": _linear,
    "linear_add_forward": _linear,
    "dgelu_backward": _linear,
    "layer_norm_forward": _norm_forward,
    "layer_norm_backward": _norm_backward,
    "sgd_update": _update,
    "adamw_update": _update,
    "patch_embed_forward": _patch_forward,
    "patch_embed_backward": _patch_backward,
}
_MOST_REGISTERS = (None, 128, 168, 200)
_HOPPER_KNOBS = {"REGISTERS": (152, 160, 168), "STAGES": (2, 3, 4), "BLOCK_N": (64, 128, 256)}
"""What the kernels cannot be compiled with is refused then."""
_MINOR = {"GROUP_M": (4, 8, 16), "EPILOGUE_SUBTILES": (1, 2, 4), "STAGES": (1, 2, 3)}
