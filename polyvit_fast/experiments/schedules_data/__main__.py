"""Entry point of `python -m polyvit_fast.experiments.schedules_data`. Signals are handled before the imports, which take a second."""

import sys

from polyvit_fast.signals import leave_on_signals

if __name__ == "__main__":
    leave_on_signals("schedules_data")
    from polyvit_fast.experiments.schedules_data.command import main

    sys.exit(main(sys.argv[1:]))
