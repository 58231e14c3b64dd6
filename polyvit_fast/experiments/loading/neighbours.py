"""The modules next to an experiment file, which it can import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from polyvit_fast.extras import EXTRAS

OURS = {module.partition(".")[0] for module in EXTRAS} | {
    *("polyvit_fast", "polyvit_kernels", "torch", "triton", "numpy", "einops", "safetensors", "jaxtyping", "tyro", "rich")
}
"""What this package imports, some of it late: an experiment's neighbours do not hide it."""


class Neighbours(MetaPathFinder):
    """Finds the modules next to experiment files: before those that are installed, except those that this package or Python itself needs.

    Each file imports what lies in its own folder, even where the file of another folder has imported a module of the same name before.
    """

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.found: dict[str, str] = {}
        """Where each top-level module was found."""

    def begin(self, folder: Path) -> None:
        """Look in this folder first from now on."""
        for name in [name for name, where in self.found.items() if where != str(folder)]:
            del self.found[name]
            for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
                del sys.modules[loaded]
        self.folders = [str(folder), *(other for other in self.folders if other != str(folder))]
        importlib.invalidate_caches()  # of files that were written a moment ago
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module of a top-level name."""
        if path is not None or fullname in sys.stdlib_module_names or fullname in OURS:
            return None
        for folder in self.folders:
            spec = PathFinder.find_spec(fullname, [folder], target)
            # A folder without __init__.py, which may hold anything, hides no installed package.
            if spec and (spec.loader or not PathFinder.find_spec(fullname)):
                self.found[fullname] = folder
                return spec
        return None


neighbours = Neighbours()
