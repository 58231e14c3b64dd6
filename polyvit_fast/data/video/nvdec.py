"""Which video files NVDEC decodes into the same frames and colours as the CPU's decoder does."""

from __future__ import annotations

import ctypes

import torch

from polyvit_fast.data.video.frames import VideoHeader

CODECS = {"cuda": frozenset({"h264", "hevc", "vp8", "mpeg4"}), "cpu": frozenset({"vp8", "vp9"})}
"""What DALI's decoder for a device decodes into exactly the frames that are asked for.

Left to the CPU: AV1, which Hopper's NVDEC lacks; MPEG-2, which DALI lacks on a GPU; and VP9, of which DALI 2.4 showed frames three too
early on an H100 (driver 580.159), though not of every file."""
CONTAINERS = ("mov,", "matroska,")  # AVI stores more frames than there are, and transport streams name no keyframes
MIN_SIDE, MAX_SIDE = 144, 4096  # the least of NVDEC's decoder for HEVC, the most of that for H.264
BT709 = 1
BT601 = (2, 5, 6)  # FFmpeg's numbers: unknown, and the two names of BT.601's matrix


def missing_nvdec(device: torch.device) -> str:
    """Why the driver's video decoder cannot be used; empty when it can, or is not needed."""
    try:
        if device.type == "cuda":
            ctypes.CDLL("libnvcuvid.so.1")
    except OSError as error:
        return str(error)
    return ""


def can_decode(header: VideoHeader, codecs: frozenset[str]) -> bool:
    """Whether DALI decodes such a file into the same frames and colours as the CPU's decoder."""
    return (
        header.plain
        and header.codec in codecs
        and header.container.startswith(CONTAINERS)
        and header.pixels == "yuv420p"
        and header.colorspace in (BT709, *BT601)
        and min(header.height, header.width) >= MIN_SIDE
        and max(header.height, header.width) <= MAX_SIDE
    )
