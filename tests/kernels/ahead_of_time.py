"""What is built for the tests of the ahead-of-time compilation, in processes without Triton's interpreter."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from polyvit_kernels.tiles import Tile, dump_rows, pick

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels" / "csrc"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-O3")


def run_python(*arguments, **variables):
    """A fresh interpreter in which Triton compiles."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=ROOT / "kernels")


def compile_c(output, *arguments):
    done = subprocess.run(["gcc", "-std=c11", *WARNINGS, "-o", str(output), *map(str, arguments)], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def build_library(table: Path) -> Path:
    """The library, its programs and the driver of the tests, in the folder of the table that `aot` wrote."""
    flags = ("-fPIC", "-shared", "-fvisibility=hidden", "-DPOLYVIT_KERNELS_BUILD", f"-I{SOURCES}", f"-I{table}")
    library = table / "libpolyvit_kernels.so"
    sources = [SOURCES / name for name in ("polyvit_kernels.c", "polyvit_attention.c", "polyvit_cubins.S")]
    compile_c(library, *flags, *sources, table / "polyvit_table.c", "-Wl,--no-undefined", "-ldl", "-lpthread", "-lm")
    for name in ("test_lookup", "example_attention"):
        compile_c(table / name, f"-I{SOURCES}", SOURCES / f"{name}.c", library, f"-Wl,-rpath,{table}", "-ldl", "-lm")
    driver = Path(__file__).with_name("recording_driver.c")
    (table / "driver").mkdir(exist_ok=True)
    compile_c(table / "driver" / "libcuda.so.1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", driver)
    return library


def compile_table(folder: Path, rows: tuple[Tile, ...], archs: tuple[int, ...]) -> None:
    """What the ahead-of-time compilation writes for bf16 and a table of these rows, which is kept as `rows.json`.

    Its list of kernels is kept as `table.json`, what it prints as `stdout` and `stderr`.
    """
    dump_rows(rows, folder / "rows.json")
    options = ("--arch", *archs, "--dtype", "bf16", "--out", folder, "--json", folder / "table.json")
    done = run_python("-c", COMPILE_ROWS, folder / "rows.json", *options)
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)


COMPILE_ROWS = """
import sys
from pathlib import Path
from polyvit_kernels.aot import c_table, main
from polyvit_kernels.tiles import load_rows, lookup
lookup.TABLE = main.TABLE = c_table.TABLE = load_rows(Path(sys.argv.pop(1)))
main.main()
"""


FEW = {
    80: (("attention_short_forward", 50, 64), ("dgelu_backward", 64, 768)),
    90: (
        ("attention_short_forward", 50, 64),
        ("attention_short_forward", 197, 64),
        ("attention_short_backward", 50, 64),
        ("attention_long_backward", 197, 64),
        ("linear_gelu_forward", 64, 768),
    ),
    100: (("attention_long_forward", 270, 64), ("attention_long_backward", 270, 64)),
    120: (("attention_short_forward", 50, 64), ("attention_short_backward", 50, 64), ("linear_add_forward", 64, 768)),
}
"""(op, tokens, features) of a few rows for each GPU: every kernel of attention and of the linear layers is among them."""


def choose_few_rows() -> tuple[Tile, ...]:
    """The portable rows of `FEW` on their own GPU and on those `FEW` lacks, one of Hopper's kernels, and one that chooses a backend."""
    hoppers = pick("dgelu_backward", 90, torch.bfloat16, tokens=4096, features=768)
    choice = pick("attention", 90, torch.bfloat16, tokens=270, features=64)
    chosen = [hoppers, choice]
    for arch, questions in FEW.items():
        for op, tokens, features in questions:
            row = pick(op, arch, torch.bfloat16, tokens=tokens, features=features, portable=True)
            chosen.append(replace(row, archs=tuple(other for other in row.archs if other == arch or other not in FEW)))
    return tuple(sorted(chosen, key=lambda row: row.features))
