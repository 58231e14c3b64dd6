"""The laws of the house (CONTRIBUTING.md), as tests. Import direction is import-linter's part."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / "polyvit_fast", ROOT / "kernels" / "polyvit_kernels"]
FILES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
BANNED_ROOMS = {"utils", "common", "core", "base", "types", "constants", "registry", "helpers", "misc"}


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno
    return function.end_lineno - function.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_file_and_its_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 450
    long = [f"{f.name}: {_length(f)} lines" for f in _functions(ast.parse(text)) if _length(f) > 60 and "jit" not in ast.dump(f)]
    assert not long


def test_the_median_file_and_function_are_small():
    files = sorted(path.read_text().count("\n") for path in FILES)
    functions = sorted(_length(f) for path in FILES for f in _functions(ast.parse(path.read_text())))
    assert files[len(files) // 2] <= 150
    assert functions[len(functions) // 2] <= 12


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_branch_on_a_modality_outside_data_and_experiments(path):
    if {"data", "experiments"} & set(path.relative_to(ROOT).parts):
        return
    assert not re.search(r"""(==|!=|\bin\b)\s*[\[({]?\s*["'](image|video|audio)s?["']""", path.read_text())
    assert not re.search(r"isinstance\([^)]*\b(Image|Video|Audio)\b", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_switch_by_environment_and_no_room_without_a_meaning(path):
    if path.name != "process_group.py":  # there torchrun tells a process its rank
        assert not re.search(r"\bos\.environ\b|\bgetenv\b", path.read_text())
    assert not BANNED_ROOMS & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_dali_is_imported_inside_functions_of_data_only(path):
    tree = ast.parse(path.read_text())
    inside = {id(node) for function in _functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(module.startswith("nvidia") for module in modules):
            assert "data" in path.relative_to(ROOT).parts
            assert id(node) in inside


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_loads_a_pickle(path):
    text = path.read_text()
    assert not re.search(r"torch\.(load|save)\(|\bpickle\b|allow_pickle=True", text)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_kernels_have_no_atomics_and_are_not_tuned_at_run_time(path):
    assert not re.search(r"\batomic_|\bautotune\b|\bheuristics\b", path.read_text())


def test_importing_the_package_or_an_experiment_loads_no_decoder_and_no_compiler():
    code = "import sys; from polyvit_fast import experiments; [experiments.load(n) for n in experiments.names()]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert "polyvit_fast.experiments.smoke" in loaded
    assert not {"nvidia.dali", "av", "matplotlib", "triton"} & set(loaded)


def test_every_module_has_its_test_file():
    def mirrored(path: Path) -> Path:
        if "polyvit_kernels" in path.parts:
            return ROOT / "tests" / "kernels" / path.relative_to(ROOT / "kernels" / "polyvit_kernels").parent / f"test_{path.name}"
        return ROOT / "tests" / path.relative_to(ROOT / "polyvit_fast").parent / f"test_{path.name}"

    exempt = {"__init__.py", "__main__.py"} | {path.name for path in (ROOT / "polyvit_fast" / "experiments").glob("*.py")}
    missing = [str(mirrored(path).relative_to(ROOT)) for path in FILES if path.name not in exempt and not mirrored(path).exists()]
    assert not missing


def test_kernels_folder_does_not_hide_hugging_faces_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
