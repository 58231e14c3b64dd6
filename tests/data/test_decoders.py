import sys
from dataclasses import dataclass

import pytest
from tiny_runs import Tile, tile_task

from polyvit_fast.data import Audio, Folder, Image, Synthetic, Video, build_decoder
from polyvit_fast.data.audio.cpu import AudioDecoder
from polyvit_fast.data.decoders import build_task_decoder
from polyvit_fast.data.image.cpu import ImageDecoder, ThoroughDecoder
from polyvit_fast.data.video.cpu import VideoDecoder

OPTIONS = {"batch": 2, "train": True, "num_threads": 1}


@dataclass(frozen=True, kw_only=True)
class Square(Image):
    """A subclass that changes no decoding."""


@pytest.mark.parametrize(
    ("modality", "kind"),
    [
        (Image(), ImageDecoder),
        (Square(), ImageDecoder),
        (Image().thorough(), ThoroughDecoder),
        (Video(), VideoDecoder),
        (Video().thorough(), VideoDecoder),
        (Audio(), AudioDecoder),
    ],
)
def test_a_modality_has_the_decoder_of_its_class_or_the_nearest_parent(modality, kind):
    assert type(build_decoder(modality, **OPTIONS)) is kind


def test_a_modality_without_a_decoder_is_refused_by_name():
    match = r"Tile: no decoder is known for this modality \(there are some for Image, .*Audio\); a source may bring its own"
    with pytest.raises(ValueError, match=match):
        build_decoder(Tile(), **OPTIONS)


def test_a_source_may_bring_its_own_decoder():
    task = tile_task()
    grid = build_task_decoder(Synthetic(num_samples=4), task, **OPTIONS)([task.train.samples(task)[0].media], [])
    assert grid.shape == (1, 1, 1, 16, 16, 3)
    pictures = tile_task(modality=Image())
    assert type(build_task_decoder(Folder(path="anywhere"), pictures, **OPTIONS)) is ImageDecoder


@pytest.mark.parametrize(("modality", "name"), [(Image(), "image"), (Video(), "video"), (Audio(), "audio")])
def test_the_gpu_decoder_is_imported_only_where_it_is_asked_for(monkeypatch, modality, name):
    monkeypatch.setitem(sys.modules, f"polyvit_fast.data.{name}.gpu", None)
    assert build_decoder(modality, **OPTIONS)
    with pytest.raises(ImportError):
        build_decoder(modality, **OPTIONS, device="cuda")
