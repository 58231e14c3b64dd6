"""Random generators for the samples of a batch."""

from polyvit_fast.randomness import generator


def rngs(count, seed=0):
    return [generator(seed, "test", i) for i in range(count)]
