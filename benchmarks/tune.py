"""Time candidates for rows of the tile table on the GPU at hand, and write the fastest where the table reads them.

    python benchmarks/tune.py                           all operations
    python benchmarks/tune.py --ops attention mlp       these only; rows of others stay
    python benchmarks/tune.py --seconds 60 --dry-run    print what would be chosen, write nothing

A candidate is the row in use, or one that differs from it by the blocks in `SPACES`. It is refused when it cannot be launched, when it is
further from the truth than twice PyTorch's own error, and when the fastest would break the budget of registers and spills. The others are
timed by triton.testing.do_bench. The row in use stays when it is within 1% of the best. After each case two files are written:
kernels/polyvit_kernels/tiles/measured/<gpu>.json, the rows, and benchmarks/results/<gpu>/tuning.json, all times. Status 2 without a GPU.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from compare import assert_within_rule
from harness import Inputs, format_error, time_on_host
from launchers import INTERPRETED_ARCH, KERNELS, Kernel, find_attention_row, find_row
from machine import DEVICE, HAS_GPU
from triton.testing import do_bench

from polyvit_fast import strict_json
from polyvit_kernels import tiles
from polyvit_kernels.aot import commands
from polyvit_kernels.ops.attention import xformers
from polyvit_kernels.tiles import ANY, Tile, dump_rows, load_rows

MEASURED = machine.ROOT / "kernels" / "polyvit_kernels" / "tiles" / "measured"
RESULTS = machine.ROOT / "benchmarks" / "results"
SECONDS = 300
GAIN = 0.01
"""By how much a candidate must be faster to replace the row in use."""
WARM_UP_MS, MEASURED_MS = 5, 30
NO_GPU = 2


@dataclass(frozen=True, kw_only=True)
class TileCase:
    """Calls of `op` with so many tokens and at most so many features: they get one row, which a call of the size `size` stands for.

    Of a size, the first number is how much there is (examples, rows), the others are the shape. A candidate is checked on `checked` of
    the first. `small` is for Triton's interpreter.
    """

    op: str
    size: tuple[int, ...]
    small: tuple[int, ...]
    checked: int = 2
    tokens: tuple[int, int] = (1, ANY)
    features: int = ANY

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.op} {'×'.join(map(str, self.size))}"

    def question(self) -> tuple[int, int]:
        """The tokens and features that `size` asks the table with."""
        if self.op.startswith("attention"):
            return self.size[1], self.size[3]
        if self.op.startswith(("linear", "dgelu")):
            return self.size[0], self.size[1]
        return 1, self.size[1] if self.op.startswith("layer_norm") else 1

    def dtypes(self) -> tuple[str, ...]:
        """bf16 is measured and fp16 is as fast; updates are of fp32."""
        return ("fp32",) if self.op.endswith("_update") else ("bf16", "fp16")

    def row_in_use(self) -> Tile:
        """Where a short attention has none, that of the long kernel."""
        tokens, features = self.question()
        if self.op.startswith("attention_"):
            row = find_attention_row(self.op.rpartition("_")[2], tokens, features)
            return row if row.op == self.op else find_row(self.op, tokens, features)
        return find_row(self.op, tokens, features)


def attention_cases(op: str, *lengths: tuple[tuple[int, int], tuple[int, int]]) -> tuple[TileCase, ...]:
    """Of 12 heads of 64, for (range of tokens, (examples, tokens))."""
    return tuple(
        TileCase(op=op, tokens=tokens, features=64, size=(*size, 12, 64), small=(1, size[1] if size[1] <= 256 else 40, 1, 16))
        for tokens, size in lengths
    )


# ViT-B/32 and B/16 on images, 8 s and 25 s of sound, 32 frames.
SHORT = (((1, 64), (512, 50)), ((193, 208), (128, 197)), ((209, 256), (100, 256)))
MEDIUM = ((129, 256), (128, 197))
LONG = (((257, 800), (64, 401)), ((801, 2000), (32, 1212)), ((2001, ANY), (8, 3137)))
LINEAR: dict[str, Any] = {"small": (20, 32, 48), "checked": 1_500}
MANY_ROWS: dict[str, Any] = {"tokens": (1025, ANY), **LINEAR}

CASES: Mapping[str, tuple[TileCase, ...]] = {
    "attention": (
        *attention_cases("attention_short_forward", *SHORT),
        *attention_cases("attention_short_backward", SHORT[0]),
        *attention_cases("attention_long_forward", *LONG),
        *attention_cases("attention_long_backward", MEDIUM, *LONG),
        *attention_cases("attention", ((1, 256), (128, 197)), *LONG),
    ),
    "mlp": (
        TileCase(op="linear_gelu_forward", size=(25_216, 768, 3072), **MANY_ROWS),
        TileCase(op="dgelu_backward", size=(25_216, 768, 3072), **MANY_ROWS),
        TileCase(op="linear_add_forward", size=(25_216, 3072, 768), **MANY_ROWS),
        TileCase(op="linear_add_forward", features=1536, size=(25_216, 768, 768), **MANY_ROWS),
        TileCase(op="linear_gelu_forward", tokens=(1, 1024), size=(788, 768, 3072), **LINEAR),
        TileCase(op="linear_add_forward", tokens=(1, 1024), size=(788, 3072, 768), **LINEAR),
    ),
    "layer_norm": tuple(
        TileCase(op=f"layer_norm_{direction}", features=features, size=(50_432, dim), small=(9, dim // 16), checked=3_001)
        for features, dim in ((1024, 768), (512, 384), (256, 192))
        for direction in ("forward", "backward")
    ),
    "update": tuple(TileCase(op=f"{name}_update", size=(86_567_656,), small=(3_000,), checked=1_000_003) for name in ("adamw", "sgd")),
    "patch_embed": tuple(
        TileCase(op=f"patch_embed_{direction}", size=(256, 1, 224, 1, 768), small=(2, 1, 32, 1, 48))
        for direction in ("forward", "backward")
    ),
}

Choice = dict[str, int]
"""Blocks, or num_warps, num_stages and max_registers, by name."""


def combine(**values: tuple[int, ...]) -> tuple[Choice, ...]:
    """Every combination of the values."""
    return tuple(dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values()))


def pair(names: tuple[str, ...], *values: tuple[int, ...]) -> tuple[Choice, ...]:
    """Values that go together."""
    return tuple(dict(zip(names, each, strict=True)) for each in values)


def cross(*spaces: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Every choice of the first with every one of the others."""
    return tuple({name: value for choice in choices for name, value in choice.items()} for choices in itertools.product(*spaces))


