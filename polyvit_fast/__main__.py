"""Entry point of `polyvit-fast` and `python -m polyvit_fast`.

Signals are handled from here on, before the imports of the command line, which take seconds.
"""

import sys

from polyvit_fast.signals import leave_on_signals


def main() -> None:
    """Entry point of `polyvit-fast`."""
    leave_on_signals(" ".join(["polyvit-fast", *sys.argv[1:2]]))
    from polyvit_fast import cli

    cli.main()


if __name__ == "__main__":
    main()
