"""Makes timm and torchvision importable with a torch for which torchvision's extension was not built.

`make` puts them into .venv/foreign, out of the way of torchmetrics and transformers, which import a torchvision wherever they find one.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

_DECLARED: list[torch.library.Library] = []
"""Kept, for an operator goes with its library."""


def declare_operators() -> None:
    """Declare `nms` and `qnms`, whose outputs torchvision describes when it is imported; nothing where the extension loads.

    They stay without an implementation: no Vision Transformer calls them.
    """
    apart = Path(sys.prefix) / "foreign"
    if apart.exists() and str(apart) not in sys.path:
        sys.path.append(str(apart))
    package = importlib.util.find_spec("torchvision")
    if hasattr(torch.ops.torchvision, "nms") or package is None or _extension_loads(package):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)


def _extension_loads(package: ModuleSpec) -> bool:
    assert package.submodule_search_locations
    extensions = sorted(Path(package.submodule_search_locations[0]).glob("_C*.so"))  # one, two or none, as it was built
    try:
        for extension in extensions:
            torch.ops.load_library(extension)
    except OSError:
        return False
    return bool(extensions)
