from polyvit_fast.data.augment import rand_augment, rand_augment_gpu
from polyvit_fast.data.augment.operations import NUM_OPERATIONS, draw_operations
from polyvit_fast.randomness import generator


def test_pillow_and_the_gpu_have_as_many_operations_as_are_drawn():
    assert len(rand_augment.OPERATIONS) == len(rand_augment_gpu.OPERATIONS) == NUM_OPERATIONS
    drawn = {operation.number for operation in draw_operations(generator("drawn"), 1000, 9.0)}
    assert drawn == set(range(NUM_OPERATIONS))


def test_strengths_are_the_magnitude_in_either_direction():
    operations = draw_operations(generator("drawn"), 100, 4.0)
    assert {operation.strength for operation in operations} == {0.4, -0.4}
    assert draw_operations(generator("drawn"), 100, 4.0) == operations