LINEAR_BLOCKS = cross(
    pair(("BLOCK_M", "BLOCK_N", "num_warps"), (64, 64, 4), (64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)),
    combine(BLOCK_K=(32, 64), num_stages=(3, 4)),
)
SPACES: Mapping[str, tuple[Choice, ...]] = {
    "attention_short_forward": cross(
        pair(("KEYS_0", "KEYS_1", "KEYS_2"), (64, 0, 0), (128, 64, 0), (128, 64, 16), (128, 128, 0), (256, 0, 0)),
        combine(BLOCK_M=(32, 64, 128), num_warps=(4, 8)),
    ),
    "attention_short_backward": combine(BLOCK_N=(16, 32, 64), num_warps=(4, 8), num_stages=(1, 2)),
    "attention_long_forward": combine(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)),
    "attention_long_backward": cross(
        pair(("BLOCK_M", "BLOCK_N", "KEYS_M", "KEYS_N"), (64, 32, 32, 64), (64, 64, 64, 64), (128, 32, 32, 128), (128, 64, 64, 128)),
        combine(num_warps=(4, 8), num_stages=(1, 2, 3)),
    ),
    "linear_gelu_forward": LINEAR_BLOCKS,
    "linear_add_forward": LINEAR_BLOCKS,
    "dgelu_backward": LINEAR_BLOCKS,
    "layer_norm_forward": combine(ROWS=(1, 2, 4, 8, 16), num_warps=(2, 4, 8)),
    "layer_norm_backward": combine(ROWS=(1, 2, 4), programs_per_sm=(2, 3, 4), num_warps=(4, 8)),
    "adamw_update": combine(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8)),
    "sgd_update": combine(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8)),
    "patch_embed_forward": combine(BLOCK_M=(64, 128), BLOCK_N=(64, 128, 256), BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(2, 3)),
    "patch_embed_backward": combine(BLOCK_M=(8, 16, 32, 64), BLOCK_K=(128, 256, 512), num_warps=(4, 8)),
}
"""What is tried of our portable kernels."""
HOPPER_SPACE = combine(STAGES=(2, 3, 4), BLOCK_N=(64, 128, 256), max_registers=(0, 168))
"""What is tried of the kernels for Hopper, as far as a row has such a block; 0 registers are as many as the compiler likes."""


