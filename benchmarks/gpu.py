"""Everything that needs a GPU, by one command with tables at its end: tests, tuning, kernels and whole steps against peers, a profile.

    python benchmarks/gpu.py --out DIR                    in nine minutes at most
    python benchmarks/gpu.py --out DIR --only step train  these parts alone, which then have more time
    python benchmarks/gpu.py --out DIR --minutes 5 --skip-tuning
    python benchmarks/gpu.py --out DIR --small            every part on the CPU's path, to see that it works

Needed are torch, triton, jaxtyping, einops, safetensors, pytest and pytest-benchmark, with which the kernels' parts run; whole steps and
the other tests need numpy, Pillow and tyro too; the training loop rich, tensorboard and torchmetrics; tests of data nvidia-dali, av,
soundfile and hypothesis. This checkout itself need not be installed. A part that lacks a package is left out and says so, one that fails or
has used up its time is named, and the others run. DIR gets summary.txt (what is printed), benchmarks.json (every time of every call),
profile.txt (the kernels of a step), tuning.json, tile_table.py (with the rows that tuning chose, as in the checkout) and log.txt. Tuning
rewrites the checkout's kernels/polyvit_kernels/tile_table.py and benchmarks/results/<card>/tuning.json. Status 0 when all parts ended well
or were left out, 1 when one did not, 2 without a GPU or one of the seven packages that are needed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

# Before anything that imports them: a sentence tells more than the traceback of the first that is not there.
if lacking := [
    name for name in ("torch", "triton", "jaxtyping", "einops", "safetensors", "pytest", "pytest_benchmark") if not find_spec(name)
]:
    print(f"these packages are needed and not installed: {', '.join(lacking)}", file=sys.stderr)
    sys.exit(2)

import card
from tables import Measurement, sections
from tune import NOBODY_HERE, RESULTS, TABLE_PATH

from polyvit_kernels import commands

FOLDERS = (card.ROOT, card.ROOT / "kernels", card.ROOT / "tests")
KERNEL_BENCHES = {"attention": 35, "mlp": 35, "layer_norm": 25, "update": 25, "patch_embed": 25, "cross_entropy": 25}
BENCHES = KERNEL_BENCHES | {"step": 110, "train": 35}
"""Files bench_<name>.py that a GPU is needed for, and their shares of the time, each well beyond what imports take."""
TESTS_SHARE, ROOM_SHARE, TUNING_SHARE, PROFILE_SHARE = 75, 30, 45, 15
ROOMS = ("model", "train", "data")
"""Folders of tests beside that of the kernels; of these, what is marked for a GPU is run."""
WHOLE = ("numpy", "PIL", "tyro")
NEEDS = {
    "step": WHOLE,
    "train": (*WHOLE, "rich", "tensorboard", "torchmetrics"),
    "data": (*WHOLE, "nvidia.dali", "av", "soundfile", "hypothesis"),
}
"""Packages, of benchmarks and of rooms."""
NEED_NO_GPU = ("aot", "c_table", "commands", "cubin", "images", "library", "plan", "reference", "tile_table", "tiles")
WORKERS = 16
LAST_SECONDS = 5  # for the table
GRACE_SECONDS = 10  # between a request to end and the end
LONGEST_STEP = 20  # seconds that a part may take after it was told to begin nothing new
LONGEST_CONTEST = 90  # the same of whole steps, whose contenders compile


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command; `weight` is its share of the time. With `told`, it takes `--seconds` and ends by itself.

    It is left out where one of the packages that it `needs` is not installed.
    """

    name: str
    command: tuple[str, ...]
    weight: float
    told: bool = True
    longest: float = LONGEST_STEP
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a part ended: its last words, and whether it did all that it should."""

    name: str
    seconds: float
    is_well: bool
    words: str


def limit(left: float, weights: Sequence[float]) -> float:
    """Seconds for the first of the parts that are to come: its share of what is left, so that haste serves those after it."""
    return left * weights[0] / sum(weights)


def parts(out: Path, *, tuning: bool, is_small: bool, only: Sequence[str] = ()) -> list[Part]:
    """What is run, in order; with `only`, those alone whose name has one of these words."""
    found = [Part(name="tests of kernels", command=_kernel_tests(is_small), weight=TESTS_SHARE, told=False)]
    if tuning:
        small = ("--small", "--ops", "update") if is_small else ()
        found.append(Part(name="tuning", command=(_script("tune"), *small), weight=TUNING_SHARE))
    found += _small_benches(out) if is_small else [*_room_tests(), *(_bench(name, [name], out, weight) for name, weight in BENCHES.items())]
    small = ("--small",) if is_small else ()
    profile = (_script("step_profile"), "--out", str(out / "profile.txt"), *small)
    found.append(Part(name="profile", command=profile, weight=PROFILE_SHARE, told=False, needs=WHOLE))
    return [part for part in found if not only or set(only) & set(part.name.split())]


def _script(name: str) -> str:
    return str(card.ROOT / "benchmarks" / f"{name}.py")


def _kernel_tests(is_small: bool) -> tuple[str, ...]:
    """Without `tests/conftest.py`, which needs all that training needs, and without run-time type checks; first what only a GPU shows."""
    folder = card.ROOT / "tests" / "kernels"
    if is_small:
        return (*_tests(folder), str(folder / "test_rows.py"))
    workers = ("-n", str(min(WORKERS, len(os.sched_getaffinity(0))))) if card.is_installed("xdist") else ()
    first, others = folder / "test_gpu.py", {folder / f"test_{name}.py" for name in NEED_NO_GPU}
    return (*_tests(folder), *workers, str(first), *map(str, sorted({*folder.glob("test_*.py")} - others - {first})))


def _room_tests() -> Iterator[Part]:
    """A process for each folder. Files without such a test are not even imported, for they may need more than there is."""
    for room in ROOMS:
        files = gpu_files(room)
        if files:
            command = (*_tests(card.ROOT / "tests"), "-m", "gpu", *files)
            needs = NEEDS.get(room, WHOLE)
            yield Part(name=f"tests of {room}", command=command, weight=ROOM_SHARE, told=False, needs=needs)


def gpu_files(room: str) -> list[str]:
    """The files of a folder of tests in which something is marked for a GPU."""
    paths = sorted((card.ROOT / "tests" / room).glob("test_*.py"))
    return [str(path) for path in paths if "pytest.mark.gpu" in path.read_text()]


def _tests(highest: Path) -> tuple[str, ...]:
    """Pytest, with the `conftest.py` of this folder and below it."""
    return ("-m", "pytest", "-q", *_QUIET, "-o", "addopts=--strict-markers", f"--confcutdir={highest}", "-p", "no:benchmark")


def _small_benches(out: Path) -> list[Part]:
    """All kernels, one contest of whole steps, one run of the loop, each once."""
    once, whole = ("--rounds=1", "--calls=1"), ["step", "train"]
    return [
        _bench("kernels", list(KERNEL_BENCHES), out, sum(KERNEL_BENCHES.values()), *once),
        _bench("whole", whole, out, sum(BENCHES[name] for name in whole), *once, "-k", "PolyViT or (mixed and made)"),
    ]


def _bench(name: str, files: Sequence[str], out: Path, weight: float, *options: str) -> Part:
    command = (
        "-m",
        "pytest",
        "-q",
        *_QUIET,
        f"--benchmark-json={_json(out, name)}",
        *options,
        *(_script(f"bench_{file}") for file in files),
    )
    longest = LONGEST_CONTEST if name == "step" else LONGEST_STEP
    needs = tuple({package: None for file in files for package in NEEDS.get(file, ())})
    return Part(name=f"benchmark of {name}", command=command, weight=weight, longest=longest, needs=needs)


# A warning of another version of a library is no failure here.
_QUIET = ("-W", "default", "-p", "no:cacheprovider", "-rfE")


def _json(out: Path, name: str) -> Path:
    return out / f".{name}.json"


def run(part: Part, seconds: float, log: TextIO, variables: dict[str, str]) -> Ended:
    """Run a part for so long at most; its output goes to the log."""
    missing = [package for package in part.needs if not card.is_installed(package)]
    if missing:
        return Ended(name=part.name, seconds=0.0, is_well=True, words=f"left out: {', '.join(missing)} not installed")
    soft = ("--seconds", f"{max(seconds - part.longest, seconds / 2):.0f}") if part.told else ()
    log.write(f"\n===== {part.name}\n")
    log.flush()
    start, place = time.monotonic(), log.tell()
    command = [sys.executable, *part.command, *soft]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=card.ROOT, env=variables, process_group=0)
    is_late = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        is_late = True
    finally:
        _end(process)
    with open(log.name, encoding="utf-8", errors="replace") as file:
        file.seek(place)
        words = last_words(file.read())
    taken = time.monotonic() - start
    if is_late:
        return Ended(name=part.name, seconds=taken, is_well=False, words=f"out of time; {words}")
    status = "" if not process.returncode else f"status {process.returncode}; "
    return Ended(name=part.name, seconds=taken, is_well=not process.returncode, words=f"{status}{words}")


def _end(process: subprocess.Popen) -> None:
    """Stop what still runs: an interrupt first, after which pytest writes what it has."""
    for number, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def last_words(output: str) -> str:
    """Pytest's count and the first failures, or the last line of another command."""
    lines = [line for line in output.splitlines() if line.strip()]
    failed = [re.sub(r" - .*", "", line) for line in lines if line.startswith(("FAILED ", "ERROR "))]
    counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|skipped|error).* in [\d.]+s", line)]
    words = counts[-1:] or lines[-1:] or ["no output"]
    more = [f"and {len(failed) - 3} more"] if len(failed) > 3 else []
    return "; ".join([*words, *(failed[:3]), *more])


