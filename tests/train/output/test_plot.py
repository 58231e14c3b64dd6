"""The picture of a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from long_forms import mark_long
from matplotlib.text import Text
from PIL import Image
from tiny_runs import tile_task, tiny_config

from polyvit_fast.config import LogOptions
from polyvit_fast.inference.training import train
from polyvit_fast.train.output import plot
from polyvit_fast.train.output.colours import task_colour, to_rgb
from polyvit_fast.train.output.plot import plot_run
from polyvit_fast.train.run_folder.checkpoint import find_checkpoint


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a run folder: gives back the PNG's pixels and, by task and title, the panels."""
    figures = []
    save = plot.save_figure
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))

    def draw_run(folder: Path, names=()):
        plot_run(folder, tmp_path / "new" / "curves.png", names)
        panels = {}
        for axes in figures[-1].axes:
            name = "".join(text.get_text().replace("\n", "") for text in axes.texts) or name  # above a task's first panel
            panels.setdefault(name, {})[axes.get_title("left")] = axes
        with Image.open(tmp_path / "new" / "curves.png") as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB")).astype(int), panels

    return draw_run


def find_colour(image: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels in a task's pure colour."""
    return np.nonzero((abs(image - to_rgb(task_colour(index))) <= 1).all(2))


def write_lines(folder: Path, *lines: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0} | line) + "\n" for line in lines) + '{"step": 1000, "ki')
    return folder


def make_lines(tasks: list[str], num_points: int) -> list[dict]:
    lines = []
    for step in range(1, num_points + 1):
        progress = step / num_points
        row = {"loss": 2 * math.exp(-progress), "accuracy": progress, "examples_per_second": 9.0, "steps": 1}
        lines.append({"step": step, "kind": "train", "lr": 0.1, "tasks": dict.fromkeys(tasks, row)})
    lines[0]["tasks"] = {task: row | {"loss": None} for task, row in lines[0]["tasks"].items()}
    final = {task: {"mAP" if j % 2 else "top1": 0.9, "loss": 0.8, "num_examples": 5} for j, task in enumerate(tasks)}
    return [*lines, {"step": num_points, "kind": "eval", "tasks": final}]


@pytest.mark.parametrize(("num_tasks", "num_points"), mark_long([(1, 1), (9, 500)], [(9, 500)]))
def test_a_run_has_a_curve_for_every_task(tmp_path, draw, num_tasks, num_points):
    tasks = [f"task_{j}" for j in range(num_tasks)]
    folder = write_lines(tmp_path / "run", *make_lines(tasks, num_points))
    image, panels = draw(folder)
    assert list(panels) == tasks
    for j in range(num_tasks):
        rows, columns = find_colour(image, j)
        assert len(rows) > (200 if num_points > 1 else 5)
        if num_points > 1:
            assert np.ptp(columns) > 100
    curves = plot._read_curves(folder / "metrics.jsonl")
    assert list(curves) == tasks
    assert curves["task_0"]["eval/top1"] == ([num_points], [0.9])
    assert curves["task_0"]["train/accuracy"][0] == list(range(1, num_points + 1))
    assert math.isnan(curves["task_0"]["train/loss"][1][0])


def test_tasks_have_the_order_and_the_colours_of_the_configuration(tmp_path, draw):
    folder = write_lines(tmp_path / "run", *make_lines(["c", "a", "stranger"], 30))
    _, panels = draw(folder, ["a", "b", "c"])
    assert list(panels) == ["a", "c", "stranger"]
    colours = [panels[name]["loss"].lines[0].get_color() for name in panels]
    assert colours[:2] == [task_colour(0), task_colour(2)]
    assert colours[2] not in colours[:2]


@pytest.mark.parametrize("last", [1, 5, 999, 2_000, 123_456])
def test_steps_end_where_the_run_ends_and_have_thousands_separators(tmp_path, draw, last):
    row = {"a": {"loss": 1.0, "accuracy": 0.5}}
    _, panels = draw(write_lines(tmp_path / "run", *({"step": step, "kind": "train", "tasks": row} for step in sorted({1, last}))))
    for axes in panels["a"].values():
        assert axes.get_xlim() == (0, last)
        assert axes.get_xticks()[-1] == last
    assert [text.get_text() for text in panels["a"]["accuracy"].get_xticklabels()][-1] == f"{last:,}"


def test_training_and_held_out_metric_of_a_task_with_several_labels_have_panels_of_their_own(tmp_path, draw):
    folder = write_lines(tmp_path / "run", *make_lines(["one", "several"], 40))
    _, panels = draw(folder)
    assert list(panels["one"]) == ["loss", "accuracy"]
    assert list(panels["several"]) == ["loss", "mAP", "yes-no accuracy in training"]
    of_run = {title: {tuple(line.get_ydata()) for line in axes.lines} for title, axes in panels["several"].items()}
    training = tuple(step / 40 for step in range(1, 41))
    assert (0.9,) in of_run["mAP"]
    assert training in of_run["yes-no accuracy in training"]
    assert not of_run["mAP"] & of_run["yes-no accuracy in training"] - {(0, 1)}  # (0, 1): the line at the best checkpoint


