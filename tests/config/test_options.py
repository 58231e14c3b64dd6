import pytest
from tiny_runs import tiny_config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_config(log_every_steps=0), "log_every_steps = 0 must be at least 1"),
        (lambda: tiny_config(max_bad_ratio=1.5), "max_bad_ratio"),
        (lambda: tiny_config(early_stop_evaluations=-1), "early_stop_evaluations = -1 must not be negative"),
        (
            lambda: tiny_config(early_stop_evaluations=3),
            "early_stop_evaluations = 3 needs evaluations during the run: set eval_every_steps",
        ),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