def list_candidates(case: TileCase) -> list[Tile]:
    """The row in use first, then others of the table that fit, and the first kernel among them with the blocks of its space.

    Where the table chooses between our attention and libraries, these are the candidates.
    """
    rows = [case.row_in_use()]
    if case.op == "attention":
        backends = ("triton", "cudnn", "flash", *(["xformers"] if xformers.is_installed() else []))
        rows += [Tile(op=case.op, archs=(), backend=backend) for backend in (backends if HAS_GPU else backends[:1])]
    else:
        arch = tiles.architecture(DEVICE) if HAS_GPU else INTERPRETED_ARCH
        dtype = next(dtype for dtype, name in tiles.DTYPES.items() if name == case.dtypes()[0])
        rows += [row for row in tiles.rows(case.op, arch, dtype) if row.fits(*case.question())]
        rows = [row for row in rows if row.backend == "triton" or (HAS_GPU and row.backend in tiles.PACKAGES)]
        rows += [vary(row, choice) for row in rows[:1] for choice in (HOPPER_SPACE if row.backend == "hopper" else SPACES[row.op])]
    distinct: dict[str, Tile] = {}
    for row in rows:
        distinct.setdefault(label(row), row)
    return list(distinct.values())


def vary(row: Tile, choice: Choice) -> Tile:
    """The row with other values of what it has."""
    blocks = dict(row.blocks) | {name: value for name, value in choice.items() if name in row.blocks}
    options: dict[str, Any] = {
        name: value or None for name, value in choice.items() if name in ("num_warps", "num_stages", "max_registers")
    }
    if "programs_per_sm" in choice:
        num_sms = tiles.num_sms(DEVICE) if HAS_GPU else 1
        blocks["PROGRAMS"] = choice["programs_per_sm"] * num_sms
        options["programs_per_sm"] = choice["programs_per_sm"]
    return replace(row, blocks=blocks, **options)


def label(tile: Tile) -> str:
    """What a row runs, in one line."""
    if tile.op == "attention" or tile.backend not in tiles.PACKAGES:
        return tile.backend
    words = [f"{name}={value}" for name, value in tile.blocks.items()] + [f"warps={tile.num_warps}", f"stages={tile.num_stages}"]
    return " ".join([tile.op, tile.backend, *words, f"registers={tile.max_registers or 'free'}"])


@dataclass(kw_only=True)
class TuningOutcome:
    """Of a case: the row in use, the one chosen (none where no candidate was right), microseconds and reasons of refusal by label."""

    case: TileCase
    old: Tile
    new: Tile | None = None
    us: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Old against new in one line."""
        old = self.us.get(label(self.old))
        counts = f"{len(self.us)} timed, {len(self.refused)} refused"
        if self.new is None:
            return f"{self.case.title}: no candidate is right; {counts}, the first: {next(iter(self.refused.values()), '')}"
        before = f"{label(self.old)} {'refused' if old is None else f'{old:.1f} us'}"
        if label(self.new) == label(self.old):
            return f"{self.case.title}: stays {before}; {counts}"
        return f"{self.case.title}: {before} → {label(self.new)} {self.us[label(self.new)]:.1f} us; {counts}"


def decide(case: TileCase, *, is_small: bool = False, most_candidates: int | None = None) -> TuningOutcome:
    """Check the candidates of a case, time those that are right, choose the fastest that keeps to the budget."""
    kernel, dtype = KERNELS[case.op], torch.float32 if is_small or case.op.endswith("_update") else torch.bfloat16
    outcome = TuningOutcome(case=case, old=case.row_in_use())
    rows = list_candidates(case)[:most_candidates]
    for size in checked_sizes(case, is_small=is_small):
        right = [row for row in rows if label(row) not in outcome.refused]
        outcome.refused |= find_faults(kernel, kernel.inputs(size, dtype), right, dtype)
    inputs = kernel.inputs(case.small if is_small else case.size, dtype)
    for row in rows:
        if label(row) not in outcome.refused:
            outcome.us[label(row)] = 1e6 * measure(lambda row=row: kernel.launch(inputs, row))
    for name in rank(outcome.us, label(outcome.old)):
        row = next(row for row in rows if label(row) == name)
        excesses = [] if is_small or name == label(outcome.old) else list_excesses(row, case.dtypes()[0])
        if not excesses:
            outcome.new = row
            break
        outcome.refused[name] = excesses[0]
    return outcome


def checked_sizes(case: TileCase, *, is_small: bool) -> Iterator[tuple[int, ...]]:
    """A part of the case's size, and for attention the fewest and the most tokens of its range."""
    size = case.small if is_small else (min(case.checked, case.size[0]), *case.size[1:])
    yield size
    if case.op.startswith("attention") and not is_small:
        for tokens in {limit for limit in case.tokens if 1 < limit < ANY} - {size[1]}:
            yield (size[0], tokens, *size[2:])