def measurements(document: dict[str, Any]) -> Iterator[Measurement]:
    """Of pytest-benchmark's file."""
    for bench in document["benchmarks"]:
        yield Measurement(group=bench["group"], median=bench["stats"]["median"], info=bench["extra_info"])


def gather(out: Path) -> dict[str, Any]:
    """All parts' benchmarks in one document, in `benchmarks.json`, without what was cut short when a part was killed."""
    merged: dict[str, Any] = {"benchmarks": []}
    for name in (*BENCHES, "kernels", "whole"):
        path = _json(out, name)
        found = _read(path)
        path.unlink(missing_ok=True)
        if found:
            merged = {**found, "benchmarks": [*merged["benchmarks"], *found["benchmarks"]]}
    (out / "benchmarks.json").write_text(json.dumps(merged, indent=1) + "\n")
    return merged


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; nothing where it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def tuning_lines(path: Path, began: float) -> list[str]:
    """A line for each case that got other blocks in this run."""
    if not path.exists() or path.stat().st_mtime < began:
        return []
    cases = _read(path).get("cases", [])
    changed = [case for case in cases if case["new"] and case["new"] != case["old"]]
    told = [f"{case['op']} {'×'.join(map(str, case['size']))}: {case['old']} {_us(case['old_us'])}" for case in changed]
    return [f"{words} → {case['new']} {_us(case['new_us'])}" for words, case in zip(told, changed, strict=True)]


