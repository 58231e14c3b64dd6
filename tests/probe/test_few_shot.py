import pytest
import torch

from polyvit_fast.probe.few_shot import NUM_DRAWS, PENALTIES, draw_shots, measure_few_shot, solve_ridge

GENERATOR = torch.Generator().manual_seed(0)


def clusters(count, num_classes=4, dim=12, spread=0.5, seed=1):
    """Features around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % num_classes
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize("count", [8, 40])
def test_weights_of_every_penalty_solve_the_normal_equations(count):
    features, labels = clusters(count)
    weights, mean, target = solve_ridge(features, labels, 4, PENALTIES)
    x, y = features.double() - features.double().mean(0), torch.nn.functional.one_hot(labels, 4).double() * 2 - 1
    for penalty, found in zip(PENALTIES, weights, strict=True):
        truth = torch.linalg.solve(x.t() @ x + penalty * torch.eye(12, dtype=torch.float64), x.t() @ (y - y.mean(0)))
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(target, y.mean(0))


def test_every_class_has_as_many_shots_as_it_can():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] * 10)
    drawn = draw_shots(labels, 3, 5, 0)
    assert torch.bincount(labels[drawn]).tolist() == [5, 3, 5]
    assert len(drawn.unique()) == 13
    assert torch.equal(drawn, draw_shots(labels, 3, 5, 0))
    assert not torch.equal(drawn, draw_shots(labels, 3, 5, 1))
    assert set(draw_shots(labels, 3, 1, 7).tolist()) <= set(draw_shots(labels, 3, 5, 7).tolist()) | set(range(23))


def test_more_shots_are_more_accurate_and_the_interval_is_that_of_the_draws():
    train, val = clusters(400, spread=2.0), clusters(400, spread=2.0, seed=2)
    one, many = (measure_few_shot(train, val, 4, shots, 0) for shots in (1, 50))
    assert 0.3 < one.accuracy.value < many.accuracy.value - 0.1
    assert one.accuracy.high - one.accuracy.low > 2 * (many.accuracy.high - many.accuracy.low)
    assert one.penalty in PENALTIES


def test_all_examples_may_be_drawn():
    train, val = clusters(8, spread=0.1), clusters(40, spread=0.1, seed=3)
    assert measure_few_shot(train, val, 4, 20, 0).accuracy.value == 1.0
    assert NUM_DRAWS == 10
