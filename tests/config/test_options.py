import pytest
from tiny_runs import tiny_config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_config(log_every_steps=0), "log_every_steps = 0 must be at least 1"),
        (lambda: tiny_config(max_bad_ratio=1.5), "max_bad_ratio"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
