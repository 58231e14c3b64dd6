"""One run at a time in a run folder: a second one is refused before it touches anything, and a killed one leaves nothing that refuses.

The lock is POSIX's (`fcntl`), which ends with its process however that ends, and which NFS, Lustre and their like carry between machines.
Some file systems keep it within a machine, or have none. So the run also touches a small file, running.json, every few seconds: a process
that gets the lock, but finds that file from another machine, waits to see whether its time changes. Clocks are not compared, for they may
differ.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from polyvit_fast import strict_json

LOCK = "run.lock"
"""A start that fails before its run begins deletes the one that it made, and no other: see `_lock`."""
RUNNING = "running.json"
TOUCH_SECONDS = 5.0
STALE_SECONDS = 30.0
"""A process that has not touched its running.json for so long is gone."""
FLOCK = "hhlli"
"""C's struct flock: kind, whence, start, length, process."""
HELD = (errno.EACCES, errno.EAGAIN)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that a running.json names."""

    host: str
    pid: int
    started: str
    """Its date and time there, with the time zone."""
    machine: str
    """Differs even where host names are the same, and after each boot."""


@contextmanager
def hold(folder: Path, report: Callable[[str], None] = _logger.warning) -> Iterator[None]:
    """Inside, no other process trains in the run folder. Where nothing was written to it, nothing is left of the lock either.

    Raises ValueError, which says who does and what to do, when another process is there or the folder cannot be written.
    """
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        raise _build_write_error(folder, error) from error
    descriptor, locks = _lock(folder, report)
    try:
        holder = _claim(folder, locks, report)
        with _keep_touching(folder, holder):
            yield
    finally:
        with suppress(OSError):
            if LOCK not in there and set(os.listdir(folder)) == there | {LOCK}:
                os.unlink(folder / LOCK)
        os.close(descriptor)


def _lock(folder: Path, report: Callable[[str], None]) -> tuple[int, bool]:
    """(the open lock file, whether the file system has locks). Raises ValueError when another process holds it, or it cannot be written."""
    while True:
        # One descriptor, and nothing else here opens the file: to close any other would end a POSIX lock.
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _build_write_error(folder, error) from error
        try:
            locks = _try_lock(descriptor, folder, report)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                return descriptor, locks
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a start that failed deleted this file before it was locked here: a third process may lock the next one


def _try_lock(descriptor: int, folder: Path, report: Callable[[str], None]) -> bool:
    """Whether the file system has locks. Raises ValueError when another process holds this one."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise _build_refusal(folder, _find_lock_holder(descriptor)) from None
        if error.errno not in UNSUPPORTED:
            raise _build_write_error(folder, error) from error
        report(f"the file system of {folder} has no locks ({error.strerror}): only {RUNNING} shows another run there")
        return False
    return True


def _find_lock_holder(descriptor: int) -> int:
    """The process on this machine that holds the lock; 0 when it is on another one."""
    question = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        return max(0, struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, question))[4])
    except OSError:
        return 0


def _claim(folder: Path, locks: bool, report: Callable[[str], None]) -> Holder:
    """Write running.json for this process. Raises ValueError when the process of an earlier one is alive."""
    holder = Holder(platform.node(), os.getpid(), datetime.now().astimezone().isoformat(" ", "seconds"), _identify_machine())
    while True:
        try:
            _create(folder / RUNNING, holder)  # of two processes, only one can create it
            return holder
        except FileExistsError:
            earlier, stamp = _read(folder), _read_stamp(folder / RUNNING)
            if not (locks and earlier and earlier.machine == holder.machine):  # else it would still hold its lock
                _wait_until_stale(folder, earlier, stamp, report)
            if stamp and _replace_stale(folder, stamp, holder):
                return holder
        except OSError as error:
            _remove(folder, holder)
            raise _build_write_error(folder, error) from error


def _create(path: Path, holder: Holder) -> None:
    with open(path, "x") as file:
        file.write(strict_json.dumps(asdict(holder), 2) + "\n")


