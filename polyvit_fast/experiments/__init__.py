"""Experiments: one file each, with a `config` of type `Train`. The docstring of the file states command, cost and result."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import traceback
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from polyvit_fast.config import Train


def names() -> list[str]:
    """Names of the experiments that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def describe(name: str) -> str:
    """The first line of an experiment's docstring."""
    return (_module(name).__doc__ or "").strip().splitlines()[0]


def load(name: str) -> Train:
    """The `config` of an experiment, given its name or the path of its file; `out` is runs/NAME unless the experiment sets it.

    Raises ValueError with the cause: an unknown name, a missing file, an error in the file (with its line), no `config` in it.
    """
    config = getattr(_module(name), "config", None)
    if not isinstance(config, Train):
        raise ValueError(f"experiment {name}: it must define `config = Train(...)`, a polyvit_fast.config.Train")
    return config if config.out else replace(config, out=f"runs/{Path(name).stem}")


def _module(name: str) -> ModuleType:
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    if name.endswith(".py"):
        return _module_from_file(Path(name))
    close = difflib.get_close_matches(name, names(), 1)
    hint = f"perhaps you meant {close[0]}" if close else f"there are: {', '.join(names())}"
    raise ValueError(f"experiment {name!r} is unknown; {hint} (or give the path of a .py file)")


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"experiment file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"polyvit_experiment_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        where = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path.resolve()]
        line = error.lineno if isinstance(error, SyntaxError) else where[-1] if where else 0
        raise ValueError(f"experiment file {path}, line {line}: {type(error).__name__}: {error}") from error
    return module
