"""Entry point of `polyvit-fast` and `python -m polyvit_fast`.

Signals are handled from here on, before the imports of the command line, which take seconds.
"""

import sys

from polyvit_fast.train.signals import Stopped, exit_code, stop_on_signals


def main() -> None:
    """Entry point of `polyvit-fast`."""
    try:
        with stop_on_signals():
            from polyvit_fast import cli

            cli.main()
    except Stopped as stopped:
        print(f"polyvit-fast: stopped by {stopped} before it began", file=sys.stderr)
        sys.exit(exit_code(stopped.number))


if __name__ == "__main__":
    main()
