"""A user's experiment file, run as `python file.py` would run it."""

from __future__ import annotations

import importlib.util
import io
import sys
import tokenize
from pathlib import Path
from types import ModuleType

from polyvit_fast.experiments.loading.explain import explain
from polyvit_fast.experiments.loading.neighbours import neighbours


def run_file(path: Path) -> ModuleType:
    """The module of an experiment file. Its folder is the first in which it, and what it imports, find modules, also later.

    Raises ValueError with file and line for whatever the file raises.
    """
    source = _read_source(path)
    neighbours.begin(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(f"polyvit_experiment_{path.stem}", path.absolute())
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where types of its classes are looked up
    try:
        exec(
            compile(source, path.absolute(), "exec"), vars(module)
        )  # without a stored .pyc, which an edit in the same second would outlive
    except (Exception, SystemExit) as error:
        raise ValueError(f"experiment file {path}{explain(error, path)}") from error
    return module


def _read_source(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"experiment file {path.absolute()}: {error.strerror}") from error
    try:
        text = content.decode(tokenize.detect_encoding(io.BytesIO(content).readline)[0])
    except (UnicodeError, SyntaxError) as error:
        raise ValueError(
            f"experiment file {path}: it is no text in UTF-8, or in the encoding that its first line names: {error}"
        ) from error
    if "\0" in text:
        raise ValueError(f"experiment file {path}: it holds NUL characters, as UTF-16 does; save it as UTF-8")
    return text