def _wait_until_stale(folder: Path, earlier: Holder | None, first: tuple[int, int] | None, report: Callable[[str], None]) -> None:
    """Raises ValueError when running.json is touched."""
    who = f"process {earlier.pid} on {earlier.host}" if earlier else "another process"
    report(f"{folder}: {who} did not say that it ended; it is gone if {folder / RUNNING} does not change within {STALE_SECONDS:g} s")
    deadline = time.monotonic() + STALE_SECONDS
    while (now := _read_stamp(folder / RUNNING)) and time.monotonic() < deadline:
        if now != first:
            raise _build_refusal(folder)
        time.sleep(0.2)


def _replace_stale(folder: Path, stamp: tuple[int, int], holder: Holder) -> bool:
    """Put a running.json of this process's in the stead of the stale one; False when that is gone.

    Raises ValueError when another process does so, or did. The file is never missing in between, when a third process could create it.
    """
    # Named after the stale file, so that of all processes that waited for it only one can create this.
    successor = folder / f".{RUNNING}.{stamp[0]}-{stamp[1]}"
    try:
        _create(successor, holder)
    except FileExistsError:
        _wait_for_successor(folder, successor)
        return False
    except OSError as error:
        successor.unlink(missing_ok=True)
        raise _build_write_error(folder, error) from error
    now = _read_stamp(folder / RUNNING)
    if now == stamp:
        os.replace(successor, folder / RUNNING)
        return True
    successor.unlink()
    if now:
        raise _build_refusal(folder)
    return False


def _wait_for_successor(folder: Path, successor: Path) -> None:
    """Raises ValueError unless the process that made this file was killed before it could rename it."""
    deadline, first = time.monotonic() + STALE_SECONDS, _read_stamp(successor)
    while time.monotonic() < deadline:
        if _read_stamp(successor) != first:
            raise _build_refusal(folder)
        time.sleep(0.2)
    successor.unlink(missing_ok=True)


def _read_stamp(path: Path) -> tuple[int, int] | None:
    """The inode of a file and when the file system saw it touched; None when there is none."""
    try:
        with open(path, "rb") as file:  # opening it makes NFS ask the server
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _keep_touching(folder: Path, holder: Holder) -> Iterator[None]:
    """Inside, a thread touches running.json; then it is deleted."""
    ended = threading.Event()
    touching = threading.Thread(target=_touch_until, args=(folder / RUNNING, ended), daemon=True, name="running")
    touching.start()
    try:
        yield
    finally:
        ended.set()
        touching.join(TOUCH_SECONDS)
        _remove(folder, holder)


def _remove(folder: Path, holder: Holder) -> None:
    """Delete running.json if it is this process's, or what a full disk left of it."""
    if _read(folder) in (holder, None):
        with suppress(OSError):
            os.unlink(folder / RUNNING)


def _touch_until(path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_SECONDS):
        with suppress(OSError):  # a server that does not answer for a while is no reason to stop
            os.utime(path)


def _read(folder: Path) -> Holder | None:
    try:
        return Holder(**json.loads((folder / RUNNING).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _identify_machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _build_refusal(folder: Path, pid: int = 0) -> ValueError:
    """`pid`: the process on this machine that holds the lock, if it is known."""
    holder = _read(folder)
    if pid and (holder is None or holder.pid != pid):
        return ValueError(
            f"the run folder {folder} is in use: process {pid} on {platform.node()} is about to train in it; wait for its end, stop it "
            f"(kill {pid}), or choose another --out"
        )
    if holder is None:
        return ValueError(f"the run folder {folder} is in use: another process trains in it; wait for its end, or choose another --out")
    advice = f"wait for its end, stop it there (kill {holder.pid}: it saves first), or choose another --out"
    if holder.machine != _identify_machine():
        advice += f". Should {holder.host} be gone for good and the file server not know, delete {folder / LOCK}"
    return ValueError(
        f"the run folder {folder} is in use: process {holder.pid} on {holder.host} trains in it since {holder.started}; {advice}"
    )


def _build_write_error(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"the run folder {folder} cannot be written: {error.strerror or error}; choose another with --out")
