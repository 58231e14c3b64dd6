import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from generators import rngs
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import BAD, HEIGHT, WIDTH, decode_images, photo
from image_kinds import KINDS, SHORT_KINDS, saved
from long_forms import mark_long
from PIL import Image as Pillow
from PIL import ImageOps

from polyvit_fast.data import dali
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image import cpu as module
from polyvit_fast.data.image.crops import choose_training_box
from polyvit_fast.data.image.file import SIGNATURES, kind_of, make_specimen
from polyvit_fast.data.image.modality import Image
from polyvit_fast.media import Media, MediaError

LEVELS = 1  # PyTorch's resampling against Pillow's: at most this far apart


def resampled(picture, size, box):
    """Pillow's bilinear antialiased resampling of (top, left, height, width)."""
    top, left, height, width = box
    return picture.crop((left, top, left + width, top + height)).resize((size, size), Pillow.Resampling.BILINEAR)


def assert_close(grid, expected):
    difference = np.abs(grid.squeeze((0, 1, 2)).numpy().astype(int) - np.asarray(expected))
    assert difference.mean() < 0.25
    assert difference.max() <= LEVELS


@pytest.fixture(scope="module")
def decoders():
    image = Image(size=32)
    return [build_decoder(image, batch=3, train=train, num_threads=2) for train in (True, False)]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", mark_long(KINDS, SHORT_KINDS))
def test_every_kind_equals_pillow(tmp_path, decoders, name):
    path = tmp_path / "misnamed.jpg"
    path.write_bytes(KINDS[name])
    with Pillow.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    grid = decoders[1]([Media(str(path))], rngs(1))
    assert (grid.shape, grid.dtype) == ((1, 1, 1, 32, 32, 3), torch.uint8)
    assert_close(grid, resampled(picture, 32, (0, 0, picture.height, picture.width)))


