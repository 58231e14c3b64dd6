import subprocess
import sys

import pytest

from polyvit_fast import experiments
from polyvit_fast.experiments.loading.neighbours import Neighbours

TASK = "Task(modality=Image(size=32), train=Synthetic(), val=Synthetic(), num_classes=2, steps=helper.STEPS)"
EXPERIMENT = f"""
import helper
from polyvit_fast.config import Task, Train
from polyvit_fast.data import Image, Synthetic

def schedule(config):
    import later
    return later.plan(config)

config = Train(tasks={{"a": {TASK}}}, schedule=schedule)
"""


def write(folder, steps):
    folder.mkdir()
    (folder / "mine.py").write_text(EXPERIMENT)
    (folder / "helper.py").write_text(f"STEPS = {steps}\n")
    (folder / "later.py").write_text("def plan(config):\n    return [('a',)] * config.tasks['a'].steps\n")
    return str(folder / "mine.py")


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr("polyvit_fast.experiments.loading.run_file.neighbours", Neighbours())
    yield
    for name in ("helper", "later", "inner", "inner.deep", "datasets", "plain", "plain.deep"):
        sys.modules.pop(name, None)


def test_each_file_imports_its_own_neighbours(tmp_path):
    first, second = write(tmp_path / "first", 3), write(tmp_path / "second", 5)
    config, other = experiments.load(first), experiments.load(second)
    assert (config.tasks["a"].steps, other.tasks["a"].steps) == (3, 5)
    assert experiments.load(first).tasks["a"].steps == 3
    assert config.schedule(config) == [("a",)] * 3  # it imports a neighbour only now


def test_a_neighbour_is_found_from_any_folder_and_by_neighbours(tmp_path, monkeypatch):
    path = write(tmp_path / "first", 3)
    (tmp_path / "first" / "helper.py").write_text("from inner.deep import STEPS\n")
    (tmp_path / "first" / "inner").mkdir()
    (tmp_path / "first" / "inner" / "__init__.py").touch()
    (tmp_path / "first" / "inner" / "deep.py").write_text("STEPS = 7\n")
    monkeypatch.chdir(tmp_path)
    assert experiments.load("first/mine.py").tasks["a"].steps == 7
    assert experiments.load(path).tasks["a"].steps == 7


def test_a_folder_without_an_init_is_a_package_unless_one_is_installed(tmp_path):
    path = write(tmp_path / "first", 3)
    for name in ("plain", "pytest_benchmark"):
        (tmp_path / "first" / name).mkdir()
        (tmp_path / "first" / name / "deep.py").write_text("STEPS = 9\n")
    (tmp_path / "first" / "helper.py").write_text(
        "import pytest_benchmark\nfrom plain.deep import STEPS\nassert pytest_benchmark.__file__\n"
    )
    sys.modules.pop("pytest_benchmark", None)
    assert experiments.load(path).tasks["a"].steps == 9


def test_neighbours_that_are_called_like_ours_hide_nothing(tmp_path):
    """A process of its own, in which nothing is imported yet."""
    write(tmp_path / "first", 3)
    for name in ("config", "data", "train", "model", "av", "rich", "tyro", "torch", "queue", "random", "polyvit_fast", "cli", "matplotlib"):
        (tmp_path / "first" / f"{name}.py").write_text(f"STEPS = 4\nOWN = '{name}'\n")
    (tmp_path / "first" / "helper.py").write_text("import config, data\nSTEPS = config.STEPS\nassert data.OWN == 'data'\n")
    code = (
        "import sys; from polyvit_fast import cli; code = cli.run(['plan', 'first/mine.py']); import av, matplotlib, queue, rich; "
        "sys.exit(code or any(hasattr(module, 'OWN') for module in (av, matplotlib, queue, rich)))"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert (ran.returncode, "4 steps" in ran.stdout or " 4 " in ran.stdout) == (0, True), ran.stdout + ran.stderr
