"""What a user names as a run folder: checked, and answered with what he may have meant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

SHOWN = 3


def locate_run(path: Path) -> Path:
    """`path`, if it is a run folder: one in which a run has logged or saved something, or at least described itself.

    Raises ValueError that says what it is instead, and which run folder may be meant.
    """
    if is_run(path):
        return path
    run = next((folder for folder in path.absolute().parents if is_run(folder)), None)
    if run and path.exists():
        step = path.name.removeprefix("step_").lstrip("0")
        which = f", and its step {step}" if path.parent.name == "checkpoints" and step.isdigit() else ""
        raise ValueError(f"{path} is a {_describe_part(path)} of a run; give its run folder, {_shorten(run)}{which}")
    if not path.exists():
        raise ValueError(f"the run folder {path} does not exist (in {path.absolute().parent}){_suggest(path)}")
    if not path.is_dir():
        raise ValueError(f"{path} is a file, and no run folder")
    runs = sorted(str(folder) for folder in _find_runs(path))
    if runs:
        more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
        raise ValueError(f"{path.absolute()} is not a run folder but holds some; perhaps you meant {' or '.join(runs[:SHOWN])}{more}")
    if (path / "config.json").is_file():
        raise ValueError(
            f"{path / 'config.json'} does not describe a run: it needs the fields experiment and config (another library's model is opened "
            "by pretrained.load, and starts a run with --init)"
        )
    state = "is not a run folder: it has no config.json" if any(path.iterdir()) else "is not a run folder: it is empty"
    raise ValueError(f"{path.absolute()} {state} (polyvit-fast train makes one, under runs/ unless --out){_suggest(path)}")


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run."""
    return (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file() or _describes_run(folder / "config.json")


def _describes_run(path: Path) -> bool:
    try:
        return path.is_file() and {"experiment", "config"} <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _describe_part(path: Path) -> str:
    return "checkpoint" if path.parent.name == "checkpoints" else "folder" if path.is_dir() else "file"


def _suggest(path: Path) -> str:
    """The run folder whose name is most like this one's, next to it or under runs/."""
    runs = {folder.name: str(folder) for home in (Path("runs"), path.parent) for folder in _find_runs(home) if folder != path}
    close = difflib.get_close_matches(path.name, runs, 1)
    return f"; perhaps you meant {runs[close[0]]}" if close else ""


def _find_runs(home: Path) -> Iterator[Path]:
    try:
        folders = [folder for folder in home.iterdir() if folder.is_dir()]
    except OSError:
        return
    yield from (folder for folder in folders if is_run(folder))


def _shorten(path: Path) -> Path:
    """Relative to where the command was started, if it lies there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
