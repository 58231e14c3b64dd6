"""Reads the tensors of a file or folder of weights, or of a model on Hugging Face's hub. Nothing in a file is ever run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from polyvit_fast.extras import MissingExtraError, require
from polyvit_fast.files import absolute
from polyvit_fast.model.pretrained.weights import Tensors

CONFIGS = {"config.json": "", "preprocessor_config.json": "preprocessor"}
"""What lies next to weights, and the key under which it is returned."""
NDARRAY = 1  # the number of arrays among Flax's extensions of msgpack


def read_files(source: str) -> tuple[Tensors, dict[str, Any]]:
    """All tensors by name, and what config.json says of them (preprocessor_config.json under "preprocessor", a header under "metadata").

    `source` is a file (.safetensors, .npz, .pth, .pt, .bin, .msgpack, or Flax's `checkpoint_123`), a folder with one, or `owner/name` on
    the hub. Raises ValueError that names it when there is none, when it is broken, or when it holds anything but tensors.
    """
    path = Path(source)
    if not path.exists():
        path = _fetch(source)
    folder, files = (path, _find_files(path)) if path.is_dir() else (path.parent, [path])
    tensors: Tensors = {}
    for file in files:
        tensors |= _read_tensors(file)
    metadata = _read_metadata(files[0]) if files[0].suffix == ".safetensors" else {}
    config: dict[str, Any] = {"metadata": metadata} if metadata else {}
    # Next to a single file, only the config.json of a library that writes pairs of them is about it.
    for name, key in CONFIGS.items() if path.is_dir() or path.suffix == ".safetensors" else ():
        if (folder / name).is_file():
            content = _read_config(folder / name)
            config |= {key: content} if key else content
    return tensors, config


def _find_files(folder: Path) -> list[Path]:
    """The file of weights in a folder, or its parts."""
    for pattern in ("model-*-of-*.safetensors", "model.safetensors", "*.safetensors", "pytorch_model*.bin", "*.npz", "*.msgpack"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1 and "model" not in pattern:
            raise ValueError(
                f"{folder} holds {len(found)} files of weights; name one of them: {', '.join(path.name for path in found[:3])}"
            )
        if found:
            return found
    steps = sorted(folder.glob("checkpoint_*"), key=lambda path: int(path.name.rpartition("_")[2]) if path.name[-1].isdigit() else -1)
    if steps:
        return steps[-1:]
    if (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} is a run folder: pf.load opens it, and --init starts another run from it")
    raise ValueError(f"{folder} holds no weights: no .safetensors, pytorch_model.bin, .npz, .msgpack or checkpoint_* in it")


def _read_tensors(file: Path) -> Tensors:
    try:
        match file.suffix:
            case ".safetensors":
                return load_file(file)
            case ".npz":
                with np.load(file, allow_pickle=False) as content:
                    return {name: _to_tensor(content[name]) for name in content.files}
            case ".pth" | ".pt" | ".bin":
                # Refuses whatever is no plain tensor, dict or number.
                content = torch.load(file, map_location="cpu", weights_only=True)
            case _:
                content = _read_msgpack(file)
        return _flatten(content, "." if file.suffix in (".pth", ".pt", ".bin") else "/")
    except MissingExtraError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is no file of weights that can be read: {reason}") from error
    except Exception as error:  # an unpickler's own class, or a tree of another form
        raise ValueError(f"{file} is broken, or holds more than tensors, and is not loaded: {type(error).__name__}") from error


def _read_msgpack(file: Path) -> Any:
    """A tree as Flax's `to_bytes` writes it."""
    require("reading Flax's files", "msgpack")
    import msgpack

    return msgpack.unpackb(file.read_bytes(), ext_hook=_read_extension, raw=False, strict_map_key=False)


def _read_extension(number: int, content: bytes) -> Any:
    import msgpack

    if number != NDARRAY:
        return None
    shape, dtype, values = msgpack.unpackb(content, raw=True)
    name = dtype.decode()
    if name == "bfloat16":
        return torch.frombuffer(bytearray(values), dtype=torch.bfloat16).reshape(shape).float()
    return np.frombuffer(values, np.dtype(name)).reshape(shape)


def _flatten(content: Any, separator: str, path: str = "") -> Tensors:
    """Nested dicts as one, by their paths; what is no tensor, such as a step or an optimizer's settings, is left out."""
    if isinstance(content, Mapping):
        if "__msgpack_chunked_array__" in content:
            chunks = [content["chunks"][str(number)] for number in range(len(content["chunks"]))]
            return {path: _to_tensor(np.concatenate(chunks).reshape([content["shape"][str(i)] for i in range(len(content["shape"]))]))}
        wrapped = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), None)
        if wrapped is not None and separator == ".":
            content = wrapped
        found: Tensors = {}
        for key, value in content.items():
            found |= _flatten(value, separator, f"{path}{separator}{key}" if path else str(key))
        return found
    if isinstance(content, Tensor):
        return {path: content}
    return {path: _to_tensor(content)} if isinstance(content, np.ndarray) else {}


def _to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # NumPy has no bfloat16, and stores its bytes as such
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(np.array(array))


def _read_metadata(file: Path) -> dict[str, str]:
    """The texts in a file's header that are no tensors' descriptions."""
    with safe_open(file, "pt") as content:
        return content.metadata() or {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken: it holds no JSON object")
    return content


def _fetch(name: str) -> Path:
    """The folder of a model of Hugging Face's hub, fetched unless it is there already."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: there is no such file or folder ({absolute(name)})")
    require(f"{name} is no file or folder here, and fetching it from Hugging Face's hub", "huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "config.json", "preprocessor_config.json"]))
    except Exception as error:  # a dozen classes of the library, requests and the operating system
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: there is no such folder ({absolute(name)}), and the hub gave none: {reason}") from error
