"""The rules of CONTRIBUTING.md about the code's form, as tests. The direction of imports is import-linter's part."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from measure_tree import (
    comment_ratio,
    count_on_floors,
    find_repeated_classes,
    is_kernel,
    length,
    read_files,
)

ROOT = Path(__file__).parent.parent
PACKAGES = ("polyvit_fast", "kernels/polyvit_kernels")
FILES = read_files(ROOT, *PACKAGES)
NAMES = [file.name for file in FILES]
NO_MEANING = {"utils", "common", "core", "base", "types", "constants", "registry", "helpers", "misc"}
OWN_FOLDERS_OF_TESTS = {"tests", "tests/benchmarks", "tests/files", "tests/gluon", "tests/kernels"}


def folders_of(name: str) -> tuple[str, ...]:
    return Path(name).parts


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_file_and_its_functions_are_short(file):
    assert file.num_lines <= 450
    assert not [f"{f.name}: {length(f)} lines" for f in file.find_functions() if length(f) > 60 and not is_kernel(f)]


def test_the_median_file_and_function_are_small():
    assert statistics.median_high([file.num_lines for file in FILES]) <= 130
    assert statistics.median_high([length(function) for file in FILES for function in file.find_functions()]) <= 12


def test_a_folder_has_at_most_twelve_files_on_its_floor():
    floors = count_on_floors(NAMES)
    assert "polyvit_fast/data" in floors
    assert not {folder: files for folder, (files, _) in floors.items() if files > 12}


def test_no_two_classes_share_a_name():
    assert not find_repeated_classes(read_files(ROOT, *PACKAGES, "benchmarks"))


def test_kernels_have_six_comments_in_a_hundred_lines():
    assert comment_ratio(file for file in FILES if file.holds_kernels()) >= 6


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_no_branch_on_a_modality_outside_data_and_experiments(file):
    if {"data", "experiments"} & set(folders_of(file.name)):
        return
    assert not re.search(r"""(==|!=|\bin\b)\s*[\[({]?\s*["'](image|video|audio)s?["']""", file.text)
    assert not re.search(r"isinstance\([^)]*\b(Image|Video|Audio)\b", file.text)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_no_switch_by_environment_and_no_name_without_a_meaning(file):
    if not file.name.endswith("/process_group.py"):  # torchrun gives a process its rank there
        assert not re.search(r"\bos\.environ\b|\bgetenv\b", file.text)
    assert not NO_MEANING & {part.removesuffix(".py") for part in folders_of(file.name)}


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_dali_is_imported_inside_functions_of_data_only(file):
    tree = ast.parse(file.text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(module.startswith("nvidia") for module in modules):
            assert "data" in folders_of(file.name)
            assert id(node) in inside


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_nothing_loads_a_pickle(file):
    text = file.text
    if file.name.endswith("/pretrained/files.py"):  # other libraries' weights, of which torch then takes tensors and nothing else
        text = re.sub(r"torch\.load\([^()]*, weights_only=True\)", "", text)
    assert not re.search(r"torch\.(load|save)\(|\bpickle\b|allow_pickle=True", text)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_kernels_have_no_atomics_and_are_not_tuned_at_run_time(file):
    assert not re.search(r"\batomic_|\bautotune\b|\bheuristics\b", file.text)


def test_importing_the_package_or_an_experiment_loads_no_decoder_and_no_compiler():
    code = "import sys; from polyvit_fast import experiments; [experiments.load(n) for n in experiments.names()]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert "polyvit_fast.experiments.smoke" in loaded
    assert not {"nvidia.dali", "av", "matplotlib", "triton"} & set(loaded)


def mirror_folder(name: str) -> str:
    return name.replace("kernels/polyvit_kernels", "tests/kernels", 1).replace("polyvit_fast", "tests", 1)


def test_every_module_has_its_test_file():
    experiments = {name for name in NAMES if name.startswith("polyvit_fast/experiments/")}
    tested = [Path(name) for name in NAMES if name not in experiments and not Path(name).name.startswith("__")]
    tests = [ROOT / mirror_folder(str(path.parent)) / f"test_{path.name}" for path in tested]
    assert not [str(path.relative_to(ROOT)) for path in tests if not path.exists()]


def test_every_folder_of_tests_is_a_folder_of_the_code():
    code = {mirror_folder(str(Path(name).parent)) for name in NAMES}
    tests = {str(Path(file.name).parent) for file in read_files(ROOT, "tests")}
    assert tests - OWN_FOLDERS_OF_TESTS <= code


def test_kernels_folder_does_not_hide_hugging_faces_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
