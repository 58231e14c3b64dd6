"""The one command for a machine with a GPU: its parts, their time, what is left when one fails, and the whole on a CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import card
import gpu
import pytest
from gpu import Part

SCRIPT = Path(gpu.__file__)


def python(code, told=False):
    return Part(name="part", command=("-c", code), weight=1, told=told)


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "log.txt").open("w") as file:
        yield file


def test_a_part_gets_its_share_of_what_is_left():
    assert gpu.limit(540, [110, 170, 80, 180]) == 110
    assert gpu.limit(90, [30]) == 90


def test_parts_are_tests_tuning_a_process_for_each_benchmark_and_a_profile(tmp_path):
    found = gpu.parts(tmp_path, tuning=True, is_small=False)
    names = [part.name for part in found]
    rooms = [f"tests of {room}" for room in gpu.ROOMS if gpu.gpu_files(room)]
    assert names == ["tests of kernels", "tuning", *rooms, *(f"benchmark of {name}" for name in gpu.BENCHES), "profile"]
    assert sum(part.weight for part in found) <= 9 * 60
    assert [part.name for part in gpu.parts(tmp_path, tuning=False, is_small=False)] == [name for name in names if name != "tuning"]
    for part in found:
        paths = [Path(word) for word in part.command if word.endswith(".py")]
        assert paths
        assert all(path.exists() for path in paths)


def test_tests_of_kernels_begin_with_what_only_a_gpu_can_show(tmp_path):
    [part] = gpu.parts(tmp_path, tuning=False, is_small=False, only=["kernels"])
    folder = SCRIPT.parents[1] / "tests" / "kernels"
    files = [Path(word) for word in part.command if word.endswith(".py")]
    left_out = {folder / f"test_{name}.py" for name in gpu.NEED_NO_GPU}
    assert files[0] == folder / "test_gpu.py"
    assert len(files) == len(set(files))
    assert set(files) | left_out == set(folder.glob("test_*.py"))
    assert not left_out & set(files)


def test_tests_of_the_rooms_run_what_is_marked_for_a_gpu(tmp_path):
    found = gpu.parts(tmp_path, tuning=False, is_small=False, only=["tests"])[1:]
    assert [part.name for part in found] == ["tests of model", "tests of train", "tests of data"]
    for part in found:
        assert part.command[part.command.index("gpu") - 1] == "-m"
        files = [Path(word) for word in part.command if word.endswith(".py")]
        assert files
        assert not any(path.name == "test_schedule.py" for path in files)
    names = {part.name: {Path(word).name for word in part.command if word.endswith(".py")} for part in found}
    assert names["tests of train"] >= {"test_captured_gpu.py", "test_reduce.py"}
    assert {"nvidia.dali", "av", "soundfile"} <= set(found[2].needs)
    assert all("PIL" in part.needs for part in found)


def test_parts_can_be_chosen_by_a_word(tmp_path):
    def chosen(*only):
        return [part.name for part in gpu.parts(tmp_path, tuning=True, is_small=False, only=only)]

    assert chosen("step", "profile") == ["benchmark of step", "profile"]
    assert chosen("tuning") == ["tuning"]
    assert chosen("ste") == []
    done = subprocess.run([sys.executable, str(SCRIPT), "--small", "--out", str(tmp_path), "--only", "ste"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part is called so; there are: tests of kernels, tuning" in " ".join(done.stderr.split())


def test_a_part_that_lacks_a_package_is_left_out_and_the_others_are_not(log):
    part = Part(name="part", command=("-c", "raise SystemExit(1)"), weight=1, needs=("torch", "no_such_package"))
    ended = gpu.run(part, 60, log, gpu.variables(True))
    assert (ended.is_well, ended.words) == (True, "left out: no_such_package not installed")
    assert not card.is_installed("no_such_package.inside")


def test_every_benchmark_is_run_but_those_of_a_cpu():
    written = {path.stem.removeprefix("bench_") for path in SCRIPT.parent.glob("bench_*.py")}
    assert set(gpu.BENCHES) == written - {"data", "schedule"}
    assert set(gpu.NEEDS) == set(gpu.BENCHES) - set(gpu.KERNEL_BENCHES) | {"data"}


def test_no_part_is_so_short_that_imports_are_all_it_does(tmp_path):
    weights = {part.name: part.weight for part in gpu.parts(tmp_path, tuning=True, is_small=False)}
    assert all(weights[f"tests of {room}"] >= 30 for room in gpu.ROOMS)
    assert all(weights[f"benchmark of {name}"] >= 25 for name in gpu.BENCHES)


def test_a_part_that_fails_is_told_with_its_last_words(log):
    ended = gpu.run(python("print('working'); raise SystemExit('no memory')"), 60, log, gpu.variables(True))
    assert not ended.is_well
    assert ended.words == "status 1; no memory"
    assert gpu.run(python("print('done')"), 60, log, gpu.variables(True)).is_well


def test_words_of_a_part_need_not_be_utf_8(log):
    ended = gpu.run(python(r"import sys; sys.stdout.buffer.write(b'no \xff memory\n')"), 60, log, gpu.variables(True))
    assert ended.words == "no \N{REPLACEMENT CHARACTER} memory"


def test_a_part_is_told_how_long_it_has(log):
    ended = gpu.run(python("import sys; print(*sys.argv[1:])", told=True), 60, log, gpu.variables(True))
    assert ended.words == "--seconds 40"


def test_a_part_that_takes_too_long_is_interrupted_and_then_killed(log, monkeypatch):
    began = time.monotonic()
    ended = gpu.run(python("import time; print('asleep', flush=True); time.sleep(60)"), 2, log, gpu.variables(True))
    assert not ended.is_well
    assert ended.words.startswith("out of time")
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    assert gpu.run(python(deaf), 3, log, gpu.variables(True)).words == "out of time; deaf"
    assert time.monotonic() - began < 40


def test_last_words_are_pytests_count_and_the_first_failures():
    failures = "".join(f"FAILED tests/test_{name}.py::test - AssertionError: no\n" for name in "abcde")
    output = f"....F\n{failures}=== 5 failed, 12 passed, 1 skipped in 3.21s ===\n"
    assert gpu.last_words(output) == (
        "5 failed, 12 passed, 1 skipped in 3.21s; FAILED tests/test_a.py::test; FAILED tests/test_b.py::test; "
        "FAILED tests/test_c.py::test; and 2 more"
    )
    assert gpu.last_words("one\ntwo\n\n") == "two"
    assert gpu.last_words("") == "no output"


def test_what_benchmarks_wrote_is_put_together_and_a_missing_one_is_no_harm(tmp_path):
    for name, group in (("attention", "a"), ("update", "b"), ("step", "c")):
        (tmp_path / f".{name}.json").write_text(json.dumps({"machine_info": {}, "benchmarks": [{"group": group}]}))
    (tmp_path / ".mlp.json").touch()
    (tmp_path / ".train.json").write_text('{"machine_info": {}, "benchm')
    assert [bench["group"] for bench in gpu.gather(tmp_path)["benchmarks"]] == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["benchmarks.json"]


def test_tuning_is_told_where_blocks_changed(tmp_path):
    path = tmp_path / "tuning.json"
    case = {"op": "sgd_update", "size": [1000], "old": "BLOCK=1024", "new": "BLOCK=2048", "old_us": 12.0, "new_us": 11.0}
    path.write_text(json.dumps({"cases": [case, case | {"new": "BLOCK=1024"}, case | {"new": None}, case | {"old_us": None}]}))
    began = path.stat().st_mtime
    assert gpu.tuning_lines(path, began) == [
        "sgd_update 1000: BLOCK=1024 12.0 us → BLOCK=2048 11.0 us",
        "sgd_update 1000: BLOCK=1024 (refused) → BLOCK=2048 11.0 us",
    ]
    assert gpu.tuning_lines(path, began + 1) == []
    assert gpu.tuning_lines(tmp_path / "missing", began) == []
    path.write_text('{"cases": [')
    assert gpu.tuning_lines(path, began) == []


def test_without_a_gpu_the_command_says_so(tmp_path):
    if card.HAS_GPU:
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_packages_that_every_part_needs_the_command_names_them(tmp_path):
    done = subprocess.run([sys.executable, "-ES", str(SCRIPT), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("these packages are needed and not installed: torch, triton")
    assert "jaxtyping" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_says_what_is_written_and_what_holds_unless_told_otherwise():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert not done.returncode
    for words in ("summary.txt", "polyvit_kernels/tile_table.py", "stop after this many minutes, all parts together (default: 9)"):
        assert words in text


def test_a_file_in_the_place_of_the_folder_is_told_before_anything_runs(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, str(SCRIPT), "--small", "--out", str(tmp_path / "file")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--out: {tmp_path / 'file'} is a file; a folder is needed" in done.stderr


def test_every_part_runs_on_a_cpu_and_the_table_comes_last(tmp_path):
    table = gpu.TABLE_PATH.read_text()
    command = [sys.executable, str(SCRIPT), "--small", "--out", str(tmp_path), "--minutes", "5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert not done.returncode, done.stdout + done.stderr
    assert done.stdout.endswith((tmp_path / "summary.txt").read_text())
    lines = done.stdout.splitlines()
    for kernel in ("attention forward", "MLP + residual backward", "add + LayerNorm backward", "patch embed forward", "AdamW step"):
        assert any(line.startswith(kernel) and " eager " in line for line in lines[-40:]), kernel
    assert any(line.startswith("mixed, made once") and "waits for data" in line for line in lines)
    assert lines[-1].startswith("PolyViT-Ti, three tasks")
    assert "ours / it" in lines[-1]
    assert "matmul" in (tmp_path / "profile.txt").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert all(f"{name}_update 3000: " in log for name in ("adamw", "sgd"))
    assert gpu.TABLE_PATH.read_text() == table
    benches = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    assert {bench["extra_info"]["contender"] for bench in benches} >= {"ours", "eager"}
    raced = [bench["stats"]["data"] for bench in benches if "absent" in bench["extra_info"]]
    assert all(len(times) == 1 and times[0] > 0 for times in raced)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.txt", "benchmarks.json", "profile.txt", "log.txt", "tile_table.py"}
