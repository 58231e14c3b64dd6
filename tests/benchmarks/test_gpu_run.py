"""The one command for a machine with a GPU: its plan, what is left when a part fails or the run is cut, and the whole on a CPU."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_step
import card
import gpu
import pytest
import tables
from gpu import Command, Part

SCRIPT = Path(gpu.__file__)


def python(*codes, **options):
    found = tuple(Command(name=f"command {number}", arguments=("-c", code), **options) for number, code in enumerate(codes))
    return Part(name="part", seconds=60, commands=found)


def run(part, folder, seconds=60):
    return sorted(gpu.run(part, seconds, folder, gpu.variables(True)), key=lambda one: one.name)


def start(folder, *options, **settings):
    command = [sys.executable, str(SCRIPT), "--small", "--out", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)


def files_of(command):
    return [Path(word) for word in command.arguments if word.endswith(".py")]


def test_a_part_gets_what_is_planned_and_what_the_others_do_not_need():
    assert gpu.limit(540, 45, [100, 200]) == 240
    assert gpu.limit(300, 45, [100, 200]) == 45
    assert gpu.limit(30, 45, [100, 200]) == 30


def test_parts_fill_nine_minutes_and_compilers_come_after_all_that_needs_none(tmp_path):
    found = list(gpu.parts(tmp_path))
    assert [part.name for part in found][:4] == ["tests for a GPU", "kernels", "steps", "other tests and the demo"]
    assert [part.name for part in found][4:7] == ["compiling peers", "steps compiled", "kernels compiled"]
    assert sum(part.seconds for part in found) <= 9 * 60 - gpu.LAST_SECONDS - gpu.GRACE_SECONDS
    for command in (command for part in found for command in part.commands):
        assert all(path.exists() for path in files_of(command))


@pytest.mark.parametrize("has_xdist", [True, False])
def test_all_that_is_marked_for_a_gpu_is_run_by_workers_or_by_a_process_for_each_file(tmp_path, monkeypatch, has_xdist):
    installed = card.is_installed
    monkeypatch.setattr(card, "is_installed", lambda module: has_xdist if module == "xdist" else installed(module))
    first, other = (part.commands for part in gpu.parts(tmp_path, only=["tests"]))
    files = {path.name for command in first for path in files_of(command)}
    assert files >= {"test_gpu.py", "test_captured_gpu.py", "test_gpu_decoding.py", "test_model_gpu.py", "test_reduce.py"}
    assert "test_schedule.py" not in files
    tests = (*first, *other)
    assert all(("-n" in command.arguments) == has_xdist for command in tests)
    assert has_xdist or all(len(files_of(command)) == 1 for command in tests)
    of_kernels = {path.name for command in tests for path in files_of(command) if path.parent.name == "kernels"}
    assert of_kernels | {f"test_{name}.py" for name in gpu.NEED_NO_GPU} == {path.name for path in gpu._files("kernels")}


def test_every_benchmark_is_run_but_those_of_a_cpu(tmp_path):
    written = {path.name for path in SCRIPT.parent.glob("bench_*.py")} - {"bench_data.py", "bench_schedule.py"}
    commands = [command for part in gpu.parts(tmp_path) for command in part.commands if "--contenders" in command.arguments]
    assert {path.name for command in commands for path in files_of(command)} == written


def test_parts_can_be_chosen_by_a_word_and_peers_are_compiled_for_those_alone(tmp_path):
    def chosen(*only):
        return [command.name for part in gpu.parts(tmp_path, only=only) for command in part.commands]

    assert chosen("steps", "profile") == ["steps", "compiling peers", "steps compiled", "profile"]
    assert chosen("demo") == ["demo"]
    assert chosen("kernels") == ["kernels", "compiling peers", "kernels compiled"]
    assert chosen("tuning") == ["tuning"]
    compiling = ["hopper's kernels compiled", "hopper's peers compiled"]
    assert chosen("hopper") == [*compiling, "hopper's kernels", "hopper's profile", "hopper's steps"]
    assert chosen("ste") == []
    [compiling] = [part for part in gpu.parts(tmp_path, only=["steps"]) if part.name == "compiling peers"]
    assert [path.name for path in files_of(compiling.commands[0])] == ["bench_step.py"]
    [kernels, peers] = next(gpu.parts(tmp_path, only=["hopper"])).commands
    assert [path.name for path in files_of(kernels)] == ["bench_attention.py", "bench_linear.py"]
    assert [path.name for path in files_of(peers)] == ["bench_step.py"]
    assert gpu.HOPPER_STEPS in peers.arguments
    done = start(tmp_path, "--only", "ste")
    assert "nothing has such a word in its name; there are: compiled, demo, kernels, loop," in " ".join(done.communicate()[0].split())
    assert done.returncode == 2


@pytest.mark.parametrize(("seconds", "compiles"), [(110, False), (176, False), (177, True)])
def test_nothing_is_compiled_that_there_is_no_time_to_race(tmp_path, seconds, compiles):
    todo = gpu.in_time(list(gpu.parts(tmp_path, only=["steps"])), seconds)
    assert [part.name for part in todo] == ["steps", *(["compiling peers", "steps compiled"] if compiles else [])]


def test_steps_on_hopper_are_those_of_the_models_that_are_named():
    chosen = [rivals.title for rivals in bench_step.ON_A_GPU if "nine" not in rivals.title and "ViT-Ti" not in rivals.title]
    assert gpu.HOPPER_STEPS == "not nine and not ViT-Ti"
    assert [title.partition("/")[0].partition(" ")[0] for title in chosen] == [
        "ViT-B",
        "ViT-B",
        "ViT-S",
        "ViT-L",
        "ViViT-B",
        "AST-B",
        "ViT-B",
    ]


def test_the_plan_says_what_is_cut_and_what_lacks_a_package(tmp_path):
    todo = [*gpu.parts(tmp_path, only=["profile"]), python("", needs=("torch", "no_such_package"))]
    assert gpu.plan_lines(todo, 30) == [
        "plan                       from    to  (seconds)",
        "profile                       0    15",
        "part                         15    30  cut, of 60 seconds; what was measured stays",
    ]
    assert gpu.lacking_lines(todo) == ["left out: command 0, as not installed: no_such_package"]
    assert gpu.plan_lines(todo, 20)[2] == "part                       no time is left"
    done = subprocess.run([sys.executable, str(SCRIPT), "--plan", "--minutes", "2"], capture_output=True, text=True)
    assert not done.returncode
    assert "steps                        90   110  cut" in done.stdout


def test_commands_run_side_by_side_and_each_tells_its_last_words(tmp_path):
    began = time.monotonic()
    wait = "import time; time.sleep(3); print('done')"
    good, failed, strange, also_good = run(
        python(wait, "print('working'); raise SystemExit('no memory')", r"import sys; sys.stdout.buffer.write(b'no \xff memory\n')", wait),
        tmp_path,
    )
    assert gpu.CORES < 2 or time.monotonic() - began < 6
    assert (good.is_well, good.words) == (also_good.is_well, also_good.words) == (True, "done")
    assert (failed.is_well, failed.words) == (False, "status 1; no memory")
    assert strange.words == "no \N{REPLACEMENT CHARACTER} memory"
    assert run(python("raise SystemExit(1)", needs=("no_such_package",)), tmp_path) == []
    assert not card.is_installed("no_such_package.inside")


def test_a_command_has_variables_of_its_own_and_the_demo_dumps_what_a_kernel_did_wrong(tmp_path):
    [ended] = run(python("import os; print(os.environ['WHERE'])", variables=(("WHERE", "here"),)), tmp_path)
    assert ended.words == "here"
    dumps = dict(gpu._demo(tmp_path, False).variables)
    assert dumps["CUDA_ENABLE_COREDUMP_ON_EXCEPTION"] == "1"
    assert Path(dumps["CUDA_COREDUMP_FILE"]).parent == tmp_path / "logs"


def test_what_takes_too_long_is_interrupted_and_then_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    began = time.monotonic()
    [cut] = run(python(deaf), tmp_path, seconds=3)
    assert (cut.is_well, cut.words) == (False, "cut; deaf")
    assert time.monotonic() - began < 30


def test_last_words_are_pytests_count_and_the_first_failures(tmp_path):
    log = tmp_path / "log"
    failures = "".join(f"FAILED tests/test_{name}.py::test - AssertionError: no\n" for name in "abcde")
    log.write_text(f"....F\n{failures}=== 5 failed, 12 passed, 1 skipped in 3.21s ===\n")
    assert gpu.last_words(log) == (
        "5 failed, 12 passed, 1 skipped in 3.21s; FAILED tests/test_a.py::test; FAILED tests/test_b.py::test; "
        "FAILED tests/test_c.py::test; and 2 more"
    )
    log.write_text("one\ntwo\n\n")
    assert gpu.last_words(log) == "two"
    log.write_text("")
    assert gpu.last_words(log) == "no output"


def test_without_a_gpu_the_command_says_so(tmp_path):
    if card.HAS_GPU:
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_packages_that_every_part_needs_the_command_names_them(tmp_path):
    done = subprocess.run([sys.executable, "-ES", str(SCRIPT), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("these packages are needed and not installed: torch, triton")
    assert "jaxtyping" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_used_is_told_before_anything_runs(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "measurements.jsonl").touch()
    for folder, message in ((tmp_path / "file", "is a file; a folder is needed"), (tmp_path, "has the measurements of an earlier run")):
        done = start(folder)
        assert message in " ".join(done.communicate()[0].split())
        assert done.returncode == 2


def wait_for_measurements(folder, count):
    latest = time.monotonic() + 240
    while len(rows := tables.read(folder / "measurements.jsonl")) < count:
        assert time.monotonic() < latest
        time.sleep(0.1)
    return rows


def processes_of(leader):
    """All of a session that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, *_, session = status.read_text().rpartition(")")[2].split()[:4]
            found += [int(status.parent.name)] if int(session) == leader and state != "Z" else []
    return found


