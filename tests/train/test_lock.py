"""Real processes hold real run folders: on one machine, and, in namespaces of their own, as on two that share a file system."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from polyvit_fast.train.lock import LOCK, RECORD

RENEW_SECONDS, STALE_SECONDS = 0.5, 4.0

# Says "held", or why not, and stays until it is killed or its input ends. With the name of an error the kernel first refuses every lock, as
# file systems do that have none: a filter on fcntl's commands F_SETLK and F_SETLKW.
HOLDER = f"""
import ctypes, errno, platform, struct, sys
from pathlib import Path
from polyvit_fast.train import lock

def refuse_locks(number):
    assert platform.machine() == "x86_64"
    returns, equal, load = 0x06, 0x15, 0x20
    lines = [(load, 0, 0, 0), (equal, 0, 4, 72), (load, 0, 0, 24), (equal, 1, 0, 6), (equal, 0, 1, 7),
             (returns, 0, 0, 0x00050000 | number), (returns, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0, ctypes.get_errno()

lock.RENEW_SECONDS, lock.STALE_SECONDS = {RENEW_SECONDS}, {STALE_SECONDS}
if sys.argv[2]:
    refuse_locks(getattr(errno, sys.argv[2]))
try:
    with lock.hold(Path(sys.argv[1]), report=lambda text: print("report:", text, flush=True)):
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print("refused:", error, flush=True)
"""


@dataclass
class Machine:
    """Where processes of a test run: here, or with a host name, a boot and, unless locks are shared, a lock file of its own."""

    command: list[str] = field(default_factory=list)


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
    """A function that starts a process on the folder `run`, on a machine, without locks where it gets an error's name."""
    started = []
    (tmp_path / "run").mkdir()

    def run(machine: Machine | None = None, without_locks: str = "") -> Process:
        command = [*(machine.command if machine else ()), sys.executable, "-c", HOLDER, str(tmp_path / "run"), without_locks]
        process = Process(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        for stream in (process.popen.stdin, process.popen.stdout):
            with suppress(OSError):
                stream.close()


def machine(tmp_path: Path, name: str, *, shares_locks: bool) -> Machine:
    """Namespaces in which the host and the boot have names of their own; without shared locks, a lock file too, as on file systems whose
    locks end at the machine."""
    boot, lock, shared = tmp_path / f"{name}.boot", tmp_path / f"{name}.lock", tmp_path / "run" / LOCK
    boot.write_text(f"boot-of-{name}\n")
    for file in (lock, shared):
        file.touch()
    own_lock = "" if shares_locks else f"mount --bind {lock} {shared}; "
    setup = f'set -e; hostname {name}; mount --bind {boot} /proc/sys/kernel/random/boot_id; {own_lock}exec "$@"'
    return Machine(["unshare", "--map-root-user", "--uts", "--mount", "sh", "-c", setup, "sh"])


@contextmanager
def takes(at_least: float, at_most: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert at_least <= time.monotonic() - began <= at_most


def test_a_second_process_is_refused_and_told_who_where_and_since_when(tmp_path, start):
    first = start()
    assert first.answer() == "held"
    record = (tmp_path / "run" / RECORD).read_bytes()
    told = start().answer()
    expected = rf"refused: the run folder .*/run is in use: process {first.popen.pid} on \S+ trains in it since 20\d\d-\d\d-\d\d \d\d:"
    assert re.match(expected, told), told
    assert f"(kill {first.popen.pid}: it saves first), or choose another --out" in told
    assert "gone for good" not in told
    assert (tmp_path / "run" / RECORD).read_bytes() == record
    assert start().answer().startswith("refused")  # the refused one's end has not freed it
    first.leave()
    assert not (tmp_path / "run" / RECORD).exists()
    assert start().answer() == "held"


def test_a_killed_process_refuses_nobody(tmp_path, start):
    first = start()
    assert first.answer() == "held"
    first.kill()
    assert (tmp_path / "run" / RECORD).exists()
    next_one = start()
    assert next_one.answer() == "held"
    assert not next_one.reports  # at once: on the same machine the lock says all
    assert json.loads((tmp_path / "run" / RECORD).read_text())["pid"] == next_one.popen.pid


def test_a_stopped_process_still_holds_its_folder(start):
    first = start()
    assert first.answer() == "held"
    first.popen.send_signal(signal.SIGSTOP)
    time.sleep(STALE_SECONDS + 1)
    assert start().answer().startswith("refused")


def test_another_machine_that_shares_locks_is_refused_at_once(tmp_path, start):
    one, other = (machine(tmp_path, name, shares_locks=True) for name in ("node-a", "node-b"))
    first = start(one)
    assert first.answer() == "held"
    told = start(other).answer()
    assert f"process {first.popen.pid} on node-a trains in it" in told
    assert f"Should node-a be gone for good and the file server not know, delete {tmp_path / 'run' / LOCK}" in told
    first.leave()
    late = start(other)
    assert late.answer() == "held"
    assert not late.reports


@pytest.mark.parametrize("without_locks", ["", "ENOLCK", "EOPNOTSUPP"])
def test_where_locks_do_not_reach_the_other_machine_the_record_tells(tmp_path, start, without_locks):
    one, other = (machine(tmp_path, name, shares_locks=False) for name in ("node-a", "node-b"))
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


def test_after_an_end_nobody_waits_for_a_sign_of_life(tmp_path, start):
    one, other = (machine(tmp_path, name, shares_locks=False) for name in ("node-a", "node-b"))
    first = start(one)
    assert first.answer() == "held"
    first.leave()
    second = start(other)
    assert second.answer() == "held"
    assert not second.reports


@pytest.mark.parametrize("without_locks", ["", "ENOLCK"])
def test_of_several_that_start_at_once_one_is_let_in(tmp_path, start, without_locks):
    machines = [machine(tmp_path, f"node-{letter}", shares_locks=False) for letter in "abc"]
    answers = [process.answer() for process in [start(each, without_locks) for each in machines]]
    assert sorted(answer.split(":")[0] for answer in answers) == ["held", "refused", "refused"]


def test_a_record_that_a_power_cut_left_empty_is_not_believed_for_ever(tmp_path, start):
    (tmp_path / "run" / RECORD).touch()
    process = start()
    assert process.answer() == "held"
    assert any("another process did not say that it ended" in text for text in process.reports)


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("mount --bind {0} {0}; mount -o remount,bind,ro {0}", "Read-only file system"),
        ("mount -t tmpfs -o size=4k,nr_inodes=9 tmpfs {0}; head -c 4096 /dev/zero > {0}/full", "No space left on device"),
    ],
    ids=["read-only", "full"],
)
def test_a_folder_that_cannot_be_written_is_told(tmp_path, start, setup, reason):
    folder = tmp_path / "run"
    commands = f'set -e; {setup.format(folder)}; "$@"; rm -f {folder}/full; ls -A {folder}'
    process = start(Machine(["unshare", "--map-root-user", "--mount", "sh", "-c", commands, "sh"]))
    assert process.answer() == f"refused: the run folder {folder} cannot be written: {reason}; choose another with --out"
    assert process.popen.stdout
    assert process.popen.stdout.read().split() in ([], [LOCK])
