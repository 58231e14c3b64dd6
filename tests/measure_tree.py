"""Measures a checkout: modules, imports, import cycles, lines, functions, comments.

    python tests/measure_tree.py [PATH]

PATH is a checkout of any version since 0.3.0; without it, this one.
"""

import argparse
import ast
import io
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grimp

Function = ast.FunctionDef | ast.AsyncFunctionDef
ROOTS = ("polyvit_fast", "kernels", "benchmarks", "tests", "docs")


@dataclass(frozen=True)
class PythonFile:
    """A Python file of a checkout, parsed."""

    name: str
    """Its path from the root of the checkout."""
    text: str

    @property
    def num_lines(self) -> int:
        return self.text.count("\n")

    def find_functions(self) -> list[Function]:
        return [node for node in ast.walk(ast.parse(self.text)) if isinstance(node, Function)]

    def find_classes(self) -> list[str]:
        return [node.name for node in ast.walk(ast.parse(self.text)) if isinstance(node, ast.ClassDef)]

    def count_comments(self) -> int:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return sum(token.type == tokenize.COMMENT for token in tokens)

    def holds_kernels(self) -> bool:
        """Whether a function of it is compiled for the GPU."""
        return any(is_kernel(function) for function in self.find_functions())


def is_kernel(function: Function) -> bool:
    """Whether Triton or Gluon compiles it."""
    return any("jit" in ast.dump(decorator) for decorator in function.decorator_list)


def length(function: Function) -> int:
    """Lines from `def` to the last statement."""
    assert function.end_lineno
    return function.end_lineno - function.lineno + 1


def read_files(root: Path, *folders: str) -> list[PythonFile]:
    """The tracked Python files below these folders."""
    return [PythonFile(name, (root / name).read_text()) for name in list_files(root, *folders) if name.endswith(".py")]


def list_files(root: Path, *folders: str) -> list[str]:
    """The paths below these folders that git tracks or would add."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({name for name in names if (root / name).is_file()})  # without those deleted since the last commit


def count_on_floors(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of each package folder that holds one of these Python files: its files without `__init__.py`, and its folders."""
    paths = [Path(name) for name in names if name.endswith(".py")]
    folders = {folder for path in paths for folder in path.parents if folder.name}
    packages = {folder for folder in folders if any(path.parent == folder and path.name == "__init__.py" for path in paths)}
    return {
        str(folder): (
            sum(path.parent == folder and path.name != "__init__.py" for path in paths),
            sum(other.parent == folder for other in folders),
        )
        for folder in sorted(packages)
    }


def comment_ratio(files: Iterable[PythonFile]) -> float:
    """Comments per hundred lines."""
    files = list(files)
    return 100 * sum(file.count_comments() for file in files) / max(1, sum(file.num_lines for file in files))


def build_graph(root: Path) -> grimp.ImportGraph:
    """Every import of the two packages, those inside functions and under TYPE_CHECKING too. Puts `root` at the head of `sys.path`."""
    sys.path[:0] = [str(root), str(root / "kernels")]
    return grimp.build_graph("polyvit_fast", "polyvit_kernels", cache_dir=None)


def find_cycles(graph: grimp.ImportGraph) -> list[set[str]]:
    """Sets of sibling modules or packages each of which imports all others, directly or through siblings."""
    return [cycle for package in sorted(graph.modules) for cycle in _sibling_cycles(graph, package)]


def _sibling_cycles(graph: grimp.ImportGraph, package: str) -> Iterator[set[str]]:
    siblings = graph.find_children(package)
    depth = package.count(".") + 2
    imports: dict[str, set[str]] = {sibling: set() for sibling in siblings}
    for sibling in siblings:
        for module in {sibling} | graph.find_descendants(sibling):
            found = {".".join(name.split(".")[:depth]) for name in graph.find_modules_directly_imported_by(module)}
            imports[sibling] |= found & siblings - {sibling}
    downstream = {sibling: _follow(imports, sibling) for sibling in siblings}
    left = set(siblings)
    while left:
        first = min(left)
        cycle = {first} | {other for other in downstream[first] if first in downstream[other]}
        left -= cycle
        if len(cycle) > 1:
            yield cycle


def _follow(imports: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        new = imports[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def describe(root: Path) -> str:
    """All measurements as text."""
    graph, files = build_graph(root), read_files(root, *ROOTS)
    product = [file for file in files if file.name.startswith(("polyvit_fast/", "kernels/polyvit_kernels/"))]
    functions = [
        (length(function), f"{function.name} in {file.name}", is_kernel(function)) for file in product for function in file.find_functions()
    ]
    longest = max(product, key=lambda file: file.num_lines)
    cycles = [" <-> ".join(sorted(cycle)) for cycle in find_cycles(graph)]
    kernels = [file for file in product if file.holds_kernels()]
    host, on_gpu = (max((item for item in functions if item[2] is kind), default=(0, "", kind)) for kind in (False, True))
    lines = [
        f"modules of the two packages     {len(graph.modules)}",
        f"imports between them            {graph.count_imports()}",
        f"cycles among siblings           {len(cycles)}",
        *(f"    {cycle}" for cycle in cycles),
        f"median file                     {statistics.median_high([file.num_lines for file in product])} lines",
        f"longest file                    {longest.num_lines} lines, {longest.name}",
        f"median function                 {statistics.median_high([item[0] for item in functions])} lines",
        f"longest function                {host[0]} lines, {host[1]}",
        f"longest kernel                  {on_gpu[0]} lines, {on_gpu[1]}",
        f"comments per hundred lines      {comment_ratio(kernels):.1f} in the {len(kernels)} files with kernels",
        f"classes of the same name        {len(find_repeated_classes(read_files(root, 'polyvit_fast', 'kernels', 'benchmarks')))}",
        "",
        *_describe_rooms(root, files),
        "",
        *_describe_floors(product),
    ]
    return "\n".join(lines)


def find_repeated_classes(files: Iterable[PythonFile]) -> dict[str, list[str]]:
    """The class names that stand more than once in these files, and where."""
    found: dict[str, list[str]] = {}
    for file in files:
        for name in file.find_classes():
            found.setdefault(name, []).append(file.name)
    return {name: names for name, names in found.items() if len(names) > 1}


def _describe_rooms(root: Path, files: list[PythonFile]) -> Iterator[str]:
    """Two levels of folders, with their lines of Python, C and prose."""
    sizes = [(name, (root / name).read_text().count("\n")) for name in list_files(root, *ROOTS) if _is_text(name)]
    rooms: dict[str, list[int]] = {}
    for name, size in sizes:
        rooms.setdefault("/".join(Path(name).parent.parts[: 3 if name.startswith("kernels/") else 2]), []).append(size)
    yield f"{'folder':36} files  lines  median  longest"
    for room, counts in sorted(rooms.items()):
        yield f"{room:36} {len(counts):5} {sum(counts):6}  {statistics.median_high(counts):6}  {max(counts):7}"
    yield f"{'all':36} {len(sizes):5} {sum(size for _, size in sizes):6}"


def _is_text(name: str) -> bool:
    return name.endswith((".py", ".c", ".h", ".S", ".md")) and "/results/" not in name


def _describe_floors(product: list[PythonFile]) -> Iterator[str]:
    yield f"{'package':36} files  folders on its floor"
    for folder, (num_files, num_folders) in count_on_floors(file.name for file in product).items():
        yield f"{folder:36} {num_files:5}  {num_folders:7}"


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).parent.parent, help="the checkout")
    print(describe(parser.parse_args().path.resolve()))


if __name__ == "__main__":
    main()