@pytest.mark.parametrize(("size", "grid_size"), [((600, 900), 16), ((3000, 20), 16), ((20, 30), 224)])
def test_far_smaller_and_larger_grids(tmp_path, size, grid_size):
    picture = photo(*size)
    picture.save(tmp_path / "a.bmp")
    assert_close(decode_images(Image(size=grid_size), tmp_path / "a.bmp"), resampled(picture, grid_size, (0, 0, *size)))


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Pillow.fromarray(levels).save(tmp_path / "a.png")
    grid = decode_images(Image(size=256), tmp_path / "a.png").squeeze().numpy()
    assert np.array_equal(grid, np.round(levels / 257).astype(np.uint8)[..., None].repeat(3, -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_pictures_are_turned_upright(tmp_path, suffix):
    paths = []
    for orientation in range(1, 9):
        exif = Pillow.Exif()
        exif[274] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        options = {"tiffinfo": {274: orientation}} if suffix == "tif" else {"exif": exif}
        photo().save(path, **options | ({"lossless": True} if suffix == "webp" else {}))
        paths.append(path)
    image = Image(size=64, eval_crop="centre")
    for path, grid in zip(paths, decode_images(image, *paths), strict=True):
        upright = ImageOps.exif_transpose(Pillow.open(path)).convert("RGB")
        side = round(0.875 * min(upright.size))
        top, left = (upright.height - side) // 2, (upright.width - side) // 2
        assert_close(grid[None], resampled(upright, 64, (top, left, side, side)))


def test_centre_crop_equals_resizing_the_short_side_first(tmp_path):
    picture = photo(512, 768)
    picture.save(tmp_path / "a.png")
    whole = picture.resize((384, 256), Pillow.Resampling.BILINEAR).crop((80, 16, 304, 240))
    grid = decode_images(Image(eval_crop="centre"), tmp_path / "a.png")
    assert_close(grid[..., 1:-1, 1:-1, :], np.asarray(whole)[1:-1, 1:-1])  # at the crop's edge the filter sees less


@pytest.mark.parametrize("crop", ["inception", "resize_crop"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_random_crops_equal_pillow(tmp_path, crop, suffix):
    path = tmp_path / f"a.{suffix}"
    photo().save(path)
    picture = Pillow.open(path)
    image = Image(size=48, patch=16, crop=crop)
    decoder = build_decoder(image, batch=16, train=True, num_threads=2)
    grids = decoder([Media(str(path))] * 16, rngs(16))
    for grid, rng in zip(grids, rngs(16), strict=True):
        expected = resampled(picture, 48, choose_training_box(image, HEIGHT, WIDTH, rng))
        assert_close(grid[None], ImageOps.mirror(expected) if rng.random() < 0.5 else expected)


ALL = Image(size=64, colour_jitter=0.4, hue_jitter_degrees=20.0, rand_augment_ops=2)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    paths = [folder / f"{i}.{suffix}" for i, suffix in enumerate(("jpg", "png", "webp", "gif", "tif"))]
    for i, path in enumerate(paths):
        photo(120 + 30 * i, 160, seed=i).save(path)
    return paths


@pytest.mark.parametrize("image", [Image(size=64), Image(size=64, crop="resize_crop"), ALL])
def test_a_sample_depends_on_its_own_generator_only(five, image):
    decoder = build_decoder(image, batch=5, train=True, num_threads=2)
    media = [Media(str(path)) for path in five]
    batch = decoder(media, rngs(5)).clone()
    assert torch.equal(decoder(media, rngs(5)), batch)
    assert torch.equal(decode_images(image, *five, train=True, num_threads=1), batch)
    singles = [decoder([one], [rng]) for one, rng in zip(media, rngs(5), strict=True)]
    assert torch.equal(torch.cat(singles), batch)
    backwards = decoder(media[::-1], rngs(5)[::-1])
    assert torch.equal(backwards.flip(0), batch)
    other = decoder(media, rngs(5, seed=1))
    assert all(not torch.equal(a, b) for a, b in zip(other, batch, strict=True))


@pytest.mark.parametrize(("limit", "calls"), [(1, 3), (60_000, 2), (10**9, 1)])
def test_large_pictures_are_decoded_in_chunks(five, monkeypatch, limit, calls):
    media = [Media(str(path)) for path in five]
    decoder = build_decoder(Image(size=64), batch=5, train=False, num_threads=2)
    whole = decoder(media, rngs(5))
    monkeypatch.setattr(module, "CHUNK_PIXELS", limit)
    sizes = []
    monkeypatch.setattr(dali, "run", lambda *args, run=dali.run, **kw: (sizes.append(len(kw["content"])), run(*args, **kw))[1])
    assert torch.equal(decoder(media, rngs(5)), whole)
    assert len(sizes) == 1 + calls
    assert sum(sizes[1:]) == 3  # Pillow has decoded GIF and TIFF already


def test_a_batch_stays_as_it_is_when_later_ones_are_decoded(five):
    decoder = build_decoder(Image(size=64), batch=5, train=True, num_threads=2)
    media = [Media(str(path)) for path in five]
    batch = decoder(media, rngs(5))
    before = batch.clone()
    for seed in range(1, 6):
        decoder(media, rngs(5, seed))
    assert torch.equal(batch, before)


def test_evaluation_is_not_random(five):
    assert torch.equal(decode_images(ALL, *five, seed=0), decode_images(ALL, *five, seed=1))


def test_colour_jitter_follows_its_formula(tmp_path):
    colour = np.array([180.0, 90.0, 60.0])
    Pillow.new("RGB", (20, 20), tuple(colour.astype(int))).save(tmp_path / "a.png")
    image = Image(size=16, colour_jitter=0.5)
    grids = decode_images(image, *[tmp_path / "a.png"] * 30, train=True)
    for grid, rng in zip(grids, rngs(30), strict=True):
        choose_training_box(image, 20, 20, rng)
        rng.random()  # the flip
        brightness, contrast, saturation = rng.uniform(0.5, 1.5, 3)
        grey = colour @ [0.299, 0.587, 0.114]
        expected = brightness * (contrast * (grey + saturation * (colour - grey) - 128) + 128)
        assert np.abs(grid[0, 0, 8, 8].numpy() - expected.clip(0, 255)).max() <= 0.51


def test_hue_jitter_turns_colours_and_leaves_grey(tmp_path):
    Pillow.new("RGB", (20, 20), (200, 80, 80)).save(tmp_path / "red.png")
    Pillow.new("RGB", (20, 20), (120, 120, 120)).save(tmp_path / "grey.png")
    image = Image(size=16, hue_jitter_degrees=40.0)
    grids = decode_images(image, *[tmp_path / "red.png"] * 20, *[tmp_path / "grey.png"] * 20, train=True)
    red, grey = grids.double().mean((1, 2, 3, 4)).split(20)
    assert (red[:, 1] - red[:, 2]).min() < -30
    assert (red[:, 1] - red[:, 2]).max() > 30
    assert (grey - 120).abs().max() <= 1.5


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 3)])
def test_tiny_and_thin_pictures(tmp_path, size):
    Pillow.new("RGB", size, (10, 200, 90)).save(tmp_path / "a.png")
    for image in (Image(size=32), Image(size=32, crop="resize_crop", eval_crop="centre")):
        for train in (True, False):
            assert (decode_images(image, tmp_path / "a.png", train=train) == torch.tensor([10, 200, 90])).all()


def test_damaged_exif_and_text_after_the_end_do_not_matter(tmp_path):
    exif = Pillow.Exif()
    exif[274] = 1
    exif[305] = "a program"
    photo().save(tmp_path / "whole.jpg", exif=exif)
    content = (tmp_path / "whole.jpg").read_bytes()
    damaged = content.replace(b"a program", b"\xff" * 9).replace(struct.pack("<HHI", 305, 2, 10), struct.pack("<HHI", 305, 2, 10**8))
    (tmp_path / "damaged.jpg").write_bytes(damaged + b"appended" * 9000)
    assert torch.equal(*decode_images(Image(size=32), tmp_path / "whole.jpg", tmp_path / "damaged.jpg"))


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_say_why_and_the_next_batch_works(tmp_path, decoders, kind):
    content, reason = BAD[kind]
    bad, good = tmp_path / "bad.jpg", tmp_path / "good.jpg"
    photo().save(good)
    if content is not None:
        bad.write_bytes(content)
    for decoder in decoders:
        before = decoder([Media(str(good))], rngs(1)).clone()
        started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(MediaError, match=reason):
            decoder([Media(str(bad))], rngs(1))
        with pytest.raises(MediaError):
            decoder([Media(str(good)), Media(str(bad)), Media(str(good))], rngs(3))
        assert time.monotonic() - started < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 450 * 1024  # kB; of 900 MPix it would be 2.7 GB
        assert torch.equal(decoder([Media(str(good))], rngs(1)), before)


def test_a_cut_jpeg_is_refused_whatever_the_crop(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(saved(photo(), "JPEG")[:-2000])
    decoder = build_decoder(Image(size=32), batch=1, train=True, num_threads=1)
    for rng in rngs(20):
        with pytest.raises(MediaError, match="truncated"):
            decoder([Media(str(tmp_path / "cut.jpg"))], [rng])


WHOLE = {kind: saved(photo(40, 50), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")}


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=4)), max_size=4),
    st.one_of(st.none(), st.integers(1, 900)),
)
def test_damaged_bytes_give_a_picture_or_a_reason(decoders, tmp_path_factory, kind, changes, cut):
    content = bytearray(WHOLE[kind])
    for at, replacement in changes:
        content[at : at + len(replacement)] = replacement
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[:cut])
    for decoder in decoders:
        with suppress(MediaError):
            assert decoder([Media(str(path))], rngs(1)).shape == (1, 1, 1, 32, 32, 3)


