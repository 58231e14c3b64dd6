import numpy as np
import pytest
import torch
from generators import rngs
from image_files import BAD, photo
from PIL import Image as Pillow

from polyvit_fast.data import dali
from polyvit_fast.data.image import gpu as module
from polyvit_fast.data.image.cpu import ImageDecoder
from polyvit_fast.data.image.gpu import GpuImageDecoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.media import Media, MediaError

SIZES = ((300, 450), (500, 375), (100, 120), (60, 60), (1, 9), (301, 207))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    paths = [folder / f"{i}.{('jpg', 'png', 'webp', 'gif')[i % 4]}" for i in range(len(SIZES))]
    for i, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        photo(*size, seed=i).save(path)
    return [Media(str(path)) for path in paths]


def both(image, *, train):
    """The CPU form, and the GPU form's code on the CPU."""
    on_cpu = ImageDecoder(image, len(SIZES), train, 2)
    return on_cpu, GpuImageDecoder(on_cpu, torch.device("cpu"))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("image", [Image(size=64), Image(), Image(crop="resize_crop", eval_crop="centre")])
def test_grids_equal_those_of_the_cpu_form(media, image, train):
    on_cpu, on_device = both(image, train=train)
    for seed in range(3):
        expected, grid = on_cpu(media, rngs(len(SIZES), seed)), on_device(media, rngs(len(SIZES), seed))
        assert (grid.shape, grid.dtype) == (expected.shape, torch.uint8)
        difference = (grid.int() - expected.int()).abs()
        assert difference.double().mean() < 0.25
        assert difference[..., 1:-1, 1:-1, :].max() <= 1
        assert difference.max() <= 25
    assert on_device.note == ""


@pytest.mark.parametrize(
    ("image", "mean"), [(Image(size=64, colour_jitter=0.4, hue_jitter_degrees=30.0), 0.3), (Image(size=64, rand_augment_ops=2), 1.0)]
)
def test_augmentations_equal_those_of_the_cpu_form(media, image, mean):
    on_cpu, on_device = both(image, train=True)
    differences = [(on_cpu(media, rngs(6, seed)).int() - on_device(media, rngs(6, seed)).int()).abs() for seed in range(5)]
    per_sample = torch.stack(differences).double().mean((2, 3, 4, 5, 6)).flatten()
    assert per_sample.median() < mean / 2
    assert per_sample.mean() < mean


def test_a_sample_depends_on_its_own_generator_only(media):
    _, decoder = both(Image(size=64, colour_jitter=0.4, rand_augment_ops=2), train=True)
    batch = decoder(media, rngs(6))
    assert torch.equal(torch.cat([decoder([one], [rng]) for one, rng in zip(media, rngs(6), strict=True)]), batch)
    assert torch.equal(decoder(media[::-1], rngs(6)[::-1]).flip(0), batch)
    assert not torch.equal(decoder(media, rngs(6, seed=1)), batch)


def test_runs_are_bounded_and_counted(media, monkeypatch):
    _, decoder = both(Image(size=64), train=False)
    whole = decoder(media, rngs(6))
    files = [len(one.read()) for one in media]
    assert decoder.decoded_bytes == 3 * sum(height * width for height, width in SIZES)
    assert decoder.content_bytes >= sum(files) - files[3]  # the GIF goes in as a PPM
    monkeypatch.setattr(module, "CHUNK_PIXELS", 200_000)
    counts = []
    monkeypatch.setattr(dali, "run", lambda *args, run=dali.run, **kw: (counts.append(len(kw["content"])), run(*args, **kw))[1])
    assert torch.equal(decoder(media, rngs(6)), whole)
    assert counts == [6, 1, 2, 3]  # headers, then pixels


def test_augmentation_is_done_in_chunks(media, monkeypatch):
    _, decoder = both(Image(size=64, colour_jitter=0.4, rand_augment_ops=2), train=True)
    whole = decoder(media, rngs(6))
    monkeypatch.setattr(module, "CHUNK_PIXELS", 4 * 4 * 64 * 64)
    counts = []
    monkeypatch.setattr(module, "augment", lambda *args, augment=module.augment: (counts.append(len(args[0])), augment(*args))[1])
    assert torch.equal(decoder(media, rngs(6)), whole)
    assert counts == [4, 2]


