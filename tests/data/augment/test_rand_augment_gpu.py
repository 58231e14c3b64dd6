import numpy as np
import pytest
import torch
from image_files import vary_pictures

from polyvit_fast.data.augment import rand_augment as pillow
from polyvit_fast.data.augment.operations import Operation, draw_operations
from polyvit_fast.data.augment.rand_augment import apply_operations
from polyvit_fast.data.augment.rand_augment_gpu import OPERATIONS, rand_augment
from polyvit_fast.randomness import generator

LEVELS = 1  # of 255; only blended operations may need it
STRENGTHS = (0.9, -0.9, 0.3, -0.55, 1.0, -1.0, 0.0)


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (40, 31)])
@pytest.mark.parametrize("index", range(14), ids=[op.__name__[1:] for op in pillow.OPERATIONS])
def test_every_operation_equals_pillows(index, size):
    assert OPERATIONS[index].__name__ == pillow.OPERATIONS[index].__name__
    batch = vary_pictures(*size)
    result = OPERATIONS[index](torch.from_numpy(batch), np.array(STRENGTHS)).numpy()
    for picture, changed, strength in zip(batch, result, STRENGTHS, strict=True):
        expected = apply_operations(picture, [Operation(index, strength)])
        assert np.abs(changed.astype(int) - expected).max() <= LEVELS


def test_a_batch_equals_its_pictures_with_operations_of_their_own():
    batch = np.concatenate([vary_pictures(48, 48)] * 10)
    drawn = [draw_operations(generator("ops", i), 2, 9.0) for i in range(len(batch))]
    drawn[3], drawn[4] = [], drawn[4][:1]
    original = torch.from_numpy(batch.copy())
    result = rand_augment(original, drawn).numpy()
    assert torch.equal(original, torch.from_numpy(batch))
    expected = np.stack([apply_operations(picture, operations) for picture, operations in zip(batch, drawn, strict=True)])
    assert np.abs(result.astype(int) - expected).max() <= LEVELS
    assert len({one.number for operations in drawn for one in operations}) == 14


def test_nothing_drawn_changes_nothing():
    batch = torch.from_numpy(vary_pictures(32, 32))
    assert torch.equal(rand_augment(batch, [[]] * len(batch)), batch)