def test_the_best_checkpoint_is_marked_with_its_value(tmp_path, draw):
    values = {10: (0.5, 0.6), 20: (0.9, 0.7), 30: (None, 0.99), 40: (0.7, 0.9), 50: (0.8, 0.8)}  # 20, 40 and 50: the mean is 0.8
    evaluations = [
        {"step": step, "kind": "eval", "tasks": {"a": {"top1": a, "loss": 1 / step}, "b": {"mAP": b, "loss": 1.0}}}
        for step, (a, b) in values.items()
    ]
    _, panels = draw(write_lines(tmp_path / "run", *evaluations))
    for name, title, text in (("a", "accuracy", "★ 0.900  ○ 0.800"), ("b", "mAP", "★ 0.700  ○ 0.800"), ("a", "loss", "★ 0.05  ○ 0.02")):
        axes = panels[name][title]
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert [list(star.get_xdata()) for star in stars] == [[20]]
        assert axes.get_title("right") == text
        assert [20, 20] in [list(line.get_xdata()) for line in axes.lines]
    assert "best checkpoint, step 20" in panels["a"]["loss"].figure.get_suptitle()


def test_the_best_checkpoint_is_the_one_that_the_run_kept(tmp_path, draw):
    tasks = {"b": tile_task(steps=30, lr_scale=8.0), "a": tile_task(steps=30, num_classes=4, loss="sigmoid", multi_label=True)}
    config = tiny_config(tasks=tasks, log=LogOptions(log_every_steps=5, eval_every_steps=6, keep=1))
    train(config, out=tmp_path / "run")
    best = find_checkpoint(tmp_path / "run", "best").step
    assert plot._find_best_step(plot._read_curves(tmp_path / "run" / "metrics.jsonl")) == best
    _, panels = draw(tmp_path / "run", list(tasks))
    assert list(panels) == ["b", "a"]
    assert panels["b"]["loss"].get_xlim() == (0, 60)
    assert f"best checkpoint, step {best}, " in panels["b"]["loss"].figure.get_suptitle().replace("\n", " ")


@pytest.mark.parametrize("num_tasks", [1, 2, 14])
def test_no_text_covers_another_or_leaves_the_picture(tmp_path, draw, num_tasks):
    tasks = [f"a-task-with-a-name-of-fifty-letters_and-more-no_{j:02}" for j in range(num_tasks)]
    lines = make_lines(tasks, 30)
    lines += [{"step": 123_456, "kind": "eval", "tasks": {task: row | {"loss": 0.000123456} for task, row in lines[-1]["tasks"].items()}}]
    image, panels = draw(write_lines(tmp_path / "run", *lines), tasks)
    figure = panels[tasks[0]]["loss"].figure
    texts = [text for axes in figure.axes for text in (axes._left_title, axes._right_title, *axes.texts, axes.xaxis.label)]
    texts += [label for axes in figure.axes for label in axes.get_xticklabels()]
    boxes = [Text.get_window_extent(text) for text in [figure._suptitle, *texts] if text.get_text()]
    assert len(boxes) > 8 * num_tasks
    assert all(0 <= box.x0 < box.x1 <= image.shape[1] and 0 <= box.y0 < box.y1 <= image.shape[0] for box in boxes)
    assert not [(one, other) for number, one in enumerate(boxes) for other in boxes[:number] if one.shrunk(0.95, 0.8).overlaps(other)]


@pytest.mark.parametrize("value", [None, 0.0, 1e9])
def test_a_run_of_one_strange_point_is_drawn(tmp_path, draw, value):
    row = {"a": {"loss": value, "accuracy": value and 0.5, "top1": value and 0.5}}
    lines = [{"step": 1, "kind": kind, "tasks": row} for kind in ("train", "eval")]
    image, panels = draw(write_lines(tmp_path / "run", *lines))
    assert panels["a"]["accuracy"].get_title("right") == (
        "★ nan  ○ nan" if value is None else f"★ {row['a']['top1']:.3f}  ○ {row['a']['top1']:.3f}"
    )
    assert (image < 100).any()


def test_smoothing_keeps_lines_and_passes_over_nan():
    values = [float(i) for i in range(300)]
    smoothed = plot._smooth(values)
    assert np.allclose(smoothed[20:-20], values[20:-20])
    values[100] = float("nan")
    again = plot._smooth(values)
    assert np.isfinite(again).all()
    assert abs(again[100] - 100) < 1
    assert np.isnan(plot._smooth([float("nan")])).all()
    assert plot._smooth([2.0]).tolist() == [2.0]


def test_a_folder_without_points_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing: not a run folder, or nothing was logged yet"):
        plot_run(tmp_path, tmp_path / "curves.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no points: nothing was logged yet"):
        plot_run(tmp_path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
