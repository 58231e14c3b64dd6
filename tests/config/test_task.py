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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 3}, "warmup_steps = 3 of a task needs lr_schedule cosine or constant; optim.warmup_steps is that of the run"),
        ({"warmup_steps": 10, "lr_schedule": "cosine"}, "warmup_steps = 10 must not be negative, and less than the task's steps = 10"),
        ({"warmup_steps": -1, "lr_schedule": "constant"}, "warmup_steps = -1 must not be negative"),
        ({"loss_weight": 0.0}, "loss_weight = 0.0 must be positive; to leave a task out, take --only"),
    ],
)
def test_learning_rates_and_weights_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tile_task(**changes)
