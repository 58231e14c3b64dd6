"""What an installation takes: bytes on disk by package, and seconds to import, of the base and with each extra.

    python benchmarks/install.py --out FILE     installs this checkout, with the versions of constraints.txt, into an environment of its own

The packages must be where pip finds them: an index, or a folder that pip is configured for. Prints the tables that docs/install.md has.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("", "data", "train")
STARTS = {
    "python": "pass",
    "import torch": "import torch",
    "import polyvit_fast": "import polyvit_fast",
    "from polyvit_fast import fuse": "from polyvit_fast import fuse",
    "from polyvit_fast import PolyViT": "from polyvit_fast import PolyViT",
    "import polyvit_kernels": "import polyvit_kernels",
    "polyvit-fast --help": "import sys; from polyvit_fast.__main__ import main; sys.argv[1:] = ['--help']; main()",
}
"""What is timed, each in a new process."""
SIZES = """
import json
from importlib.metadata import distributions
print(json.dumps({d.name: sum(f.locate().stat().st_size for f in d.files or () if f.locate().is_file()) for d in distributions()}))
"""


def measure_sizes(python: Path) -> dict[str, int]:
    """Bytes of each installed package, without what Python compiles later."""
    sizes = json.loads(subprocess.run([python, "-c", SIZES], check=True, capture_output=True, text=True).stdout)
    return {name: size for name, size in sizes.items() if name not in ("pip", "setuptools")}


def time_start(python: Path, code: str, runs: int) -> dict[str, float]:
    """The least seconds that a process takes to run `code` and to end, by the clock and of a CPU; the files have been read before.

    The two differ where other processes run, or several threads.
    """
    seconds = []
    for _ in range(runs + 1):
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([python, "-c", code], check=True, capture_output=True, cwd=tempfile.gettempdir())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append((time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    clock, cpu = (min(column) for column in zip(*seconds[1:], strict=True))
    return {"clock": clock, "cpu": cpu}


def install(python: Path, extra: str) -> None:
    """This checkout with an extra, from a copy of the files that git knows: a build writes next to its sources."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(f"git ls-files -z | tar -c --null -T - | tar -x -C {folder}", shell=True, check=True, cwd=ROOT)
        what = f"{folder}[{extra}]" if extra else folder
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", what]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)


def measure(runs: int) -> dict:
    """By extra: the bytes of the packages that it adds, and the seconds of each start when it is there."""
    found, known = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder, "bin", "python")
        for extra in EXTRAS:
            print(f"installing {extra or 'the base'}", file=sys.stderr, flush=True)
            install(python, extra)
            sizes = measure_sizes(python)
            added = {name: size for name, size in sizes.items() if name not in known}
            known |= sizes
            starts = {name: time_start(python, code, runs) for name, code in STARTS.items()}
            found[extra or "base"] = {"bytes": dict(sorted(added.items(), key=lambda item: -item[1])), "seconds": starts}
    return found


def print_tables(found: dict) -> None:
    """In Markdown: what each extra adds, its largest packages first, and the times."""
    print("| | adds | of which |\n|---|---|---|")
    for extra, numbers in found.items():
        sizes = numbers["bytes"]
        largest = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in list(sizes.items())[:7])
        print(f"| {extra} | {len(sizes)} packages, {sum(sizes.values()) / 1e6:,.0f} MB | {largest} |")
    print(f"\n| seconds of a CPU | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for start in STARTS:
        seconds = (f"{numbers['seconds'][start]['cpu']:.2f}" for numbers in found.values())
        print(f"| `{start}` | {' | '.join(seconds)} |")


def main() -> None:
    """The command."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--runs", type=int, default=5, help="processes for each time, of which the least is taken")
    args = parser.parse_args()
    found = measure(args.runs)
    print_tables(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
