"""Everything that needs a GPU, by one command: tests, the demo, kernels and whole training steps against their peers, a profile.

    python benchmarks/gpu.py --out DIR                      in nine minutes at most
    python benchmarks/gpu.py --out DIR --minutes 2          what matters most; each result is written when it is there
    python benchmarks/gpu.py --out DIR --only steps tuning  what has one of these words in its name; tuning runs only so
    python benchmarks/gpu.py --out DIR --only hopper        what the kernels for Hopper are judged by: attention, linear layers, steps and
                                                            a profile, beside what version 0.3.0 took; three minutes, only so as well
    python benchmarks/gpu.py --plan --minutes 2             how the minutes would be spent
    python benchmarks/gpu.py --out DIR --small              every part on the CPU's path, to see that it works

Parts run one after the other, each until its planned time is over or, where others have left some, that as well. Needed are torch, triton,
jaxtyping, einops, safetensors, pytest and pytest-benchmark; what lacks another package is told at once and left out. With pytest-xdist,
tests are shared out among workers; without, each file has a process. This checkout itself need not be installed. DIR, a new folder, gets
summary.txt (what is printed, written anew after each part), measurements.jsonl (a line for each contender of each race: `python
benchmarks/tables.py` makes the tables of it), logs/ and the demo's run. What the peers' compilers make is kept in a temporary folder for
the next run. Tuning rewrites the checkout's kernels/polyvit_kernels/tile_table.py and benchmarks/results/<card>/tuning.json. Status 0 when
all ended well, 1 when something failed or was cut, 2 without a GPU or one of the seven packages.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

# Before anything that imports them: a sentence tells more than the traceback of the first that is not there.
if lacking := [
    name for name in ("torch", "triton", "jaxtyping", "einops", "safetensors", "pytest", "pytest_benchmark") if not find_spec(name)
]:
    print(f"these packages are needed and not installed: {', '.join(lacking)}", file=sys.stderr)
    sys.exit(2)

import card
import tables

from polyvit_kernels.aot import commands

CORES = min(16, len(os.sched_getaffinity(0)))
KERNEL_BENCHES = ("attention", "linear", "mlp", "layer_norm", "update", "patch_embed", "cross_entropy")
HAVE_COMPILED = tuple(name for name in KERNEL_BENCHES if name != "linear")
HOPPER_STEPS = "not nine and not ViT-Ti"  # what pytest leaves out of whole steps there: no length or width of these is another's
WHOLE = ("numpy", "PIL", "tyro")
LOOP = (*WHOLE, "rich", "tensorboard", "torchmetrics")
DATA = ("nvidia.dali", "av", "soundfile")
NEEDS = {"kernels": (), "model": WHOLE, "train": LOOP, "data": (*WHOLE, *DATA, "hypothesis")}
"""Folders of tests, and the packages of each beyond the seven."""
NEED_NO_GPU = ("aot", "c_table", "commands", "cubin", "images", "library", "plan", "reference", "tile_table", "tiles")
ONLY_ASKED = ("hopper", "tuning")
"""What measures things again, and what changes the checkout."""
LAST_SECONDS, GRACE_SECONDS = 3, 7  # for the tables; between a request to end and the end
LEAST_SECONDS = 12  # imports take most of that
SHOWN_LINES = 80


@dataclass(frozen=True, kw_only=True)
class Command:
    """What Python is given; with `is_shown`, the end of its output is a part of the summary."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    is_shown: bool = False
    variables: tuple[tuple[str, str], ...] = ()
    """Of its environment, beside those of all."""

    @property
    def missing(self) -> list[str]:
        """Packages without which it cannot run."""
        return [package for package in self.needs if not card.is_installed(package)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Commands that run side by side, and the seconds that they should take on an H100 with 16 cores."""

    name: str
    seconds: float
    commands: tuple[Command, ...]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: its last words, and whether it did all that it should."""

    name: str
    is_well: bool
    words: str
    seconds: float = 0.0


def limit(left: float, planned: float, later: Sequence[float]) -> float:
    """Seconds that a part may take: what is planned, and what those after it do not need, as long as there are any."""
    return min(left, max(planned, left - sum(later)))


def parts(out: Path, *, is_small: bool = False, only: Sequence[str] = ()) -> Iterator[Part]:
    """What is run, in the order of what matters most; compilers come after all that needs none."""
    compiled = {"steps compiled": ("step",), "kernels compiled": HAVE_COMPILED}
    wanted = [name for name in compiled if is_chosen(name, only)]
    files = [file for name in wanted for file in compiled[name]]
    found = [
        Part(name="tests for a GPU", seconds=45, commands=tuple(_gpu_tests(is_small))),
        *_hopper(out, is_small),
        Part(name="kernels", seconds=45, commands=(_bench("kernels", KERNEL_BENCHES, out, "first", is_small),)),
        Part(name="steps", seconds=80, commands=(_bench("steps", ("step",), out, "first", is_small),)),
        Part(name="other tests and the demo", seconds=100, commands=(*_other_tests(is_small), _demo(out, is_small))),
        Part(name="compiling peers", seconds=85, commands=(_bench("compiling peers", files, out, "compiled", is_small, warm=True),)),
        Part(name="steps compiled", seconds=70, commands=(_bench("steps compiled", ("step",), out, "compiled", is_small),)),
        Part(name="kernels compiled", seconds=50, commands=(_bench("kernels compiled", HAVE_COMPILED, out, "compiled", is_small),)),
        Part(name="training loop", seconds=30, commands=(_bench("training loop", ("train",), out, "first", is_small),)),
        Part(name="profile", seconds=15, commands=(_profile("profile", out, is_small),)),
        Part(name="tuning", seconds=180, commands=(_tuning(is_small),)),
    ]
    for part in found:
        chosen = [one for one in part.commands if (bool(wanted) if one.name == "compiling peers" else is_chosen(one.name, only))]
        if chosen:
            yield replace(part, commands=tuple(chosen))


def _hopper(out: Path, is_small: bool) -> Iterator[Part]:
    """What matters most there, compiled beforehand; the steps come last, as they take what time is left."""
    kernels, steps = ("attention", "linear"), {"only": HOPPER_STEPS}
    compiling = (
        _bench("hopper's kernels compiled", kernels, out, "first", is_small, warm=True),
        _bench("hopper's peers compiled", ("step",), out, "compiled", is_small, warm=True, **steps),
    )
    yield Part(name="compiling for hopper", seconds=65, commands=compiling)
    yield Part(name="hopper's kernels", seconds=22, commands=(_bench("hopper's kernels", kernels, out, "first", is_small),))
    yield Part(name="hopper's profile", seconds=13, commands=(_profile("hopper's profile", out, is_small),))
    yield Part(name="hopper's steps", seconds=90, commands=(_bench("hopper's steps", ("step",), out, "compiled", is_small, **steps),))


def in_time(todo: Sequence[Part], seconds: float) -> list[Part]:
    """Without compilers where no time would be left to race what they make."""
    needed = 0.0
    for part in todo:
        needed += part.seconds
        if part.name == "compiling peers" and needed + LEAST_SECONDS > seconds:
            return [other for other in todo if not other.name.startswith("compiling") and not other.name.endswith("compiled")]
    return list(todo)


def is_chosen(name: str, only: Sequence[str]) -> bool:
    """By one of its words; where none is given, all but what runs only when it is asked for."""
    words = name.replace("hopper's", "hopper").split()
    if asked := set(words) & set(ONLY_ASKED):
        return bool(asked & set(only))
    return not only or bool(set(only) & set(words))


# A warning of another version of a library is no failure here.
_PYTEST = ("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "-rfE")


def _tests(name: str, room: str, files: Sequence[str], workers: int, *options: str) -> Iterator[Command]:
    """By workers, or by a process for each file. Tests of kernels go without `tests/conftest.py`, which needs all that training needs."""
    highest = card.ROOT / "tests" / ("kernels" if room == "kernels" else "")
    common = (*_PYTEST, "-o", "addopts=--strict-markers", f"--confcutdir={highest}", "-p", "no:benchmark", *options)
    if card.is_installed("xdist"):
        yield Command(name=f"{name} ({room})", arguments=(*common, "-n", str(workers), *files), needs=NEEDS[room])
    else:
        for file in files:
            yield Command(name=f"{name} ({room}/{Path(file).name})", arguments=(*common, file), needs=NEEDS[room])


def _gpu_tests(is_small: bool) -> Iterator[Command]:
    """What is marked for a GPU, in all rooms. Other files are not even imported, for they may need more than there is."""
    if is_small:
        yield from _tests("tests", "kernels", [str(card.ROOT / "tests" / "kernels" / "test_rows.py")], 1)
    for room in () if is_small else NEEDS:
        files = [str(path) for path in _files(room) if "pytest.mark.gpu" in path.read_text()]
        yield from _tests("tests", room, files, max(1, CORES // len(NEEDS)), "-m", "gpu")


def _other_tests(is_small: bool) -> Iterator[Command]:
    """Of the kernels, which run on whatever there is."""
    left_out = {"test_gpu.py"} | {f"test_{name}.py" for name in NEED_NO_GPU}  # of the first, all are marked for a GPU
    files = [str(path) for path in _files("kernels") if path.name not in left_out]
    if not is_small:
        yield from _tests("other tests", "kernels", files, max(1, CORES * 3 // 4), "-m", "not gpu")


def _files(room: str) -> list[Path]:
    return sorted((card.ROOT / "tests" / room).glob("test_*.py"))


def _demo(out: Path, is_small: bool) -> Command:
    options = ("smoke",) if is_small else ("demo", "--device", "cuda", "--precision", "bf16")
    arguments = ("-m", "polyvit_fast", "train", *options, "--out", str(out / "demo"))
    # Where a kernel reads or writes at a wrong address, `cuda-gdb -ex "target cudacore FILE"` names it.
    dumps = {
        "CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "1",
        "CUDA_ENABLE_LIGHTWEIGHT_COREDUMP": "1",
        "CUDA_COREDUMP_FILE": str(out / "logs" / "demo.%p.cudacore"),
    }
    needs = (*LOOP, *(() if is_small else (*DATA, "matplotlib")))
    return Command(name="demo", arguments=arguments, needs=needs, is_shown=True, variables=tuple(dumps.items()))


def _bench(name: str, benches: Sequence[str], out: Path, phase: str, is_small: bool, *, warm: bool = False, only: str = "") -> Command:
    options = ["--contenders", phase, "--measurements", str(out / "measurements.jsonl"), "--benchmark-columns=median,rounds"]
    options += ["--warm", str(CORES)] if warm else []
    if is_small:
        benches = benches if phase == "first" else ["step"] if "steps" in name else ["cross_entropy"]
        chosen = "PolyViT or (mixed and made) or sigmoid" if phase == "compiled" or "steps" in name or "loop" in name else ""
        options += ["--rounds=1", "--calls=1", *(["-k", chosen] if chosen else [])]
    elif "step" in benches:
        options += ["--rounds=4", "--calls=5", *(["-k", only] if only else [])]
    elif name == "hopper's kernels":
        options += ["--rounds=5", "--calls=6"]
    needs = {"step": WHOLE, "train": LOOP}
    return Command(
        name=name,
        arguments=(*_PYTEST, *options, *(_script(f"bench_{bench}") for bench in benches)),
        needs=tuple(dict.fromkeys(package for bench in benches for package in needs.get(bench, ()))),
    )


def _profile(name: str, out: Path, is_small: bool) -> Command:
    small = ("--small",) if is_small else ()
    arguments = (_script("step_profile"), "--out", str(out / "profile.txt"), *small)
    return Command(name=name, arguments=arguments, needs=WHOLE, is_shown=True)


def _tuning(is_small: bool) -> Command:
    small = ("--small", "--ops", "update") if is_small else ()
    return Command(name="tuning", arguments=(_script("tune"), *small), is_shown=True)


def _script(name: str) -> str:
    return str(card.ROOT / "benchmarks" / f"{name}.py")


def plan_lines(todo: Sequence[Part], seconds: float) -> list[str]:
    """When each part begins and ends if all take what is planned."""
    lines, begin = [f"{'plan':26} from    to  (seconds)"], 0.0
    for index, part in enumerate(todo):
        given = min(part.seconds, limit(seconds - begin, part.seconds, [other.seconds for other in todo[index + 1 :]]))
        end = begin + given
        cut = "" if given == part.seconds else f"  cut, of {part.seconds:.0f} seconds; what was measured stays"
        lines.append(f"{part.name:26} {begin:4.0f}  {end:4.0f}{cut}" if given >= LEAST_SECONDS else f"{part.name:26} no time is left")
        begin = end if given >= LEAST_SECONDS else begin
    return lines


def lacking_lines(todo: Sequence[Part]) -> list[str]:
    """A line for each command that is left out for want of packages."""
    lacking = [command for part in todo for command in part.commands if command.missing]
    return [f"left out: {command.name}, as not installed: {', '.join(command.missing)}" for command in lacking]


def run(part: Part, seconds: float, logs: Path, variables: dict[str, str]) -> list[Ended]:
    """Run the commands of a part side by side for so long at most, each with a log of its own."""
    waiting, running, ended = [command for command in part.commands if not command.missing], {}, []
    start = time.monotonic()
    try:
        while (waiting or running) and time.monotonic() - start < seconds:
            while waiting and len(running) < CORES:
                command = waiting.pop(0)
                with log_of(logs, command).open("w") as log:
                    arguments = [sys.executable, *command.arguments]
                    process = subprocess.Popen(
                        arguments,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=card.ROOT,
                        env=variables | dict(command.variables),
                        process_group=0,
                    )
                running[command] = process
            time.sleep(0.1)
            for command, process in [*running.items()]:
                if process.poll() is not None:
                    del running[command]
                    status = f"status {process.returncode}; " if process.returncode else ""
                    words = status + last_words(log_of(logs, command))
                    ended.append(Ended(name=command.name, is_well=not process.returncode, words=words, seconds=time.monotonic() - start))
    finally:
        end([*running.values()])
    for command in [*running, *waiting]:
        words = last_words(log_of(logs, command)) if command in running else "not begun"
        ended.append(Ended(name=command.name, is_well=False, words=f"cut; {words}", seconds=time.monotonic() - start))
    return ended


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Stop what still runs: an interrupt first, after which pytest tells what it has."""
    for number, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        for process in processes:
            with suppress(ProcessLookupError):  # workers may outlive the process that began them
                os.killpg(process.pid, number)
        latest = time.monotonic() + patience
        while any(process.poll() is None for process in processes) and time.monotonic() < latest:
            time.sleep(0.1)


def log_of(logs: Path, command: Command) -> Path:
    """Where a command's output goes."""
    return logs / f"{re.sub(r'[^a-z0-9_]+', '-', command.name).strip('-')}.txt"


def last_words(log: Path) -> str:
    """Pytest's count and the first failures, or the last line of another command."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    failed = [re.sub(r" - .*", "", line) for line in lines if line.startswith(("FAILED ", "ERROR "))]
    counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|skipped|error).* in [\d.]+s", line)]
    words = counts[-1:] or lines[-1:] or ["no output"]
    more = [f"and {len(failed) - 3} more"] if len(failed) > 3 else []
    return "; ".join([*words, *(failed[:3]), *more])


def summary(out: Path, todo: Sequence[Part], ended: Sequence[Ended]) -> str:
    """All that is printed at the end; the tables come last."""
    width = max((len(one.name) for one in ended), default=0)
    lines = [f"{card.name()}, {', '.join(f'{name} {version}' for name, version in card.versions().items())}", ""]
    lines += [f"{one.name:{width}} {one.seconds:5.0f} s  {'' if one.is_well else 'NOT WELL: '}{one.words}" for one in ended]
    lines += lacking_lines(todo)
    for command in (command for part in todo for command in part.commands if command.is_shown):
        log = log_of(out / "logs", command)
        if log.exists():
            lines += ["", command.name, *log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]]
    lines += tables.lines_of(tables.read(out / "measurements.jsonl"))
    return "\n".join(lines) + "\n"


def variables(is_small: bool) -> dict[str, str]:
    """For the parts: where to import from; where compilers keep what they make; repeatable cuBLAS, which deterministic tests ask for.

    For small ones Triton's interpreter, and one thread, as more would wait for one another on a busy machine.
    """
    folders = (card.ROOT, card.ROOT / "kernels", card.ROOT / "tests")
    kept = Path(tempfile.gettempdir()) / f"polyvit-fast-compiled-{os.getuid()}"
    found = {
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TRITON_CACHE_DIR": str(kept / "triton"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONUNBUFFERED": "1",
    }
    return found | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if is_small else {})


def main() -> int:
    """The command; gives its status."""
    parser = commands.parser(__doc__)
    parser.add_argument("--out", type=Path, help="folder for what is measured; it is made where there is none")
    parser.add_argument("--minutes", type=float, default=9, help="stop after this many minutes, all parts together")
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="run only what has one of these words in its name")
    parser.add_argument("--plan", action="store_true", help="print how the minutes would be spent, and end")
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU's path")
    args = parser.parse_args()
    started, seconds = time.monotonic(), 60 * args.minutes - LAST_SECONDS - GRACE_SECONDS
    out = (args.out or Path("DIR")).resolve()
    todo = in_time(list(parts(out, is_small=args.small, only=args.only)), seconds)
    if not todo:
        named = {word for part in parts(out) for one in part.commands for word in one.name.split() if word.isalpha()}
        there = [*sorted(named - {"compiling", "peers"}), *ONLY_ASKED]
        parser.error(f"--only: nothing has such a word in its name; there are: {', '.join(there)}")
    print("\n".join(plan_lines(todo, seconds) + lacking_lines(todo)), flush=True)
    if args.plan:
        return 0
    if not card.HAS_GPU and not args.small:
        print("there is no CUDA GPU here (--small runs every part on the CPU's path)", file=sys.stderr)
        return 2
    if not args.out:
        parser.error("--out is needed")
    commands.make_folder(parser, "--out", out / "logs")
    if (out / "measurements.jsonl").exists():
        parser.error(f"--out: {out} has the measurements of an earlier run")
    print(f"what each command says is in {out / 'logs'}", flush=True)
    ended: list[Ended] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        for index, part in enumerate(todo):
            left = limit(started + seconds - time.monotonic(), part.seconds, [other.seconds for other in todo[index + 1 :]])
            if left < LEAST_SECONDS:
                new = [Ended(name=part.name, is_well=False, words="no time was left")]
            else:
                new = run(part, left, out / "logs", variables(args.small))
            ended += new
            print("\n".join(f"{one.name}: {one.seconds:.0f} s, {one.words}" for one in new), flush=True)
            (out / "summary.txt").write_text(summary(out, todo, ended), encoding="utf-8")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the tables come next
        text = summary(out, todo, ended)
        (out / "summary.txt").write_text(text, encoding="utf-8")
        print(f"\n{text}", end="")
    return 0 if all(one.is_well for one in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
