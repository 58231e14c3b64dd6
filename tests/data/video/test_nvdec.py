import ctypes
from dataclasses import replace

import pytest
import torch

from polyvit_fast.data.video.frames import VideoHeader
from polyvit_fast.data.video.nvdec import CODECS, can_decode, missing_nvdec

CPU = torch.device("cpu")


def test_nvdec_is_looked_for_on_a_gpu_only(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert missing_nvdec(torch.device("cuda", 0)) == "libnvcuvid.so.1: cannot open shared object file"
    assert missing_nvdec(CPU) == ""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    assert missing_nvdec(torch.device("cuda", 0)) == ""


GOOD = VideoHeader("mov,mp4", "h264", 100, 256, 340, "yuv420p", 2, True)


def test_files_for_nvdec_are_known_by_their_headers():
    assert can_decode(GOOD, CODECS["cuda"])
    assert can_decode(replace(GOOD, codec="hevc", container="matroska,webm", colorspace=1, height=2160, width=3840), CODECS["cuda"])
    assert not can_decode(GOOD, CODECS["cpu"])


@pytest.mark.parametrize(
    "change",
    [
        {"plain": False},
        {"codec": "av1"},
        {"codec": "mpeg2video"},
        {"codec": "vp9"},
        {"container": "avi"},
        {"container": "mpegts"},
        {"pixels": "yuv420p10le"},
        {"pixels": "yuvj420p"},
        {"colorspace": 9},
        {"height": 143},
        {"width": 4098},
    ],
    ids=str,
)
def test_other_files_are_the_cpus(change):
    assert not can_decode(replace(GOOD, **change), CODECS["cuda"])
