"""Randomness as pure functions of integers and words: no state to save, the same on every machine and in every order."""

from __future__ import annotations

import hashlib

import numpy as np


def key(*parts: int | str) -> int:
    """A 64-bit hash of all `parts` and their order, the same in every version."""
    # Names of files may hold bytes that are no UTF-8, which Python keeps as lone surrogates.
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """The random generator of `parts`, for instance (seed, "augment", task, epoch, sample)."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def permutation(count: int, *parts: int | str) -> np.ndarray:
    """The numbers 0 to count - 1 in an order that follows from `parts`: int64 [count]."""
    # Sorting a hash of each number (splitmix64, Steele et al. 2014) instead of a library's shuffle: its result never changes.
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key(*parts))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return np.argsort(x)  # splitmix64 is a bijection, so there are no ties whose order could depend on the sorting algorithm