def test_idle_decoders_hold_no_graph_and_work_again(media):
    _, decoder = both(Image(size=32), train=True)
    assert all(graph.pipeline is None for graph in decoder.graphs)
    before = decoder(media, rngs(6))
    assert decoder.pictures.pipeline is not None
    assert decoder.images.pixels.pipeline is None
    decoder.release()
    assert all(graph.pipeline is None for graph in decoder.graphs)
    assert torch.equal(decoder(media, rngs(6)), before)


@pytest.mark.parametrize(
    "kind", ["text", "cut jpeg", "jpeg without data but with its end", "cut webp", "missing", "jpeg that claims 65500 x 65500"]
)
def test_bad_files_say_why_and_the_next_batch_works(media, tmp_path, kind):
    content, reason = BAD[kind]
    if content is not None:
        (tmp_path / "bad.jpg").write_bytes(content)
    _, decoder = both(Image(size=32), train=True)
    before = decoder(media[:1], rngs(1))
    with pytest.raises(MediaError, match=reason):
        decoder([Media(str(tmp_path / "bad.jpg"))], rngs(1))
    with pytest.raises(MediaError):
        decoder([media[0], Media(str(tmp_path / "bad.jpg"))], rngs(2))
    assert decoder.images.headers.pipeline is not None
    assert torch.equal(decoder(media[:1], rngs(1)), before)
    assert decoder.note == ""


def test_what_dalis_gpu_refuses_the_cpu_form_decodes(media, monkeypatch):
    on_cpu, decoder = both(Image(size=32), train=True)

    def refuse(pipeline, failure, run=dali.run, **kw):
        if pipeline is decoder.pictures.pipeline:
            raise MediaError("nvJPEG: not supported")
        return run(pipeline, failure, **kw)

    monkeypatch.setattr(dali, "run", refuse)
    assert torch.equal(decoder(media, rngs(6)), on_cpu(media, rngs(6)))
    assert "nvJPEG: not supported" in decoder.note
    assert decoder.pictures.pipeline is None
    assert decoder.images.headers.pipeline is not None


def test_pictures_that_are_not_jpeg_have_the_cpus_pixels(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, -1)
    Pillow.fromarray(levels).save(tmp_path / "a.png")
    _, decoder = both(Image(size=16), train=False)
    assert np.array_equal(decoder([Media(str(tmp_path / "a.png"))], rngs(1)).squeeze().numpy(), levels)


def test_what_is_erased_is_the_same_on_both_to_the_level(media):
    """Where a picture is not erased it is what it is without, and RandAugment before it has the numbers that it would have."""
    plain, erased = (Image(size=64, rand_augment_ops=2, random_erasing_prob=prob) for prob in (0.0, 0.7))
    forms = {image: both(image, train=True) for image in (plain, erased)}
    for seed in range(4):
        requests = forms[erased][0].request_crops(media, rngs(6, seed))
        assert 0 < sum(request.augmentation.erasing is not None for request in requests) <= 6
        for number in (0, 1):
            without, grid = (forms[image][number](media, rngs(6, seed)).squeeze((1, 2)) for image in (plain, erased))
            for index, request in enumerate(requests):
                expected = without[index].clone()
                if erasing := request.augmentation.erasing:
                    rows, columns, _ = erasing.noise.shape
                    noise = torch.from_numpy(erasing.noise)
                    expected[erasing.top : erasing.top + rows, erasing.left : erasing.left + columns] = noise
                assert torch.equal(grid[index], expected)


def test_nothing_is_erased_in_evaluation(media):
    for erased, plain in zip(both(Image(size=32, random_erasing_prob=1.0), train=False), both(Image(size=32), train=False), strict=True):
        assert torch.equal(erased(media, rngs(6)), plain(media, rngs(6)))
