import numpy as np
import pytest
import torch

from polyvit_fast.data.augment import rand_augment as pillow
from polyvit_fast.data.augment.rand_augment import Operation, augmented, draw_operations
from polyvit_fast.data.augment.rand_augment_gpu import OPERATIONS, rand_augment
from polyvit_fast.randomness import generator

LEVELS = 1  # of 255; only blended operations may need it
STRENGTHS = (0.9, -0.9, 0.3, -0.55, 1.0, -1.0, 0.0)


def pictures(height, width):
    """Waves with noise, one grey, one with all levels, one with two."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = 110 + 70 * np.stack([np.sin(x / 5), np.cos(y / 7), np.sin((x + 2 * y) / 9)], -1)
    made = [(waves + rng.normal(0, 10, waves.shape)).clip(20, 230) for _ in range(4)]
    made += [np.full(waves.shape, 7), 255 * rng.random(waves.shape) ** 3, 90 + 100 * (waves > 110)]
    return np.stack(made).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (40, 31)])
@pytest.mark.parametrize("index", range(14), ids=[op.__name__[1:] for op in pillow.OPERATIONS])
def test_every_operation_equals_pillows(index, size):
    assert OPERATIONS[index].__name__ == pillow.OPERATIONS[index].__name__
    batch = pictures(*size)
    result = OPERATIONS[index](torch.from_numpy(batch), np.array(STRENGTHS)).numpy()
    for picture, changed, strength in zip(batch, result, STRENGTHS, strict=True):
        expected = augmented(picture, [Operation(index, strength)])
        assert np.abs(changed.astype(int) - expected).max() <= LEVELS


def test_a_batch_equals_its_pictures_with_operations_of_their_own():
    batch = np.concatenate([pictures(48, 48)] * 10)
    drawn = [draw_operations(generator("ops", i), 2, 9.0) for i in range(len(batch))]
    drawn[3], drawn[4] = [], drawn[4][:1]
    original = torch.from_numpy(batch.copy())
    result = rand_augment(original, drawn).numpy()
    assert torch.equal(original, torch.from_numpy(batch))
    expected = np.stack([augmented(picture, operations) for picture, operations in zip(batch, drawn, strict=True)])
    assert np.abs(result.astype(int) - expected).max() <= LEVELS
    assert len({one.number for operations in drawn for one in operations}) == 14


def test_nothing_drawn_changes_nothing():
    batch = torch.from_numpy(pictures(32, 32))
    assert torch.equal(rand_augment(batch, [[]] * len(batch)), batch)