def _us(value: float | None) -> str:
    return "(refused)" if value is None else f"{value:.1f} us"


def summary(ended: Sequence[Ended], changes: Sequence[str], document: dict[str, Any]) -> str:
    """All that is printed at the end; the tables come last."""
    width = max(len(part.name) for part in ended)
    lines = [f"{card.name()}, {', '.join(f'{name} {version}' for name, version in card.versions().items())}", ""]
    lines += [f"{part.name:{width}} {part.seconds:5.0f} s  {'' if part.is_well else 'NOT WELL: '}{part.words}" for part in ended]
    lines += ["", *changes] if changes else []
    for title, table in sections(list(measurements(document))):
        lines += ["", title, *table]
    return "\n".join(lines) + "\n"


def variables(is_small: bool) -> dict[str, str]:
    """For the parts: where to import from; repeatable cuBLAS, which tests in deterministic mode ask for.

    For small ones Triton's interpreter, and one thread, as more would wait for one another on a busy machine.
    """
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONUNBUFFERED": "1",
    }
    return found | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if is_small else {})


def main() -> int:
    """The command; gives its status."""
    parser = commands.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is measured; it is made where there is none")
    parser.add_argument("--minutes", type=float, default=9, help="stop after this many minutes, all parts together")
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="run only the parts with one of these words in their name")
    parser.add_argument("--skip-tuning", action="store_true", help="measure with the rows that are there, write none to the checkout")
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU's path")
    args = parser.parse_args()
    if not card.HAS_GPU and not args.small:
        print("there is no CUDA GPU here (--small runs every part on the CPU's path)", file=sys.stderr)
        return NOBODY_HERE
    began, end = time.time(), time.monotonic() + 60 * args.minutes - LAST_SECONDS - GRACE_SECONDS
    out = args.out.resolve()
    commands.make_folder(parser, "--out", args.out)
    todo = parts(out, tuning=not args.skip_tuning, is_small=args.small, only=args.only)
    if not todo:
        names = ", ".join(part.name for part in parts(out, tuning=True, is_small=args.small))
        parser.error(f"--only: no part is called so; there are: {names}")
    ended = []
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        for index, part in enumerate(todo):
            seconds = limit(end - time.monotonic(), [other.weight for other in todo[index:]])
            ended.append(run(part, max(seconds, 1.0), log, variables(args.small)))
            print(f"{part.name}: {ended[-1].seconds:.0f} s, {ended[-1].words}", flush=True)
    results = RESULTS / card.folder_name() / "tuning.json"
    changes = tuning_lines(results, began)
    for path in (results, TABLE_PATH):
        if path.exists():
            shutil.copy(path, out)
    text = summary(ended, changes, gather(out))
    (out / "summary.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}", end="")
    return 0 if all(part.is_well for part in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
