"""Tar shards that tests write."""

import io
import tarfile


def write_shard(path, members, **changes):
    """A tar file of (name, content) pairs; `changes` are set on every header."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def pair(key, label, suffix="jpg"):
    return [(f"{key}.{suffix}", f"pixels of {key}".encode(errors="surrogateescape")), (f"{key}.cls", str(label).encode())]
