"""Decoding from files to grids: our decoders on two threads against a torch DataLoader of two workers that does the same work.

Run: pytest benchmarks/bench_data.py. Each contender makes the same grids (asserted before it is timed) from the same files.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader, Dataset

from polyvit_fast.data.image import Image
from polyvit_fast.data.rand_augment import rand_augment
from polyvit_fast.media import Media
from polyvit_fast.randomness import generator

NUM_THREADS = 2


def time_rate(benchmark, contender: str, run: Callable[[], object], amount: float, unit: str) -> None:
    """Time `run`, which decodes `amount` units; the table at the end shows units per second."""
    benchmark.extra_info.update(contender=contender, amount=amount, unit=unit)
    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)


# Images: the Inception crop and flip of ImageNet training, 224 x 224 uint8

NUM_IMAGES, IMAGE_BATCH = 256, 64
IMAGES = {"images": Image(), "images, RandAugment": Image(rand_augment_ops=2)}


@pytest.fixture(scope="session")
def image_files(tmp_path_factory) -> list[str]:
    """JPEGs of 500 x 375 pixels and about 85 kB, as ImageNet's: smooth shapes, edges and grain."""
    folder, paths = tmp_path_factory.mktemp("images"), []
    y, x = np.mgrid[:375, :500]
    for i in range(NUM_IMAGES):
        rng = generator("bench image", i)
        a, b, c, d = rng.uniform(0.005, 0.15, 4)
        waves = np.stack([np.sin(a * x + b * y), np.cos(c * x) * np.sin(a * y), np.sign(np.sin(d * (x - y)))], -1)
        pixels = 127 + 60 * waves + rng.normal(0, 14, (375, 500, 1))
        paths.append(str(folder / f"{i}.jpg"))
        Pillow.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class PillowImages(Dataset):
    """The crops that `image` draws, made by Pillow."""

    def __init__(self, image: Image, paths: list[str]) -> None:
        self.image, self.paths = image, paths
        self.choose_box = image.decoder(batch=1, train=True, num_threads=1)._choose_box

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = generator("bench", index)
        with Pillow.open(self.paths[index]) as file:
            picture = file.convert("RGB")
        top, left, height, width = self.choose_box(picture.height, picture.width, rng)
        size = (self.image.size, self.image.size)
        picture = picture.crop((left, top, left + width, top + height)).resize(size, Pillow.Resampling.BILINEAR)
        if rng.random() < 0.5:
            picture = picture.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.array(picture)
        if self.image.rand_augment_ops:
            pixels = rand_augment(pixels, rng, self.image.rand_augment_ops, self.image.rand_augment_magnitude)
        return torch.from_numpy(pixels)


def decode_images(image: Image, paths: list[str]) -> Callable[[], torch.Tensor]:
    decoder = image.decoder(batch=IMAGE_BATCH, train=True, num_threads=NUM_THREADS)

    def run() -> torch.Tensor:
        first = None
        for start in range(0, len(paths), IMAGE_BATCH):
            media = [Media(path) for path in paths[start : start + IMAGE_BATCH]]
            grid = decoder(media, [generator("bench", start + i) for i in range(len(media))])
            first = grid if first is None else first
        assert first is not None
        return first

    return run


@pytest.mark.parametrize("group", IMAGES)
def test_images_ours(benchmark, image_files, group):
    benchmark.group = group
    run = decode_images(IMAGES[group], image_files)
    expected = torch.stack([PillowImages(IMAGES[group], image_files)[i] for i in range(IMAGE_BATCH)])
    difference = (run().squeeze((1, 2)).double() - expected).abs()
    # One level apart before RandAugment may be several after it, where that stretches the contrast or inverts.
    assert difference.mean() < (3 if IMAGES[group].rand_augment_ops else 0.3)
    time_rate(benchmark, "ours", run, NUM_IMAGES, "images")


@pytest.mark.parametrize("group", IMAGES)
def test_images_dataloader(benchmark, image_files, group):
    benchmark.group = group
    dataset = PillowImages(IMAGES[group], image_files)
    loader = DataLoader(dataset, batch_size=IMAGE_BATCH, num_workers=NUM_THREADS, persistent_workers=True)
    assert torch.equal(next(iter(loader))[3], dataset[3])
    time_rate(benchmark, "DataLoader, Pillow", lambda: list(loader), NUM_IMAGES, "images")
