import pytest
import torch
from torch.nn import functional

from polyvit_fast.probe.heads import AttentiveProbe, LinearProbe, split_for_choice


def noisy(count, num_classes=3, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = 5 + 3 * torch.randn(count, dim, generator=generator)
    weights = torch.randn(dim, num_classes, generator=torch.Generator().manual_seed(9))
    logits = (features - 5) @ weights + 2 * torch.randn(count, num_classes, generator=generator)
    return features, logits.argmax(1)


def solve(features, targets, penalty, loss):
    """The classifier that minimises the objective, in fp64, by another optimizer."""
    x = ((features - features.mean(0)) / features.std(0)).double()
    weight = torch.zeros(targets.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = x @ weight.t() + bias
        if loss == "softmax":
            value = functional.cross_entropy(logits, targets)
        else:
            value = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(x)
        value = value + 0.5 * penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return (x @ weight.t() + bias).detach()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_each_penalty_has_the_logistic_regression_of_its_own(loss):
    features, labels = noisy(300)
    targets = functional.one_hot(labels, 3).double()
    if loss == "sigmoid":
        targets = (targets + functional.one_hot(labels.flip(0), 3)).clamp(max=1)
    probe = LinearProbe(3, loss, (0.3, 0.01))
    probe.fit(features, labels if loss == "softmax" else targets.float(), 0)
    for penalty, logits in zip((0.3, 0.01), probe.predict(features), strict=True):
        exact = solve(features, targets, penalty, loss)
        difference = exact - logits if loss == "sigmoid" else (exact.softmax(1) - logits.double().softmax(1))
        assert difference.abs().max() < 0.02
    assert probe.classifier[0].norm() < 0.7 * probe.classifier[1].norm()


def test_penalties_do_not_see_one_another():
    features, labels = noisy(100)
    both, alone = LinearProbe(3, "softmax", (0.1, 0.001)), LinearProbe(3, "softmax", (0.1,))
    both.fit(features, labels, 3)
    alone.fit(features, labels, 3)
    torch.testing.assert_close(both.predict(features)[:1], alone.predict(features), rtol=1e-4, atol=1e-4)


def test_a_fit_repeats():
    features, labels = noisy(100)
    runs = []
    for _ in range(2):
        probe = AttentiveProbe(3, "softmax", (0.1, 0.01))
        probe.fit(features[:, None].expand(-1, 5, -1) + torch.arange(5.0)[:, None], labels, 3)
        runs.append(probe.predict(features[:, None].expand(-1, 5, -1)))
    assert torch.equal(*runs)


def test_attention_finds_the_token_that_tells():
    """The class is in the one token that a mark distinguishes, wherever it is: the mean of all tokens says little."""
    generator = torch.Generator().manual_seed(0)
    count, tokens, dim = 600, 16, 24
    labels = torch.randint(0, 3, (count,), generator=generator)
    x = torch.randn(count, tokens, dim, generator=generator)
    where = torch.randint(0, tokens, (count,), generator=generator)
    signal = torch.zeros(3, dim)
    signal[:, 8:] = 2 * torch.randn(3, dim - 8, generator=generator)
    x[torch.arange(count), where] += signal[labels]
    x[torch.arange(count), where, :8] += 6
    accuracy = {}
    for kind, features in ((AttentiveProbe, x), (LinearProbe, x.mean(1))):
        probe = kind(3, "softmax", (0.001, 0.01, 0.1))
        probe.fit(features[:400], labels[:400], 0)
        accuracy[kind] = (probe.predict(features[400:]).argmax(-1) == labels[400:]).double().mean(1).max()
    assert accuracy[AttentiveProbe] > 0.9
    assert accuracy[AttentiveProbe] > accuracy[LinearProbe] + 0.05


def test_features_that_never_change_are_no_division_by_zero():
    features, labels = noisy(50)
    features[:, 0] = 4.0
    probe = LinearProbe(3, "softmax", (0.01,))
    probe.fit(features, labels, 0)
    assert probe.predict(features).isfinite().all()


def test_a_fifth_is_held_out_for_the_choice():
    fitted, held_out = split_for_choice(53, 0)
    assert (len(fitted), len(held_out)) == (43, 10)
    assert sorted(torch.cat([fitted, held_out]).tolist()) == list(range(53))