def test_the_pixel_limit_is_the_users(tmp_path):
    photo().save(tmp_path / "a.jpg")
    assert decode_images(Image(max_pixels=HEIGHT * WIDTH), tmp_path / "a.jpg").shape[3] == 224
    with pytest.raises(MediaError, match="450 x 300 pixels, more than max_pixels = 134999"):
        decode_images(Image(max_pixels=HEIGHT * WIDTH - 1), tmp_path / "a.jpg")


@pytest.fixture(scope="module")
def without_opencv(tmp_path_factory):
    """The environment of a process whose nvImageCodec lacks the extension that decodes PNG, WebP and BMP."""
    folder, whole = tmp_path_factory.mktemp("extensions"), Path(find_spec("nvidia.nvimgcodec").submodule_search_locations[0]) / "extensions"
    for file in whole.iterdir():
        if "opencv" not in file.name:
            shutil.copy(file, folder)
    return os.environ | {"NVIMGCODEC_EXTENSIONS_PATH": str(folder)}


EXPERIMENT = """
from polyvit_fast.config import Model, Task, Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.manifest import Folder

task = Task(modality=Image(size=32), train=Folder(path="train"), val=Folder(path="train"), num_classes=2, steps=4, batch=2)
config = Train(tasks={"pictures": task}, model=Model(dim=32, depth=1, num_heads=2, mlp_dim=32), out="run", device="cpu")
"""


@pytest.mark.parametrize(
    ("command", "status", "where"),
    mark_long([("train", 65, "task pictures"), ("check", 2, "task pictures, train")], [("train", 65, "task pictures")]),
)
def test_a_missing_decoder_is_reported_as_what_it_is(tmp_path, without_opencv, command, status, where):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            photo(40, 60, seed=i).save(tmp_path / "train" / name / f"{i}.png")
    command = [sys.executable, "-m", "polyvit_fast", command, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=without_opencv, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert f"{where}: PNG files cannot be decoded on this machine, not even a whole one of 8 × 8 pixels" in (
        done.stdout if "check" in command else done.stderr
    )
    assert "broken" not in (done.stdout + done.stderr).replace("0 broken files", "")
    assert not list(tmp_path.rglob("*.csv"))


def test_a_whole_picture_of_each_kind_is_known_and_decoded(decoders):
    for kind in SIGNATURES:
        assert kind_of(make_specimen(kind)) == kind
        decoders[0]._check_decodable(kind)
    assert kind_of(b"GIF89a") == kind_of(b"RIFF....WAVE") == kind_of(b"") == ""
