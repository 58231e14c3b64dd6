"""Packages that come with an extra, such as `polyvit-fast[train]`: looked for where they are used, and named when they are absent."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "nvidia.dali": ("nvidia-dali-cuda130", "data"),
    "av": ("av", "data"),
    "PIL": ("pillow", "data"),
    "pillow_heif": ("pillow-heif", "heic"),
    "matplotlib": ("matplotlib", "train"),
    "tensorboard": ("tensorboard", "train"),
    "torchmetrics": ("torchmetrics", "train"),
    "msgpack": ("msgpack", "pretrained"),
    "huggingface_hub": ("huggingface_hub", "pretrained"),
    "onnx": ("onnx", "onnx"),
    "onnxscript": ("onnxscript", "onnx"),
}
"""What pip calls each module, and the extra that brings it."""

DECODING = tuple(module for module, (_, extra) in EXTRAS.items() if extra == "data")
TRAINING = tuple(module for module, (_, extra) in EXTRAS.items() if extra == "train")
"""The modules of one extra. Those of training are only what it needs besides the decoders of its tasks."""


class MissingExtraError(ImportError, ValueError):
    """A package of an extra is not installed: no fault of a file (`media.DEFECTS`), and one that the user can mend."""


def require(purpose: str, *modules: str) -> None:
    """Raise MissingExtraError, which says what `purpose` needs and how to install it, unless all these modules are installed."""
    missing = [EXTRAS[module] for module in modules if not _is_installed(module)]
    if missing:
        *others, last = (package for package, _ in missing)
        names = f"{', '.join(others)} and {last}, which are" if others else f"{last}, which is"
        extras = {extra for _, extra in missing}
        if "train" in extras:
            extras -= {"data"}  # it brings that too
        raise MissingExtraError(f"{purpose} needs {names} not installed: pip install 'polyvit-fast[{','.join(sorted(extras))}]'")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # not even the package that it would be in
        return False
