"""Real processes hold real run folders: on one machine, and as on two with a common file system."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product

import pytest
from long_forms import mark_long

from polyvit_fast.train.run_folder import lock
from polyvit_fast.train.run_folder.lock import LOCK, RUNNING

TOUCH_SECONDS, STALE_SECONDS = 0.5, 4.0

# Says "held", or why not, and stays until it is killed or its input ends. With the name of an error every lock is refused, as by file
# systems that have none. With a name it is another machine: its host and its boot are called otherwise, and unless locks are shared it
# locks a file of its own, as on file systems whose locks end at the machine.
HOLDER = f"""
import errno, fcntl, platform, resource, signal, sys
from pathlib import Path
from polyvit_fast.train.run_folder import lock

folder, without_locks, name, common_locks, full = sys.argv[1:]
lock.TOUCH_SECONDS, lock.STALE_SECONDS = {TOUCH_SECONDS}, {STALE_SECONDS}
if without_locks:
    def refuse(descriptor, command):
        raise OSError(getattr(errno, without_locks), "no locks here")
    fcntl.lockf = refuse
if name:
    platform.node, lock._identify_machine = lambda: name, lambda: f"boot of {{name}}"
    lock.LOCK = lock.LOCK if common_locks else f"{{name}}.lock"
if full:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    with lock.hold(Path(folder), report=lambda text: print("report:", text, flush=True)):
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print("refused:", error, flush=True)
"""


@dataclass(frozen=True)
class Machine:
    """Where a process of a test believes that it runs."""

    name: str
    common_locks: bool


@dataclass
class Process:
    """One that tries to hold a run folder."""

    popen: subprocess.Popen
    reports: list[str] = field(default_factory=list)

    def answer(self) -> str:
        """Its last word: held, or refused and why."""
        assert self.popen.stdout
        for line in self.popen.stdout:
            if not line.startswith("report: "):
                return line.strip()
            self.reports.append(line.strip())
        raise AssertionError(f"it ended with {self.popen.wait()}")

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()

    def leave(self) -> None:
        assert self.popen.stdin
        self.popen.stdin.close()
        assert self.popen.wait(30) == 0


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path) -> Iterator[Start]:
    """A function that starts a process on the folder `run`, on a machine, without locks where it gets an error's name, on a full disk."""
    started = []
    (tmp_path / "run").mkdir()

    def run(machine: Machine | None = None, without_locks: str = "", full: bool = False) -> Process:
        name, common = (machine.name, machine.common_locks) if machine else ("", True)
        options = [without_locks, name, "shared" if common else "", "full" if full else ""]
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), *options]
        process = Process(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        for stream in (process.popen.stdin, process.popen.stdout):
            with suppress(OSError):
                stream.close()


@contextmanager
def takes(at_least: float, at_most: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert at_least <= time.monotonic() - began <= at_most


def test_a_second_process_is_refused_with_who_where_and_since_when(tmp_path, start):
    first = start()
    assert first.answer() == "held"
    before = (tmp_path / "run" / RUNNING).read_bytes()
    printed = start().answer()
    expected = rf"refused: the run folder .*/run is in use: process {first.popen.pid} on \S+ trains in it since 20\d\d-\d\d-\d\d \d\d:"
    assert re.match(expected, printed), printed
    assert f"(kill {first.popen.pid}: it saves first), or choose another --out" in printed
    assert "gone for good" not in printed
    assert (tmp_path / "run" / RUNNING).read_bytes() == before
    assert start().answer().startswith("refused")  # the refused one's end has not freed it
    first.leave()
    assert not (tmp_path / "run" / RUNNING).exists()
    assert start().answer() == "held"


def test_a_killed_process_refuses_nobody(tmp_path, start):
    first = start()
    assert first.answer() == "held"
    first.kill()
    assert (tmp_path / "run" / RUNNING).exists()
    next_one = start()
    assert next_one.answer() == "held"
    assert not next_one.reports  # at once: on the same machine the lock says all
    assert json.loads((tmp_path / "run" / RUNNING).read_text())["pid"] == next_one.popen.pid


def test_a_stopped_process_still_holds_its_folder(start):
    first = start()
    assert first.answer() == "held"
    first.popen.send_signal(signal.SIGSTOP)
    time.sleep(STALE_SECONDS + 1)
    assert start().answer().startswith("refused")


def test_another_machine_with_common_locks_is_refused_at_once(tmp_path, start):
    one, other = (Machine(name, common_locks=True) for name in ("node-a", "node-b"))
    first = start(one)
    assert first.answer() == "held"
    printed = start(other).answer()
    assert f"process {first.popen.pid} on node-a trains in it" in printed
    assert f"Should node-a be gone for good and the file server not know, delete {tmp_path / 'run' / LOCK}" in printed
    first.leave()
    late = start(other)
    assert late.answer() == "held"
    assert not late.reports


@pytest.mark.parametrize("without_locks", mark_long(["", "ENOLCK", "EOPNOTSUPP"], ["ENOLCK"]))
def test_where_locks_do_not_reach_the_other_machine_running_json_decides(tmp_path, start, without_locks):
    one, other = (Machine(name, common_locks=False) for name in ("node-a", "node-b"))
    first = start(one, without_locks)
    assert first.answer() == "held"
    assert any("has no locks" in text for text in first.reports) == bool(without_locks)
    second = start(other, without_locks)
    assert second.answer().startswith(f"refused: the run folder {tmp_path / 'run'} is in use: process {first.popen.pid} on node-a")
    first.kill()
    third = start(other, without_locks)
    with takes(STALE_SECONDS - 0.5, 60):
        assert third.answer() == "held"
    assert any("on node-a did not say that it ended; it is gone if" in text for text in third.reports)
    assert start(one, without_locks).answer().startswith("refused")


def test_after_an_end_nobody_waits_for_a_sign_of_life(start):
    one, other = (Machine(name, common_locks=False) for name in ("node-a", "node-b"))
    first = start(one)
    assert first.answer() == "held"
    first.leave()
    second = start(other)
    assert second.answer() == "held"
    assert not second.reports


@pytest.mark.parametrize(("without_locks", "stale"), mark_long(product(["", "ENOLCK"], [False, True]), [("", True), ("ENOLCK", False)]))
def test_of_several_that_start_at_once_one_is_let_in(tmp_path, start, without_locks, stale):
    if stale:
        gone = start(Machine("node-z", common_locks=False), without_locks)
        assert gone.answer() == "held"
        gone.kill()
    machines = [Machine(f"node-{letter}", common_locks=False) for letter in "abc"]
    answers = [process.answer() for process in [start(each, without_locks) for each in machines]]
    assert sorted(answer.split(":")[0] for answer in answers) == ["held", "refused", "refused"]
    assert json.loads((tmp_path / "run" / RUNNING).read_text())["host"] == machines[answers.index("held")].name


def claim(name) -> lock.Holder:
    return lock.Holder(name, 1, "now", f"boot of {name}")


def test_who_comes_late_to_a_stale_file_is_refused_and_the_new_one_is_never_missing(tmp_path):
    """Of two that waited for the same stale file the second must not move away what the first has made of it: a third would get in."""
    (tmp_path / RUNNING).write_text("stale")
    stamp = lock._read_stamp(tmp_path / RUNNING)
    first, second = claim("a"), claim("b")
    assert lock._replace_stale(tmp_path, stamp, first)
    new = lock._read_stamp(tmp_path / RUNNING)
    with pytest.raises(ValueError, match="process 1 on a trains in it"):
        lock._replace_stale(tmp_path, stamp, second)
    assert lock._read_stamp(tmp_path / RUNNING) == new
    assert [path.name for path in tmp_path.iterdir()] == [RUNNING]


def test_who_was_killed_while_it_replaced_a_stale_file_does_not_lock_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.3)
    (tmp_path / RUNNING).write_text("stale")
    stamp = lock._read_stamp(tmp_path / RUNNING)
    (tmp_path / f".{RUNNING}.{stamp[0]}-{stamp[1]}").write_text("half of it")
    assert not lock._replace_stale(tmp_path, stamp, claim("a"))
    assert lock._replace_stale(tmp_path, stamp, claim("a"))
    assert [path.name for path in tmp_path.iterdir()] == [RUNNING]


def test_who_waits_for_a_dead_one_is_the_one_that_is_named(start):
    gone = start(Machine("node-a", common_locks=True))
    assert gone.answer() == "held"
    gone.kill()
    waiting = start()
    assert waiting.popen.stdout
    assert "did not say that it ended" in waiting.popen.stdout.readline()
    assert f"process {waiting.popen.pid} on" in (printed := start().answer())
    assert "is about to train in it" in printed
    assert waiting.answer() == "held"


def test_a_running_json_that_a_power_cut_left_empty_does_not_lock_for_ever(tmp_path, start):
    (tmp_path / "run" / RUNNING).touch()
    process = start()
    assert process.answer() == "held"
    assert any("another process did not say that it ended" in text for text in process.reports)


@pytest.mark.parametrize(("full", "reason"), [(True, "File too large"), (False, "Is a directory")])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, start, full, reason):
    folder = tmp_path / "run"
    if not full:
        (folder / LOCK).mkdir()
    assert start(full=full).answer() == f"refused: the run folder {folder} cannot be written: {reason}; choose another with --out"
    assert [path.name for path in folder.iterdir()] == ([] if full else [LOCK])


def test_a_start_that_writes_nothing_leaves_no_lock_and_one_that_does_keeps_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(KeyboardInterrupt), lock.hold(folder):
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    with lock.hold(folder):
        (folder / "log.txt").touch()
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "log.txt", LOCK}
    with lock.hold(folder):
        pass
    assert (folder / LOCK).exists()  # not this one's to delete


def test_a_lock_that_was_deleted_before_it_was_taken_is_not_relied_on(tmp_path, start, monkeypatch):
    """A start that fails deletes its lock file while another has it open already: that one must lock the file that the next one finds."""
    folder, opened = tmp_path / "run", []
    real = lock._try_lock

    def delete_and_lock(descriptor: int, folder, report) -> bool:
        if not opened:
            (folder / LOCK).unlink()
        opened.append(descriptor)
        return real(descriptor, folder, report)

    monkeypatch.setattr(lock, "_try_lock", delete_and_lock)
    with lock.hold(folder):
        assert len(opened) == 2
        assert start().answer().startswith(f"refused: the run folder {folder} is in use")
