import pytest
import torch
from compare import assert_within_rule


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def passes(error, baseline) -> bool:
    """Whether the rule lets errors pass where plain PyTorch makes those of the baseline."""
    true = torch.ones(error.shape, dtype=torch.float64)
    try:
        assert_within_rule({"y": (true + error).float()}, {"y": (true + baseline).float()}, {"y": true}, torch.bfloat16)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("numel", [32, 1000, 30_000])
def test_errors_of_the_same_distribution_pass_whatever_the_seed(numel):
    assert all(passes(0.01 * normal(numel, seed=seed), 0.01 * normal(numel, seed=-seed - 1)) for seed in range(100))


@pytest.mark.parametrize("numel", [32, 1000, 30_000])
def test_errors_that_are_larger_throughout_do_not_pass(numel):
    assert not any(passes(0.04 * normal(numel, seed=seed), 0.01 * normal(numel, seed=-seed - 1)) for seed in range(100))


@pytest.mark.parametrize("numel", [32, 1000, 30_000])
def test_one_wrong_element_and_a_lost_scale_do_not_pass(numel):
    error = 0.01 * normal(numel, seed=0)
    wrong, missing = error.clone(), error.clone()
    wrong[7], missing[7] = 0.1, torch.nan
    assert passes(error, error)
    assert not passes(wrong, error)
    assert not passes(missing, error)
    assert not passes(error + 0.03, error)
