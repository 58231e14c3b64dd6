"""A test that loses its CUDA context says so, and no other test fails for it: with workers and without.

No CPU can lose one. In the child, what the GPU would answer is a file that a test writes, for the process that wrote it alone.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from long_forms import mark_long

TESTS = Path(__file__).parent
CHILD_CONFTEST = "from lost_context import pytest_configure as pytest_configure"
CHILD_CUDA_ERRORS = """
import os

MARK = "lost-{}".format(os.getpid())

def find_cuda_error():
    return "CUDA error: misaligned address" if os.path.exists(MARK) else ""
"""
CHILD = """
import os, time, pytest

def lose():
    open("lost-{}".format(os.getpid()), "w").close()

@pytest.mark.parametrize("number", range(12))
def test_a_kernel(number):
    time.sleep(0.05)
    if os.path.exists("lost-{}".format(os.getpid())):
        raise RuntimeError("CUDA error in a test that did nothing wrong")
    if number == {loser}:
        lose()
        {then}
"""


def run_child(folder, then, *options):
    (folder / "conftest.py").write_text(CHILD_CONFTEST)
    (folder / "cuda_errors.py").write_text(CHILD_CUDA_ERRORS)
    (folder / "test_child.py").write_text(CHILD.replace("{loser}", "5").replace("{then}", then))
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options, "test_child.py"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(TESTS)}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    lines = re.findall(r"^(PASSED|FAILED|ERROR) test_child.py::test_a_kernel\[(\d+)\]", done.stdout, re.MULTILINE)
    return done, {outcome: {int(number) for kind, number in lines if kind == outcome} for outcome in ("PASSED", "FAILED", "ERROR")}


THEN = ["pass", "raise RuntimeError('CUDA error: misaligned address')"]


@pytest.mark.parametrize("then", mark_long(THEN, THEN[:1]), ids=["found later", "raised"])
def test_without_workers_the_session_stops_at_the_test_that_lost_it(tmp_path, then):
    done, found = run_child(tmp_path, then)
    assert done.returncode == 1
    assert found == {"PASSED": {0, 1, 2, 3, 4}, "FAILED": {5}, "ERROR": set()}
    assert "test_child.py::test_a_kernel[5] lost the CUDA context: CUDA error: misaligned address" in done.stdout
    assert "no other test can run in this process" in done.stdout
    assert ("RuntimeError" in done.stdout) == (then != "pass")  # its own traceback stays


@pytest.mark.parametrize("workers", mark_long(["1", "2"], ["1"]))
def test_a_worker_ends_and_all_other_tests_are_run_by_others(tmp_path, workers):
    pytest.importorskip("xdist")
    done, found = run_child(tmp_path, "pass", "-p", "xdist", "-n", workers)
    assert done.returncode == 1
    assert found == {"PASSED": set(range(12)) - {5}, "FAILED": {5}, "ERROR": set()}
    assert "test_child.py::test_a_kernel[5] lost the CUDA context" in done.stdout
    assert "1 failed, 11 passed" in done.stdout
    assert "node down" in done.stdout


@pytest.mark.long
def test_a_process_that_never_asked_a_gpu_has_lost_nothing():
    code = "import cuda_errors, torch; print(repr(cuda_errors.find_cuda_error()), torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(TESTS)}, capture_output=True, text=True)
    assert done.stdout.split() == ["''", "False"], done.stderr
