"""Experiments: one file each, with a `config` of type `Train`. The docstring of the file states command, cost and result."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from polyvit_fast.config import Train
from polyvit_fast.experiments.loading.run_file import run_file


def names() -> list[str]:
    """Names of the experiments that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def describe(name: str) -> str:
    """The first line of an experiment's docstring."""
    return (_module(name).__doc__ or "").strip().splitlines()[0]


def find_maker(name: str) -> str:
    """The command that makes an experiment's files, as its docstring says; empty when there is none."""
    lines = (_module(name).__doc__ or "").splitlines()
    return next((line.removeprefix("Files: ") for line in lines if line.startswith("Files: python -m ")), "")


def load(name: str) -> Train:
    """The `config` of an experiment, given its name or the path of its file; `out` is runs/NAME unless the experiment sets it.

    Raises ValueError with the cause: an unknown name, a missing file, an error in the file (with its line), no `config` in it.
    """
    module = _module(name)
    config = getattr(module, "config", None)
    if not isinstance(config, Train):
        raise ValueError(f"experiment {name}: it must define `config = Train(...)`, a polyvit_fast.config.Train{_explain(module)}")
    return config if config.out else replace(config, out=f"runs/{Path(name).stem}")


def _explain(module: ModuleType) -> str:
    """What `config` is instead of a configuration, and what to do about it: the end of a sentence."""
    values = vars(module)
    if "config" not in values:
        others = [name for name, value in values.items() if isinstance(value, Train)]
        return f", and has none; rename {others[0]} to config" if others else ", and has none"
    match values["config"]:
        case type() as kind:
            return f", and not the class {kind.__name__}" + (": write Train(...), with brackets" if issubclass(kind, Train) else "")
        case (Train(),):
            return ", and not a tuple: remove the comma after its last bracket"
        case value if callable(value):
            return f", and not a function: call it, config = {getattr(value, '__name__', 'config')}()"
        case value:
            return f", and not a {type(value).__name__}"


def _module(name: str) -> ModuleType:
    path = Path(name)
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    if name.endswith(".py") and path.is_file():
        return run_file(path)
    if (path / "config.json").is_file():
        commands = path / "command.txt"
        again = commands.read_text(errors="replace").strip().splitlines()[-1:] if commands.is_file() else []
        raise ValueError(
            f"{path.absolute()} is a run folder, not an experiment: evaluate it with polyvit-fast eval {name}, "
            f"or resume it with the command that began it{': ' + again[0] if again else ''}"
        )
    if path.exists():
        what = "a folder" if path.is_dir() else "no file that ends in .py" if path.is_file() else "no regular file"
        raise ValueError(f"experiment {path.absolute()} is {what}; give the path of a .py file{_suggest(name)}")
    if name.endswith(".py"):
        raise ValueError(f"experiment file {path.absolute()} does not exist{_suggest(name)}")
    hint = _suggest(name) or f"; there are: {', '.join(names())}"
    raise ValueError(f"experiment {name!r} is unknown{hint} (or give the path of a .py file)")


def _suggest(name: str) -> str:
    """The experiment or file that may be meant: the end of a sentence."""
    path = Path(name)
    inside, nearby = ([file for file in sorted(folder.glob("*.py")) if file.is_file()] for folder in (path, path.parent))
    known = {own: own for own in names()} | {file.stem: str(file) for file in (*inside, *nearby)}
    close = difflib.get_close_matches(path.stem, known, 1)
    found = [known[close[0]]] if close else list(map(str, inside)) if len(inside) == 1 else []
    return f"; perhaps you meant {found[0]}" if found else ""
