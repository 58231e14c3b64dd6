import pytest
from tiny_runs import tile_task


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tile_task(steps=0), "steps = 0 must be at least 1"),
        (lambda: tile_task(batch=-1), "batch = -1 must be at least 1"),
        (lambda: tile_task(num_classes=0), "num_classes = 0"),
        (lambda: tile_task(batch=10, micro_batches=3), "batch = 10 does not divide into micro_batches = 3"),
        (lambda: tile_task(multi_label=True), "multi_label = True needs loss = sigmoid"),
        (lambda: tile_task(drop_path_rate=1.0), r"drop_path_rate = 1.0 must be in \[0, 1\)"),
        (lambda: tile_task(mixup=-0.1), "mixup"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
