"""Signals that ask a run to save and end: Ctrl-C, the end of a session, and what clusters send before they kill."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ALWAYS = (signal.SIGINT, signal.SIGTERM)
UNLESS_IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""nohup has SIGHUP ignored, and that must stay so. SLURM's --signal, Grid Engine and LSF warn with the others."""


class Stopped(KeyboardInterrupt):
    """A signal came while there was nothing to save yet."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Which signal, the first of several, asked to stop; 0: none. It is the handler too."""

    def __init__(self) -> None:
        self.signal, self.at_once = 0, True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal; the first one raises Stopped as long as `at_once` holds."""
        first = not self.signal
        self.signal = self.signal or number
        if first and self.at_once:
            raise Stopped(number)

    @property
    def name(self) -> str:
        """As in SIGTERM."""
        return signal.Signals(self.signal).name


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, signals ask to stop instead of ending the process. Whoever enters inside of another gets the same `Stop`."""
    stop = signal.getsignal(signal.SIGTERM)
    if isinstance(stop, Stop):
        yield stop
        return
    stop = Stop()
    numbers = [*ALWAYS, *(number for number in UNLESS_IGNORED if signal.getsignal(number) != signal.SIG_IGN)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(number: int) -> int:
    """That of a command which a signal stopped: Ctrl-C's is the shells', all others ask to start the command again (EX_TEMPFAIL)."""
    return 130 if number == signal.SIGINT else 75
