from collections import Counter

import numpy as np
import pytest
import torch
from tiny_runs import Tile, tile_task
from torch.nn import functional

from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.randomness import generator


def decode(task, source, indices, train=True, seed=0):
    samples = source.samples(task)
    decoder = source.decoder(task, batch=64, train=train, num_threads=1)
    return decoder([samples[i].media for i in indices], [generator(seed, i) for i in indices])


def test_labels_cover_all_classes_equally():
    samples = Synthetic(num_samples=50).samples(tile_task(num_classes=7))
    counts = Counter(label for sample in samples for label in sample.labels)
    assert sorted(counts) == list(range(7))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({sample.media.name for sample in samples}) == 50


def test_multi_label_samples_have_one_or_more_classes():
    samples = Synthetic(num_samples=400).samples(tile_task(num_classes=6, loss="sigmoid", multi_label=True))
    assert all(sample.labels and list(sample.labels) == sorted(set(sample.labels)) for sample in samples)
    fraction = np.mean([len(sample.labels) for sample in samples]) / 6
    assert fraction == pytest.approx((1 + 5 * 0.2) / 6, abs=0.03)
    assert {label for sample in samples for label in sample.labels} == set(range(6))


def test_grids_depend_on_the_sample_alone():
    task, source = tile_task(), Synthetic(num_samples=50)
    batch = decode(task, source, range(8))
    assert (batch.shape, batch.dtype) == ((8, 1, 1, 16, 16, 3), torch.float32)
    assert torch.equal(batch[3:4], decode(task, source, [3], seed=9))
    assert not torch.equal(batch[0], batch[3])  # one class, but noise of their own
    assert not torch.equal(batch, decode(task, Synthetic(num_samples=50, seed=1), range(8)))


def test_evaluation_has_all_views():
    grid = decode(tile_task(modality=Tile(views=3)), Synthetic(num_samples=50), [0, 1], train=False)
    assert grid.shape == (2, 3, 1, 16, 16, 3)


def test_grids_are_in_the_units_of_the_normalisation():
    class Shifted(Tile):
        @property
        def normalisation(self):
            return (100.0, 50.0, 0.0), (10.0, 20.0, 1.0)

    plain = decode(tile_task(), Synthetic(), range(30))
    shifted = decode(tile_task(modality=Shifted()), Synthetic(), range(30))
    expected = plain * torch.tensor([10.0, 20.0, 1.0]) + torch.tensor([100.0, 50.0, 0.0])
    assert torch.allclose(shifted, expected, atol=1e-4)


def test_classes_are_learnable_from_one_split_to_the_other():
    task = tile_task(num_classes=5)
    train = decode(task, Synthetic(num_samples=50), range(50)).flatten(1)
    val = decode(task, Synthetic(num_samples=50, seed=1), range(50)).flatten(1)
    means = torch.stack([train[label::5].mean(0) for label in range(5)])
    assert torch.equal(torch.cdist(val, means).argmin(1), torch.arange(50) % 5)
    first, second = train[0].view(2, 8, 2, 8, 3)[0, :, 0].flatten(), val[5].view(2, 8, 2, 8, 3)[1, :, 1].flatten()
    assert functional.cosine_similarity(first, second, 0) > 0.7  # each patch alone tells the class


def test_at_least_one_sample():
    with pytest.raises(ValueError, match="num_samples = 0 must be at least 1"):
        Synthetic(num_samples=0)