def test_a_run_that_is_killed_keeps_what_it_had(tmp_path):
    process = start(tmp_path, "--only", "kernels", start_new_session=True)
    before = wait_for_measurements(tmp_path, 3)
    # As a machine that is taken away ends all of them, without a word.
    for number in processes_of(process.pid):
        os.kill(number, signal.SIGKILL)
    process.communicate()
    found = tables.read(tmp_path / "measurements.jsonl")
    assert found[: len(before)] == before
    done = subprocess.run(
        [sys.executable, SCRIPT.parent / "tables.py", tmp_path / "measurements.jsonl"], capture_output=True, text=True, check=True
    )
    assert any(line.startswith("attention forward") and " eager " in line for line in done.stdout.splitlines())


def test_a_run_that_is_asked_to_end_ends_its_part_and_tells_what_it_had(tmp_path):
    process = start(tmp_path, "--only", "kernels", start_new_session=True)
    wait_for_measurements(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert any(line.startswith("attention forward") for line in printed.splitlines())
    assert printed.endswith((tmp_path / "summary.txt").read_text())
    assert processes_of(process.pid) == []


def test_every_part_runs_on_a_cpu_and_the_tables_come_last(tmp_path):
    compiled = tmp_path / "compiled"
    done = start(
        tmp_path / "out", "--minutes", "60", env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(compiled), "TRITON_CACHE_DIR": str(compiled)}
    )
    printed, out = done.communicate()[0], tmp_path / "out"
    assert not done.returncode, printed
    assert printed.endswith((out / "summary.txt").read_text())
    lines = printed.splitlines()
    for part in ("kernels", "steps", "demo", "compiling peers", "steps compiled", "kernels compiled", "training loop", "profile"):
        assert any(line.startswith(part) for line in lines), part
    for kernel in ("attention forward", "MLP + residual backward", "add + LayerNorm backward", "patch embed forward", "AdamW step"):
        assert any(line.startswith(kernel) and " eager " in line for line in lines[-40:]), kernel
    assert any(line.startswith("sigmoid cross-entropy backward") and "torch.compile" in line for line in lines)
    assert any(line.startswith("mixed, made once") and "waits for data" in line for line in lines)
    assert lines[-1].startswith("PolyViT-Ti, three tasks")
    assert "ours / it" in lines[-1]
    assert any("cuBLAS" in line for line in lines)
    assert {path.name for path in out.iterdir()} == {"summary.txt", "measurements.jsonl", "profile.txt", "logs", "demo"}
    # What was timed had been compiled before.
    made, compiled_by = list(compiled.rglob("*.so")), (out / "logs" / "compiling-peers.txt").stat().st_mtime
    assert made
    assert max(path.stat().st_mtime for path in made) < compiled_by


def test_the_tuner_runs_where_it_is_asked_for_and_a_small_one_writes_nothing(tmp_path):
    table = (card.ROOT / "kernels" / "polyvit_kernels" / "tile_table.py").read_text()
    done = start(tmp_path, "--only", "tuning")
    printed = done.communicate()[0]
    assert not done.returncode, printed
    assert all(f"{name}_update 3000: " in printed for name in ("adamw", "sgd"))
    assert (card.ROOT / "kernels" / "polyvit_kernels" / "tile_table.py").read_text() == table
