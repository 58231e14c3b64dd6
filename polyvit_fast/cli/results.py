"""Files with results that have been printed already: a run that cannot be written is no reason to fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from polyvit_fast.files import write_atomically

PICTURES = (".png", ".pdf", ".svg", ".jpg")


@contextmanager
def record_results(path: Path, *, is_asked_for: bool) -> Iterator[None]:
    """Inside, results are written to `path`, or next to it. Where that fails, a warning says so.

    Raises ValueError instead for a file that the user asked for.
    """
    try:
        yield
    except OSError as error:
        in_the_way = f"{error.filename} is a file, not a folder" if isinstance(error, FileExistsError) else ""
        reason = f"{path} cannot be written: {in_the_way or error.strerror or error}"
        if is_asked_for:
            raise ValueError(f"{reason}; name another file with --out") from error
        print(f"warning: nothing was recorded, for {reason}; --out FILE writes elsewhere", file=sys.stderr)


def draw_curves(run: Path, out: str = "") -> None:
    """Draw the curves of a run as curves.png in its folder, or where `out` says. Raises ValueError when it has logged nothing."""
    from polyvit_fast.train.output.plot import plot_run
    from polyvit_fast.train.run_folder.record import list_tasks

    path = Path(out or run / "curves.png")
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"--out {path}: a picture's name ends in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    with TemporaryDirectory() as temporary:
        drawn = Path(temporary) / path.name
        plot_run(run, drawn, list_tasks(run))
        with record_results(path, is_asked_for=bool(out)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, drawn.read_bytes())
            print(f"drawn: {path}")
