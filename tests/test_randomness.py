import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvit_fast.randomness import generator, key, permutation


def test_keys_never_change():
    # Fixed for ever: a changed key would change the data order of every run that is resumed.
    assert key(0, "order", "shapes", 3) == 15212401649775007815
    assert permutation(10, "a", 1).tolist() == [1, 4, 0, 9, 6, 3, 7, 2, 5, 8]


def test_keys_tell_parts_apart():
    assert len({key(1, 2), key(12), key("1", "2"), key(2, 1), key("12"), key(1, "2")}) == 6


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permutation_holds_every_number_once(count, seed):
    assert sorted(permutation(count, seed).tolist()) == list(range(count))


def test_permutations_are_spread_evenly():
    positions = np.array([permutation(6, seed, "spread") for seed in range(6000)])
    counts = np.array([np.bincount(column, minlength=6) for column in positions.T])
    chi_square = ((counts - 1000) ** 2 / 1000).sum()  # 25 degrees of freedom: above 60 once in 10,000 times
    assert chi_square < 60


def test_generators_repeat_and_differ():
    assert generator(1, "a").random(4).tolist() == generator(1, "a").random(4).tolist()
    assert generator(1, "a").random() != generator(1, "b").random()
    assert generator(3).random(10_000).mean() == pytest.approx(0.5, abs=0.02)


def test_names_that_are_no_utf_8_have_keys_of_their_own():
    names = ("\udce9", "é", "\\udce9", "\ud800")
    assert len({key("check", name) for name in names}) == len(names)
