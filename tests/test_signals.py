"""Real processes get real signals at every stage of a run."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import SECONDS, Command

from polyvit_fast.signals import Stop, Stopped, exit_code, stop_on_signals
from polyvit_fast.train.run_folder import checkpoint

EXPERIMENT = '''"""Small and long; each part of it that a test names is slow, and says when it is there."""
import os, time
from dataclasses import dataclass
from pathlib import Path
from polyvit_fast.config import ComputeOptions, DataOptions, LogOptions, Model, Task, Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.synthetic import Synthetic

def reach(stage, seconds):
    if stage == Path("slow").read_text():
        Path("reached").touch()
        time.sleep(seconds)

@dataclass(frozen=True, kw_only=True)
class Slow(Synthetic):
    def samples(self, task):
        reach("listing", 60)
        return super().samples(task)

    def decoder(self, task, *, train, **options):
        decode = super().decoder(task, train=train, **options)
        def decode_slowly(media, rngs):
            if not train:
                reach("evaluating", 0.5)
            return decode(media, rngs)
        return decode_slowly

sync = os.fsync
def sync_slowly(descriptor):
    if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == "model.safetensors":
        reach("saving", 3)
    sync(descriptor)
os.fsync = sync_slowly

reach("importing", 60)
source = Slow(num_samples=64)
config = Train(
    tasks={"a": Task(modality=Image(size=16, patch=8), train=source, val=source, num_classes=3, steps=100_000, batch=4)},
    model=Model(dim=16, depth=1, num_heads=2, mlp_dim=16), compute=ComputeOptions(compute_threads=1), data=DataOptions(num_threads=1),
    log=LogOptions(log_every_steps=20, save_every_steps=50_000), out="run", device="cpu")
'''
TRAIN = ["train", "exp.py"]


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Command]]:
    """A function that starts a training in a folder of its own, slow at a stage, with these flags and options of `Command`."""
    started = []

    def run(stage: str = "", *flags: str, **options) -> Command:
        (tmp_path / "exp.py").write_text(EXPERIMENT)
        (tmp_path / "slow").write_text(stage)
        started.append(Command(*TRAIN, *flags, folder=tmp_path, **options))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_lines(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def saved_step(folder: Path) -> int:
    newest = checkpoint.find_newest(folder / "run", pytest.fail)
    assert newest
    return newest.step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT"])
def test_a_signal_while_training_saves_and_stops(tmp_path, start, name):
    process = start()
    wait_for(lambda: num_lines(tmp_path))
    process.send_signal(signal.Signals[name])
    assert process.wait(SECONDS) == (130 if name == "SIGINT" else 75)
    step = saved_step(tmp_path)
    assert step >= 20
    assert f"stopped by {name} after step {step}; the checkpoint is saved" in (tmp_path / "said").read_text()


def test_under_nohup_the_end_of_a_session_ends_nothing(tmp_path, start):
    process = start(ignored=[signal.SIGHUP])
    wait_for(lambda: num_lines(tmp_path))
    process.send_signal(signal.SIGHUP)
    lines = num_lines(tmp_path)
    wait_for(lambda: num_lines(tmp_path) > lines + 2)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(SECONDS) == 75
    assert saved_step(tmp_path) > 20 * lines


@pytest.mark.parametrize("stage", ["importing", "listing"])
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_before_the_first_step_stops_at_once_and_leaves_nothing(tmp_path, start, stage, name):
    process = start(stage)
    wait_for((tmp_path / "reached").exists)
    began = time.monotonic()
    process.send_signal(signal.Signals[name])
    assert process.wait(SECONDS) == (130 if name == "SIGINT" else 75)
    assert time.monotonic() - began < 30
    said = (tmp_path / "said").read_text()
    assert said.splitlines()[-1] == f"polyvit-fast train: stopped by {name}" + " before its first step" * (stage == "listing")
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "running.json").exists()


def test_a_signal_during_an_evaluation_leaves_the_rest_of_it_and_saves(tmp_path, start):
    process = start("evaluating", "--eval-every-steps", "30", "--tasks.a.batch", "1")
    wait_for((tmp_path / "reached").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(SECONDS) == 75
    assert saved_step(tmp_path) == 30
    assert '"eval"' not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_two_signals_during_a_save_let_it_end_and_the_first_counts(tmp_path, start):
    process = start("saving", "--save-every-steps", "30")
    wait_for((tmp_path / "reached").exists)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 75
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000030"]
    assert saved_step(tmp_path) == 30
    assert "stopped by SIGUSR1 after step 30" in (tmp_path / "said").read_text()


def test_a_terminal_that_closes_takes_no_step_along(tmp_path, start):
    """Its end sends SIGHUP, and from then on nothing can be printed there."""
    ours, theirs = pty.openpty()
    process = start(output=os.ttyname(theirs))
    reader = threading.Thread(target=drain, args=(ours, tmp_path), daemon=True)
    reader.start()
    reader.join(SECONDS)
    os.close(theirs)
    os.close(ours)
    assert process.wait(SECONDS) == 75
    assert saved_step(tmp_path) >= 20
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "stopped by SIGHUP" in said
    assert "the terminal is not written any more" in said


def drain(terminal: int, folder: Path) -> None:
    """Read until the run has made some steps."""
    while num_lines(folder) < 2:
        os.read(terminal, 1 << 16)


def test_a_pipe_that_nobody_reads_any_more_takes_no_step_along(tmp_path, start):
    os.mkfifo(tmp_path / "pipe")
    process = start(output="pipe")
    with (tmp_path / "pipe").open() as pipe:
        pipe.readline()
    # It is closed, as where `| tee` died with its terminal.
    wait_for(lambda: num_lines(tmp_path) > 3)
    process.send_signal(signal.SIGHUP)
    assert process.wait(SECONDS) == 75
    assert saved_step(tmp_path) >= 60


def test_the_first_signal_counts_and_raises_once_until_there_is_something_to_save():
    with stop_on_signals() as stop:
        with pytest.raises(Stopped, match="SIGUSR1") as found:
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # while what was begun is put away
        assert (stop.signal, stop.name, found.value.number) == (signal.SIGUSR1, "SIGUSR1", signal.SIGUSR1)
    assert [exit_code(number) for number in (signal.SIGINT, signal.SIGHUP)] == [130, 75]


def test_handlers_are_the_same_inside_and_restored_after():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)}
    with stop_on_signals() as stop:
        with stop_on_signals() as inner:
            assert inner is stop
            inner.at_once = False
            os.kill(os.getpid(), signal.SIGXCPU)
        assert (stop.signal, stop.at_once) == (signal.SIGXCPU, True)
        assert isinstance(signal.getsignal(signal.SIGTERM), Stop)
    assert before == {number: signal.getsignal(number) for number in before}


def catches(process: subprocess.Popen) -> bool:
    """Whether the handlers are there: of SIGTERM, Python itself has none."""
    caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
@pytest.mark.parametrize(
    ("command", "seconds"),
    [("list", 0.0), ("train demo --help", 0.1), ("plan smoke", 0.5), ("predict run a.jpg", 0.2), ("train smoke", 1.0)],
)
def test_a_signal_while_a_command_imports_is_one_sentence(tmp_path, command, seconds, name, code):
    """Also a second one right after it. From the interpreter's own start on, which takes some hundredths of a second."""
    process = subprocess.Popen([sys.executable, "-m", "polyvit_fast", *command.split()], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: catches(process))
    time.sleep(seconds)
    for _ in range(2):
        process.send_signal(signal.Signals[name])
    _, said = process.communicate(timeout=SECONDS)
    assert (process.returncode, said) == (code, f"polyvit-fast {command.split()[0]}: stopped by {name}\n") or (
        process.returncode,
        said,
    ) == (0, "")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


