import numpy as np
import pytest
import torch

from polyvit_fast.train.loss import LOSSES, matches, mixed_loss, sigmoid_loss, softmax_loss

LOGITS = np.random.default_rng(0).normal(size=(6, 5)) * 3
HARD = np.array([0, 4, 2, 2, 1, 3])
MULTI = np.random.default_rng(1).integers(0, 2, (6, 5)).astype(float)


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float32 if a.dtype == float else torch.int64) for a in arrays]


def by_hand_softmax(targets):
    log_p = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    return -(targets * log_p).sum(1).mean()


def by_hand_sigmoid(targets):
    p = 1 / (1 + np.exp(-LOGITS))
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_by_hand(smoothing):
    logits, hard, multi = tensors(LOGITS, HARD, MULTI)
    one_hot = np.eye(5)[HARD] * (1 - smoothing) + smoothing / 5
    smooth = MULTI * (1 - smoothing) + smoothing / 5
    assert softmax_loss(logits, hard, smoothing).item() == pytest.approx(by_hand_softmax(one_hot), rel=1e-5)
    assert sigmoid_loss(logits, hard, smoothing).item() == pytest.approx(by_hand_sigmoid(one_hot), rel=1e-5)
    assert sigmoid_loss(logits, multi, smoothing).item() == pytest.approx(by_hand_sigmoid(smooth), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_loss_is_the_loss_of_mixed_targets(name):
    logits, hard = tensors(LOGITS, HARD)
    ratio, partners = 0.3, [1, 0, 3, 2, 5, 4]
    mixed = ratio * np.eye(5)[HARD] + (1 - ratio) * np.eye(5)[HARD[partners]]
    by_hand = {"softmax": by_hand_softmax, "sigmoid": by_hand_sigmoid}[name]
    value = mixed_loss(LOSSES[name], logits, hard, hard[partners], torch.tensor(ratio), 0.0)
    assert value.item() == pytest.approx(by_hand(mixed), rel=1e-5)


def test_matches():
    logits, hard, multi = tensors(LOGITS, HARD, MULTI)
    assert matches(logits, hard).item() == pytest.approx((LOGITS.argmax(1) == HARD).mean())
    assert matches(logits, multi).item() == pytest.approx(((LOGITS > 0) == (MULTI > 0.5)).mean())


def test_losses_are_taken_in_fp32():
    logits, hard, _ = tensors(LOGITS, HARD, MULTI)
    assert softmax_loss(logits.bfloat16(), hard, 0.0).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_losses_ask_no_tensor_for_its_values(name):
    """On a GPU that would wait for the device; a tensor without values cannot answer."""
    logits, labels = torch.zeros(6, 5, device="meta", requires_grad=True), torch.zeros(6, dtype=torch.int64, device="meta")
    value = mixed_loss(LOSSES[name], logits, labels, labels, torch.zeros((), device="meta"), 0.1)
    value.backward()
    assert logits.grad.shape == (6, 5)
    for answers in (labels, torch.zeros(6, 5, device="meta")):
        assert matches(logits, answers).shape == ()
