"""Checkpoints that survive kills, full disks and flipped bits: a folder of safetensors and JSON files that is complete or not there.

`save` writes under a temporary name, takes the SHA-256 of every byte on its way, syncs each file, writes the manifest last, and renames.
`find_newest` accepts only files whose size and SHA-256 are those of the manifest. No file can contain code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from polyvit_fast import strict_json
from polyvit_fast.train.run_folder.earlier_versions import LaterVersionError, check_schema, stamp

FORMAT = 1
MANIFEST = "MANIFEST.json"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the safetensors format calls each dtype."""

_logger = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint that could not be saved, or is broken; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which every byte has been checked."""

    path: Path
    step: int
    """Steps done."""
    state: dict[str, Any]
    config: dict[str, Any]
    """As it was stored: `earlier_versions.upgrade` gives today's form."""
    names: tuple[str, ...]
    """The groups of tensors that it holds: model, optimizer, …"""

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU. Raises CheckpointError when there is none of that name, or the run has deleted it since."""
        if name not in self.names:
            raise CheckpointError(f"{self.path} holds no tensors named {name!r}; it has {', '.join(self.names)}")
        try:
            return load_file(self.path / f"{name}.safetensors")
        except (OSError, RuntimeError):  # which of them depends on the library's step that finds no file
            if self.path.exists():
                raise
            raise CheckpointError(f"{self.path} is gone: the run that goes on there has deleted it after newer ones; try again") from None


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    *,
    keep: int,
    best_step: int | None = None,
) -> Path:
    """Write `checkpoints/step_…` in the run folder, then delete all older ones but the newest `keep - 1` and that of `best_step`.

    There must be one writer for a run folder. Raises CheckpointError when the disk is full or refuses; the older ones then stay.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep} must be at least 1")
    home = folder / "checkpoints"
    temporary = home / f".tmp-{_format_name(step)}-{uuid4().hex}"
    texts = {"state.json": {**stamp(), **state, "step": step}, "config.json": {**stamp(), **config}}
    contents: dict[str, Iterable[bytes | memoryview]] = {name: [_encode_json(value)] for name, value in texts.items()}
    contents |= {f"{name}.safetensors": _encode_safetensors(group) for name, group in tensors.items()}
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values()) + (1 << 20)
    try:
        home.mkdir(parents=True, exist_ok=True)
        _remove_temporary(home)
        _check_space(home, needed)
        _write(temporary, step, contents)
        _publish(temporary, home / _format_name(step))
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} was not saved in {home}: {error.strerror or error}; it needs {needed / 1e6:,.1f} MB, "
            f"{_count_free_bytes(folder) / 1e6:,.1f} MB are free; the older checkpoints are untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_old(home, step, keep, best_step)
    return home / _format_name(step)


def find_newest(folder: Path, report: Callable[[str], None] = _logger.warning) -> Checkpoint | None:
    """The checkpoint of the largest step in the run folder of which every byte is as it was written; None when there is none.

    Each broken one is reported, with the file at fault, and skipped.
    """
    return next(iterate(folder, report), None)


def iterate(folder: Path, report: Callable[[str], None] = _logger.warning) -> Iterator[Checkpoint]:
    """The intact checkpoints of a run folder, that of the largest step first; broken ones are reported and skipped."""
    left = _list(folder / "checkpoints")
    seen = set()
    while left:
        path = left.pop()
        seen.add(path)
        try:
            checkpoint = read(path)
        except CheckpointError as error:
            if path.exists():
                report(f"broken checkpoint skipped: {error}")
            else:  # the run goes on, and has deleted it after newer ones
                left = [path for path in _list(folder / "checkpoints") if path not in seen]
        else:
            yield checkpoint


def find_checkpoint(folder: Path, which: str) -> Checkpoint:
    """The checkpoint called "newest", "best" or by its step. Raises ValueError that names those which are there."""
    newest = find_newest(folder)
    if newest is None:
        raise ValueError(f"{folder} holds no whole checkpoint yet")
    if which == "newest":
        return newest
    step = newest.state["best_step"] if which == "best" else which
    if step is None:
        raise ValueError(f"{folder} was never evaluated, so no checkpoint of it is the best; take newest")
    for found in iterate(folder):
        if str(found.step) == str(step):
            return found
    there = ", ".join(sorted((str(found.step) for found in iterate(folder)), key=int))
    raise ValueError(f"{folder} holds no checkpoint {which!r}; there are newest, best and the steps {there}")


def has_any(folder: Path) -> bool:
    """Whether the run folder has a checkpoint at all, whole or broken; one whose writing was cut short does not count."""
    return bool(_list(folder / "checkpoints"))


