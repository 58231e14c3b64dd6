"""Training from Python: `train`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from polyvit_fast import experiments
from polyvit_fast.config import Train
from polyvit_fast.train import loop
from polyvit_fast.train.run_folder.record import MADE_IN_PYTHON


def train(config: Train | str | os.PathLike[str], *, out: str | os.PathLike[str] = "") -> loop.Outcome:
    """Train a configuration, or an experiment by its name or file, in the run folder `out`; the same call resumes a stopped run.

    The run folder is like that of `polyvit-fast train`: `polyvit_fast.load` and `polyvit-fast eval` take it. Ctrl-C saves a checkpoint
    and ends the training: `signal` of the result is then not 0. Raises what `train.loop.train` raises.
    """
    if isinstance(config, Train):
        name = MADE_IN_PYTHON
    else:
        name = os.fspath(config)
        config = experiments.load(name)
    if out:
        config = replace(config, out=os.fspath(out))
    if not config.out:
        raise ValueError("the run needs a folder for its files: polyvit_fast.train(config, out='runs/mine')")
    return loop.train(config, name, sys.orig_argv)