IN_IMPORTS = '''
import importlib, os, signal, sys, time
from pathlib import Path
from polyvit_fast.signals import Stopped, stop_on_signals
sys.path.insert(0, os.getcwd())
Path("slow.py").write_text("""
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
except BaseException:
    pass
""")

class Falls:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

with stop_on_signals() as stop:
    try:
        if sys.argv[1] == "import":
            importlib.import_module("slow")
        else:
            Falls()
        print("goes on", flush=True)
        time.sleep(60)
    except Stopped as stopped:
        print("stopped by", stopped)
'''


@pytest.mark.parametrize("where", ["import", "destructor"])
def test_what_would_be_swallowed_is_raised_a_little_later(tmp_path, where):
    done = subprocess.run([sys.executable, "-c", IN_IMPORTS, where], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert (done.stdout, done.stderr) == ("goes on\nstopped by SIGTERM\n", "")


LEAVES = """
import os, signal, sys
from polyvit_fast.signals import end_quietly, leave_on_signals, stop_on_signals
leave_on_signals("polyvit-fast go")
print("begun")
if sys.argv[1] == "open":
    with stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            print("closed")
if sys.argv[1] == "done":
    end_quietly(7)
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("when", "code", "out", "error"),
    [
        ("before", 130, "begun\n", "polyvit-fast go: stopped by SIGINT\n"),
        ("done", 7, "begun\n", ""),
    ],
)
def test_a_process_ends_at_once_while_nothing_is_open(when, code, out, error):
    done = subprocess.run([sys.executable, "-u", "-c", LEAVES, when], capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, error)


def test_what_is_open_is_closed_first():
    done = subprocess.run([sys.executable, "-c", LEAVES, "open"], capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout == "begun\nclosed\n"
    assert "Stopped: SIGINT" in done.stderr  # which the command line catches


def test_a_thread_that_may_handle_no_signals_runs_without():
    found = []

    def enter():
        with stop_on_signals() as stop:
            found.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, before)]