def read(path: Path) -> Checkpoint:
    """The checkpoint in this folder, after its whole content was checked.

    Raises CheckpointError that names the file at fault, and LaterVersionError when a later version wrote it.
    """
    files = _read_manifest(path)
    for name, (_, digest) in files.items():
        _check_content(path / name, digest)
    try:
        state, config = (json.loads((path / name).read_bytes()) for name in ("state.json", "config.json"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    check_schema(state, path)
    check_schema(config, path)
    names = tuple(name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors"))
    return Checkpoint(path, _read_step(path), state, config, names)


def _encode_json(value: Any) -> bytes:
    return strict_json.dumps(value, indent=1).encode()


def _encode_safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, in chunks."""
    # Not by the library: it writes a file or returns all bytes at once, and neither lets a hash see them without a second copy.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # wide first keeps every tensor aligned
    header, end = {}, 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: a tensor of {tensor.dtype} cannot be stored")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(folder: Path, step: int, contents: dict[str, Iterable[bytes | memoryview]]) -> None:
    folder.mkdir()
    files = {name: _write_file(folder / name, chunks) for name, chunks in contents.items()}
    _write_file(folder / MANIFEST, [_encode_json({"format": FORMAT, "step": step, "files": files})])
    _sync_folder(folder)


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    digest, size, step = hashlib.sha256(), 0, 1 << 20  # that much stays in the cache between its hash and its write
    with open(path, "xb") as file:
        for chunk in chunks:
            for start in range(0, len(chunk), step):
                digest.update(chunk[start : start + step])
                size += file.write(chunk[start : start + step])
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _publish(temporary: Path, final: Path) -> None:
    if final.exists():
        # Saved a second time at one step: the first can be found under another name until the second has its name.
        replaced = final.with_name(final.name + ".replaced")
        _remove(replaced)
        os.rename(final, replaced)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    _sync_folder(final.parent.parent)


def _remove_old(home: Path, step: int, keep: int, best_step: int | None) -> None:
    """Delete what is older than `step` and not to be kept. Those of later steps were left by a run that was set back, and stay."""
    older = [path for path in reversed(_list(home)) if _read_step(path) < step]
    whole = [path for path in older if _is_complete(path)]
    kept = {*whole[: keep - 1], *(path for path in whole if _read_step(path) == best_step)}
    for path in [home / f"{_format_name(step)}.replaced", *(path for path in older if path not in kept)]:
        try:
            _remove(path)
        except OSError as error:
            _logger.warning("the old checkpoint %s cannot be deleted: %s", path, error.strerror)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves a temporary folder, not half a checkpoint."""
    if path.exists():
        doomed = path.with_name(f".tmp-removed-{uuid4().hex}")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _remove_temporary(home: Path) -> None:
    for path in home.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _list(home: Path) -> list[Path]:
    """All checkpoints, broken ones too, by increasing step; one that was being replaced comes before its replacement."""
    found = [path for path in home.glob("step_*") if re.fullmatch(r"step_\d+(\.replaced)?", path.name)]
    return sorted(found, key=lambda path: (_read_step(path), not path.suffix))


def _format_name(step: int) -> str:
    return f"step_{step:08d}"


def _read_step(path: Path) -> int:
    digits = re.match(r"step_(\d+)", path.name)
    return int(digits[1]) if digits else -1


def _is_complete(path: Path) -> bool:
    try:
        return bool(_read_manifest(path))
    except CheckpointError:
        return False


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of each file, after a look at the files' sizes."""
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        found = content["format"], content["step"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path / MANIFEST} is missing: the checkpoint was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is broken: {error!r}") from None
    if isinstance(found[0], int) and found[0] > FORMAT:
        raise LaterVersionError(f"{path} was written by a later version of polyvit-fast; upgrade: pip install --upgrade polyvit-fast")
    if found != (FORMAT, _read_step(path)):
        raise CheckpointError(f"{path / MANIFEST} is of format {found[0]}, step {found[1]}; expected {FORMAT}, {_read_step(path)}")
    for name in {"state.json", "config.json", *files}:
        file = path / name
        if name not in files or Path(name).name != name:
            raise CheckpointError(f"{path / MANIFEST} names {sorted(files)}; it needs state.json and config.json, and no other folder")
        try:
            status = file.stat()
        except OSError:
            raise CheckpointError(f"{file} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is missing")
        if status.st_size != files[name][0]:
            raise CheckpointError(f"{file} has {status.st_size} bytes instead of {files[name][0]}")
    return files


def _check_content(path: Path, digest: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise CheckpointError(f"{path}: the content differs from its SHA-256 in {MANIFEST}")
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # reads the header alone
                pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _check_space(home: Path, needed: int) -> None:
    if _count_free_bytes(home) < needed:
        raise OSError("not enough free disk space")


def _count_free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
