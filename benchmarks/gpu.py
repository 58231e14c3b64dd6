"""Everything that needs a GPU by one command, stage after stage: tests, the demo, kernels and whole steps against their peers, a profile.

    python benchmarks/gpu.py --out DIR                      all but hopper and tuning, in nine minutes at most
    python benchmarks/gpu.py --out DIR --only steps demo    these stages; hopper and tuning run only so
    python benchmarks/gpu.py --plan                         what would run, and for how long at most
    python benchmarks/gpu.py --out DIR --small              small sizes on the CPU's path, to see that it works

DIR gets STAGE.jsonl (a line for each candidate as soon as its group is measured), pytest-benchmark's STAGE.json, profile.txt, the demo's
run folder, logs/ and summary.txt, which is written anew after each stage. A stage that fails or takes too long does not stop the others.
Tuning rewrites the tile table's file of this GPU. Status 0 when all went well, 1 when something failed or was cut, 2 without a GPU or a
package that all need.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

try:
    import machine
    from harness import format_rows, read_rows

    from polyvit_kernels.aot import commands
except ModuleNotFoundError as error:
    print(f"{error.name} is needed and not installed", file=sys.stderr)
    sys.exit(2)

HERE, TESTS = machine.ROOT / "benchmarks", machine.ROOT / "tests"
KERNELS = ("attention", "linear", "mlp", "layer_norm", "update", "patch_embed", "cross_entropy")
ONLY_NAMED = ("hopper", "tuning")
GRACE_SECONDS = 15  # between an interrupt, after which pytest writes what it has, and the end
SHOWN_LINES = 60


class Stage(NamedTuple):
    """A command for Python, and the seconds that it may take. `--only` knows it by its name up to a hyphen."""

    name: str
    seconds: float
    arguments: Sequence[str]


def list_stages(out: Path, *, is_small: bool) -> list[Stage]:
    """All stages in the order in which they run: what matters most comes first, what compiles other libraries later."""
    marked = [path for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    of_kernels = [path for path in marked if path.is_relative_to(TESTS / "kernels")]
    rest = [path for path in sorted((TESTS / "kernels").rglob("test_*.py")) if path.parent.name not in ("aot", "tiles")]
    tests = [
        ("tests", of_kernels, "gpu"),
        ("tests-training", sorted({*marked} - {*of_kernels}), "gpu"),
        ("tests-rest", rest, "not gpu and not long"),
    ]
    if is_small:
        tests = [("tests", [TESTS / "kernels" / "test_bounds.py"], "not gpu")]
    demo = ("smoke",) if is_small else ("demo", "--device", "cuda", "--precision", "bf16")
    small = ("--small",) if is_small else ()
    return [
        *(Stage(name, 100, _test(files, marks)) for name, files, marks in tests[:1]),
        Stage("hopper", 400, _bench(out, "hopper", ("attention", "linear", "step"), is_small, "not nine and not ViT-Ti")),
        Stage("kernels", 60, _bench(out, "kernels", KERNELS, is_small, "not compile")),
        Stage("steps", 100, _bench(out, "steps", ("step",), is_small, "not compile and not reduce")),
        Stage("demo", 100, ("-m", "polyvit_fast", "train", *demo, "--out", str(out / "demo"))),
        *(Stage(name, 100, _test(files, marks)) for name, files, marks in tests[1:]),
        Stage("profile", 30, (str(HERE / "step_profile.py"), "--out", str(out / "profile.txt"), *small)),
        Stage("loop", 60, _bench(out, "loop", ("train",), is_small, "")),
        Stage("compiled", 240, _bench(out, "compiled", ("step", *KERNELS), is_small, "ours or compile or reduce")),
        Stage("tuning", 400, (str(HERE / "tune.py"), *((*small, "--ops", "update") if is_small else ()))),
    ]


def _test(files: Sequence[Path], marks: str) -> tuple[str, ...]:
    """Tests of kernels go without tests/conftest.py, which needs all that training needs."""
    alone = ("-o", "addopts=--import-mode=importlib --strict-markers", f"--confcutdir={TESTS / 'kernels'}")
    workers = ("-n", str(min(8, len(os.sched_getaffinity(0))))) if machine.is_installed("xdist") else ()
    options = (*(alone if files[0].is_relative_to(TESTS / "kernels") else ()), "-m", marks, *workers)
    return ("-m", "pytest", "-q", "-p", "no:benchmark", "-W", "default", "--continue-on-collection-errors", *options, *map(str, files))


def _bench(out: Path, name: str, subjects: Sequence[str], is_small: bool, chosen: str) -> tuple[str, ...]:
    files = [str(HERE / f"bench_{subject}.py") for subject in subjects]
    sizes = ("--tiny", "--rounds=1", "--calls=1") if is_small else ("--rounds=5", "--calls=6")
    writes = ("--rows", str(out / f"{name}.jsonl"), f"--benchmark-json={out / name}.json")
    return ("-m", "pytest", "-q", "-rs", "-W", "default", *files, *sizes, *writes, *(("-k", chosen) if chosen else ()))


def run(stage: Stage, seconds: float, logs: Path, *, is_small: bool) -> str:
    """Run a stage for so long at most; what went wrong, if anything did."""
    paths = [str(machine.ROOT), str(machine.ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    if is_small:
        variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if stage.name == "demo":  # where a kernel uses a wrong address, `cuda-gdb -ex "target cudacore FILE"` names it
        variables |= {"CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "1", "CUDA_ENABLE_LIGHTWEIGHT_COREDUMP": "1"}
        variables |= {"CUDA_COREDUMP_FILE": str(logs / "demo.%p.cudacore")}
    command, to = [sys.executable, *stage.arguments], {"stderr": subprocess.STDOUT, "cwd": machine.ROOT, "process_group": 0}
    with (logs / f"{stage.name}.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, env=os.environ | variables, **to)
    try:
        status = process.wait(seconds)
        return f"status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"cut after {seconds:.0f} seconds"
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(GRACE_SECONDS)


def summarize(out: Path, ended: dict[str, str]) -> str:
    """How each stage ended, and its rows or the end of its log."""
    lines = [f"{machine.find_name()}, {machine.find_versions()}"]
    for name, words in ended.items():
        log = path.read_text(errors="replace").splitlines() if (path := out / "logs" / f"{name}.txt").exists() else []
        shown = SHOWN_LINES if name in ("demo", "profile", "tuning") else 1
        lines += ["", f"{name}: {words}", *log[-shown:], format_rows(read_rows(out / f"{name}.jsonl"))]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command; gives its status."""
    parser = commands.parser(__doc__)
    parser.add_argument("--out", type=Path, help="folder for what is measured; it is made where there is none")
    parser.add_argument("--minutes", type=float, default=9, help="stop after this many minutes, all stages together")
    parser.add_argument("--only", nargs="+", default=(), metavar="STAGE", help="run only these stages")
    parser.add_argument("--plan", action="store_true", help="print the stages and the most seconds of each, and end")
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU's path, each stage as long as it takes")
    args = parser.parse_args()
    out = (args.out or Path("DIR")).resolve()
    stages = {stage: stage.name.partition("-")[0] for stage in list_stages(out, is_small=args.small)}
    if unknown := {*args.only} - {*stages.values()}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is no stage; there are: {', '.join(dict.fromkeys(stages.values()))}")
    chosen = [stage for stage, word in stages.items() if (word in args.only if args.only else word not in ONLY_NAMED)]
    if args.plan:
        print("\n".join(f"{stage.name:14} {stage.seconds:4} s  {' '.join(stage.arguments)}" for stage in chosen))
        return 0
    if not machine.HAS_GPU and not args.small:
        print("there is no CUDA GPU here (--small runs every stage on the CPU's path)", file=sys.stderr)
        return 2
    if not args.out:
        parser.error("--out is needed")
    commands.make_folder(parser, "--out", out / "logs")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end, ended = time.monotonic() + 60 * args.minutes - GRACE_SECONDS, dict.fromkeys((stage.name for stage in chosen), "not begun")
    try:
        for stage in chosen:
            started, ended[stage.name] = time.monotonic(), "no time was left"
            if end > started:
                ended[stage.name] = "interrupted"
                seconds = end - started if args.small else min(end - started, stage.seconds)
                fault = run(stage, seconds, out / "logs", is_small=args.small)
                ended[stage.name] = f"{time.monotonic() - started:.0f} s{f', NOT WELL: {fault}' if fault else ''}"
            print(f"{stage.name}: {ended[stage.name]}", flush=True)
            (out / "summary.txt").write_text(summarize(out, ended))
    finally:
        (out / "summary.txt").write_text(summarize(out, ended))
        print((out / "summary.txt").read_text(), end="")
    return int(any("NOT WELL" in words or "no time" in words for words in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
