"""What happens in a run: the schedule, the step, the loop, evaluation, checkpoints, logs.

The folder can be called, too: polyvit_fast.train(config, out="runs/mine") trains; see polyvit_fast.inference.training.train.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallableFolder(ModuleType):
    """This folder of modules, which is `polyvit_fast.train(config)` too: Python puts it where that function would stand."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `polyvit_fast.inference.training.train`."""
        return import_module("polyvit_fast.inference.training").train(*args, **options)


sys.modules[__name__].__class__ = _CallableFolder
