"""What is built for the tests of the ahead-of-time compilation, in processes without Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels" / "csrc"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-O3")


def run_python(*arguments, **variables):
    """A fresh interpreter in which Triton compiles."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=ROOT / "kernels")


def run_aot(*arguments, **variables):
    return run_python("-m", "polyvit_kernels.aot", *arguments, **variables)


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