def copy(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def find_faults(kernel: Kernel, inputs: Inputs, rows: Sequence[Tile], dtype: torch.dtype) -> dict[str, str]:
    """Why candidates are wrong, by label. Raises RuntimeError when one has broken the CUDA context of this process."""
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    expected, faults = [kernel.plain(copy(inputs)), kernel.true(exact)], {}
    for row in rows:
        try:
            found = kernel.launch(copy(inputs), row)
            named = [{f"result {index}": tensor for index, tensor in enumerate(results)} for results in (found, *expected)]
            assert_within_rule(*named, dtype)
        except Exception as error:
            faults[label(row)] = format_error(error)
            if HAS_GPU:
                torch.cuda.synchronize()
    return faults


def measure(run) -> float:
    """The median of a call's seconds."""
    if HAS_GPU:
        return do_bench(run, warmup=WARM_UP_MS, rep=MEASURED_MS, return_mode="median") / 1e3
    return median(time_on_host(run, 2))


def rank(us: Mapping[str, float], in_use: str) -> list[str]:
    """Labels from fast to slow; the one in use comes first when it is within `GAIN` of the fastest."""
    ranking = sorted(us, key=lambda name: us[name])
    if in_use in us and us[in_use] <= (1 + GAIN) * us[ranking[0]]:
        ranking = [in_use, *(name for name in ranking if name != in_use)]
    return ranking


def list_excesses(row: Tile, dtype: str) -> list[str]:
    """What is beyond the budget of registers and spills in any kernel that the row stands for."""
    from polyvit_kernels.aot.compile import compile_kernel
    from polyvit_kernels.aot.jobs import variants

    return [excess for variant in variants(row, dtype) for excess in compile_kernel(variant, tiles.architecture(DEVICE)).excesses()]


def write(outcome: TuningOutcome, measured: Path, results: Path, arch: int) -> None:
    """Put an outcome into both files: its row in front of the others, instead of an earlier one for the same calls."""
    case, row = outcome.case, outcome.new
    results.parent.mkdir(parents=True, exist_ok=True)
    if row and row.op == case.op:
        source = f"{results.parent.name}/{results.name}"
        new = replace(row, archs=(arch,), tokens=case.tokens, features=case.features, dtypes=case.dtypes(), source=source)
        earlier = load_rows(measured) if measured.exists() else ()
        kept = [old for old in earlier if (old.op, old.archs, old.tokens, old.features) != (new.op, new.archs, new.tokens, new.features)]
        dump_rows((new, *kept), measured)
    found = {
        "op": case.op,
        "size": list(case.size),
        "in_use": label(outcome.old),
        "chosen": row and label(row),
        "us": outcome.us,
        "refused": outcome.refused,
        "clocks": machine.read_clocks(),
    }
    earlier = json.loads(results.read_text())["cases"] if results.exists() else []
    cases = [*(old for old in earlier if (old["op"], old["size"]) != (found["op"], found["size"])), found]
    text = strict_json.dumps({"device": machine.find_name(), "versions": machine.find_versions(), "cases": cases}, indent=1)
    results.write_text(text + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its status."""
    parser = commands.parser(__doc__)
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES), help="what to tune")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start no new case after this many seconds")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--small", action="store_true", help="three candidates of tiny cases in Triton's interpreter, on a CPU")
    parser.add_argument("--measured", type=Path, help="file for the rows, instead of the table's own")
    parser.add_argument("--results", type=Path, help="file for the times, instead of that under benchmarks/results")
    args = parser.parse_args(arguments)
    if not HAS_GPU and not args.small:
        print("there is no CUDA GPU here, so there is nothing to tune (--small tries the tuner itself on a CPU)", file=sys.stderr)
        return NO_GPU
    if args.small and "TRITON_INTERPRET" not in os.environ:  # Triton reads it when it is imported
        return subprocess.call([sys.executable, *sys.argv], env=os.environ | {"TRITON_INTERPRET": "1"})
    arch = INTERPRETED_ARCH if args.small else tiles.architecture(DEVICE)
    name = machine.find_name()
    measured = args.measured or (None if args.small else MEASURED / f"{machine.shorten(name)}.json")
    results = args.results or (None if args.small else RESULTS / machine.slugify(name) / "tuning.json")
    end = time.monotonic() + args.seconds
    for case in (case for family in args.ops for case in CASES[family]):
        if time.monotonic() >= end:
            print(f"{case.title}: no time was left", flush=True)
            continue
        outcome = decide(case, is_small=args.small, most_candidates=3 if args.small else None)
        print(outcome.describe(), flush=True)
        if measured and results and not args.dry_run:
            write(outcome, measured, results, arch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
