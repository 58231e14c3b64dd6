"""Entry point of `polyvit-fast` and `python -m polyvit_fast`.

Signals are handled from here on, before the imports of the command line, which take seconds.
"""

import os
import sys

from polyvit_fast.signals import leave_on_signals


def main() -> None:
    """Entry point of `polyvit-fast`."""
    _open_what_is_closed()
    leave_on_signals(" ".join(["polyvit-fast", *sys.argv[1:2]]))
    from polyvit_fast import cli

    cli.main()


def _open_what_is_closed() -> None:
    """Lead standard streams that whoever started the process has closed to nowhere: else the first files that it opens get their numbers,
    and what libraries print goes into these."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - for as long as the process lives


if __name__ == "__main__":
    main()
