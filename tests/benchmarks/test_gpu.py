"""The one command for a machine with a GPU: its stages, what is left when one fails or the run is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import machine
import pytest
from gpu import Stage
from harness import read_rows

SCRIPT = Path(gpu.__file__)


def files_of(stage):
    return [Path(word) for word in stage.arguments if word.endswith(".py")]


def test_parts_run_files_that_exist_and_every_benchmark_but_those_of_a_cpu(tmp_path):
    stages = {stage.name: stage for stage in gpu.list_stages(tmp_path, is_small=False)}
    assert all(path.exists() for stage in stages.values() for path in files_of(stage))
    run = {path.name for stage in stages.values() for path in files_of(stage) if path.name.startswith("bench_")}
    assert run == {path.name for path in SCRIPT.parent.glob("bench_*.py")} - {"bench_data.py", "bench_schedule.py"}
    on_gpu = {path.name for name in ("tests", "tests-training") for path in files_of(stages[name])}
    assert on_gpu >= {"test_gpu.py", "test_captured_gpu.py", "test_gpu_decoding.py", "test_model_gpu.py"}
    assert all(path.is_relative_to(gpu.TESTS / "kernels") for path in files_of(stages["tests"]))


def test_a_part_that_fails_or_takes_too_long_says_so(tmp_path):
    def run(code, seconds=60.0):
        return gpu.run(Stage("stage", seconds, ("-c", code)), seconds, tmp_path, is_small=True)

    assert run("print('done')") == ""
    assert (tmp_path / "stage.txt").read_text() == "done\n"
    assert run("raise SystemExit(3)") == "status 3"
    began = time.monotonic()
    assert run("import time; time.sleep(60)", 1.0) == "cut after 1 seconds"
    assert time.monotonic() - began < 30


def test_the_demo_dumps_what_a_kernel_did_wrong(tmp_path):
    code = "import os; print(os.environ['CUDA_ENABLE_COREDUMP_ON_EXCEPTION'], os.environ['CUDA_COREDUMP_FILE'])"
    assert gpu.run(Stage("demo", 60, ("-c", code)), 60, tmp_path, is_small=True) == ""
    assert (tmp_path / "demo.txt").read_text() == f"1 {tmp_path}/demo.%p.cudacore\n"


def start(*options):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_words_that_are_no_part_and_a_machine_without_a_gpu_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "ste"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "ste is no stage; there are: tests, hopper, kernels, steps, demo" in " ".join(capsys.readouterr().err.split())
    if not machine.HAS_GPU:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "nowhere"])
        assert gpu.main() == 2
        assert not Path("nowhere").exists()


def test_what_runs_and_for_how_long_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--plan", "--only", "hopper", "tests"])
    assert gpu.main() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["tests", "hopper", "tests-training", "tests-rest"]


def wait_for_rows(path, process):
    latest = time.monotonic() + 240
    while not (rows := read_rows(path)):
        assert time.monotonic() < latest
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    return rows


def processes_of(session):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *_, number = status.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        found += [int(status.parent.name)] if int(number) == session and state != "Z" else []
    return found


def test_a_run_that_is_killed_keeps_what_it_had(tmp_path):
    process = start("--small", "--only", "kernels", "--out", str(tmp_path))
    before = wait_for_rows(tmp_path / "kernels.jsonl", process)
    for number in processes_of(process.pid):  # as a machine that is taken away ends all of them
        os.kill(number, signal.SIGKILL)
    process.communicate()
    assert read_rows(tmp_path / "kernels.jsonl")[: len(before)] == before


@pytest.mark.long
def test_a_run_that_is_asked_to_end_ends_its_part_and_tells_what_it_had(tmp_path):
    process = start("--small", "--only", "kernels", "--out", str(tmp_path))
    wait_for_rows(tmp_path / "kernels.jsonl", process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode
    assert any(line.startswith("attention") for line in printed.splitlines())
    assert (tmp_path / "summary.txt").read_text() in printed
    assert processes_of(process.pid) == []


@pytest.mark.long
def test_every_part_runs_on_a_cpu(tmp_path):
    stages = ("tests", "kernels", "steps", "demo", "profile", "tuning")
    process = start("--small", "--minutes", "60", "--only", *stages, "--out", str(tmp_path))
    printed = process.communicate()[0]
    assert not process.returncode, printed
    assert all(any(line.startswith(f"{name}: ") for line in printed.splitlines()) for name in stages)
    assert "PolyViT-Ti, three tasks" in printed
    assert "sgd_update" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {
        "summary.txt",
        "kernels.jsonl",
        "kernels.json",
        "steps.jsonl",
        "profile.txt",
        "demo",
    }
