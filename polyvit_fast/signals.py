"""Signals that ask a run to save and end: Ctrl-C, the end of a session, and what clusters send before they kill.

Few imports: while Python starts this module, nobody handles signals yet.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any

ALWAYS = (signal.SIGINT, signal.SIGTERM)
UNLESS_IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""nohup has SIGHUP ignored, and that must stay so. SLURM's --signal, Grid Engine and LSF warn with the others."""
AGAIN_SECONDS = 3.0
"""After so long, something has swallowed Stopped, or waits for ever: another signal raises it once more."""
RETRY_SECONDS = 0.05


class Stopped(KeyboardInterrupt):
    """A signal came while there was nothing to save yet."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Which signal, the first of several, asked to stop; 0: none. It is the handler too.

    By turns it ends the process at once (`command` is not empty), raises Stopped so that what is open is closed, or, where `at_once` is
    False, only takes note.
    """

    def __init__(self, command: str = "") -> None:
        self.signal, self.at_once, self.command = 0, True, command
        self.num_imports, self.raised_at = 0, float("-inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal and do what is due."""
        self.signal = self.signal or number
        if self.command:
            self._leave()
        if not self.at_once or time.monotonic() - self.raised_at < AGAIN_SECONDS:
            return
        if _count_imports(frame) > self.num_imports or _is_deaf(frame):
            self._retry()
            return
        self.raised_at = time.monotonic()
        raise Stopped(self.signal)

    def _leave(self) -> None:
        """End the process without unwinding: an exception from within an import may be swallowed, or come out as another error."""
        number = self.signal
        text = f"{self.command}: stopped by {self.name}\n"
        with suppress(Exception):  # the handler may have come in the middle of a write
            sys.stdout.flush()
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())
        os._exit(exit_code(number))

    def _retry(self) -> None:
        signal.signal(signal.SIGALRM, lambda number, frame: self(self.signal, frame))
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)

    @property
    def name(self) -> str:
        """As in SIGTERM."""
        return signal.Signals(self.signal).name


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, signals raise Stopped, or ask to stop, instead of ending the process: what is open is closed.

    Whoever enters inside of another gets the same `Stop`.
    """
    from threading import current_thread, main_thread

    if current_thread() is not main_thread():  # Python lets that one alone handle signals
        yield Stop()
        return
    stop = signal.getsignal(signal.SIGTERM)
    if isinstance(stop, Stop):
        before = stop.command, stop.at_once, stop.num_imports
        stop.num_imports = _count_imports(sys._getframe()) if stop.command else stop.num_imports
        stop.command = ""
        try:
            yield stop
        finally:
            stop.command, stop.at_once, stop.num_imports = before
        return
    stop = Stop()
    stop.num_imports = _count_imports(sys._getframe())
    before = _install(stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_on_signals(command: str) -> None:
    """From now on signals end this process at once, but within `stop_on_signals`; the end is reported as that of `command`."""
    _install(Stop(command))
    atexit.register(_ignore_all)  # the first to be registered, it runs last


def end_quietly(code: int) -> None:
    """From now on signals end this process with this code, and say nothing: its work is done, and Python takes its time to end."""
    for number in (*ALWAYS, *_list_heeded()):
        signal.signal(number, lambda *_: os._exit(code))


def _ignore_all() -> None:
    """For the last moments, when Python has put away its own handlers: the exit code stands."""
    for number in (*ALWAYS, *_list_heeded()):
        signal.signal(number, signal.SIG_IGN)


def exit_code(number: int) -> int:
    """That of a command which a signal stopped: Ctrl-C's is the shells', all others ask to start the command again (EX_TEMPFAIL)."""
    return 130 if number == signal.SIGINT else 75


def _install(stop: Stop) -> dict[int, Any]:
    return {number: signal.signal(number, stop) for number in (*ALWAYS, *_list_heeded())}


def _list_heeded() -> list[int]:
    return [number for number in UNLESS_IGNORED if signal.getsignal(number) != signal.SIG_IGN]


def _count_imports(frame: FrameType | None) -> int:
    """How many imports are under way."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


def _is_deaf(frame: FrameType | None) -> bool:
    """Whether Python would print what is raised here, and go on: in destructors and callbacks of weak references."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.endswith(("weakref.py", "_weakrefset.py")):
            return True
        frame = frame.f_back
    return False
