import pytest

from polyvit_fast.config import Optim


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optim(lr=0.0), "lr = 0.0 must be positive"),
        (lambda: Optim(betas=(0.9, 1.0)), r"betas\[1\] = 1.0 must be in \[0, 1\)"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
