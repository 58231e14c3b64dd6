"""What happens in a run: the schedule, the step, the loop, evaluation, checkpoints, logs.

The folder can be called, too: polyvit_fast.train(config, out="runs/mine") trains; see polyvit_fast.inference.training.train.
"""

import sys
from types import ModuleType


class _CallableFolder(ModuleType):
    """This folder of modules, which is `polyvit_fast.train(config)` too: Python puts it where that function would stand."""

    def __call__(self, *args: object, **options: object) -> object:
        """See `polyvit_fast.inference.training.train`."""
        from importlib import import_module

        return import_module("polyvit_fast.inference.training").train(*args, **options)


sys.modules[__name__].__class__ = _CallableFolder
