import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from long_forms import mark_long
from PIL import Image
from rich.console import Console

from polyvit_fast.config import Modality, Optim, Source, Task, Train
from polyvit_fast.train.output import plot
from polyvit_fast.train.output.colours import COLOURS
from polyvit_fast.train.output.plot import build_schedule_table, plot_run, plot_schedule, print_schedule
from polyvit_fast.train.schedule import LearningRates, make_step_plan


@dataclass(frozen=True, kw_only=True)
class Patch(Modality):
    name: ClassVar[str] = "patch"
    grid = (1, 8, 8, 3)
    tubelet = (1, 8, 8)
    normalisation = ((0.0,), (1.0,))
    eval_views = 1


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    def samples(self, task):
        return []


def config(steps: dict[str, int], schedule: str = "weighted", **lr_scales: float) -> Train:
    def task(name: str) -> Task:
        scale = lr_scales.get(name, 1.0)
        return Task(modality=Patch(), train=Files(), val=Files(), num_classes=3, steps=steps[name], lr_scale=scale)

    return Train(tasks={name: task(name) for name in steps}, schedule=schedule, optim=Optim(warmup_steps=5))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def where(image: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels in a task's pure colour."""
    colour = [int(COLOURS[index][i : i + 2], 16) for i in (1, 3, 5)]
    return np.nonzero((abs(image - colour) <= 1).all(2))


def draw(tmp_path: Path, of: Train) -> np.ndarray:
    plan = make_step_plan(of)
    path = tmp_path / "new" / "schedule.png"
    plot_schedule(path, plan, of, list(LearningRates(of, plan)))
    return pixels(path)


def test_the_raster_shows_each_task_at_its_steps(tmp_path):
    of = config({"a": 30, "b": 60, "c": 10}, "task-by-task")
    image = draw(tmp_path, of)
    plan = make_step_plan(of)
    spans = {name: where(image, j) for j, name in enumerate(of.tasks)}
    left = min(columns.min() for _, columns in spans.values())
    width = max(columns.max() for _, columns in spans.values()) + 1 - left
    for name, (rows, columns) in spans.items():
        steps = [step for step, names in enumerate(plan) if name in names]
        assert (columns.min() - left) / width == pytest.approx(steps[0] / 100, abs=0.005)
        assert (columns.max() + 1 - left) / width == pytest.approx((steps[-1] + 1) / 100, abs=0.005)
        assert len(rows) > 0.9 * (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a filled bar
    assert spans["a"][0].max() < spans["b"][0].min() < spans["b"][0].max() < spans["c"][0].min()


def test_the_density_of_columns_is_exact():
    few = np.array([[True, False, True, False], [False, True, True, True]])
    assert (plot._compute_density(few) == few).all()
    many = np.arange(4500) < 1500
    density = plot._compute_density(np.stack([many, ~many]))
    assert density.shape == (2, plot.MAX_COLUMNS)
    assert np.allclose(density.sum(0), 1)
    assert density[0].nonzero()[0].max() == 333
    assert density[0, 333] == pytest.approx(1 / 4)  # steps 1499 to 1502


@pytest.mark.parametrize(
    "schedule", ["weighted", *(pytest.param(name, marks=pytest.mark.long) for name in ("uniform", "alternating", "accumulating"))]
)
def test_nine_tasks_and_a_hundred_thousand_steps_are_drawn(tmp_path, schedule):
    steps = {f"task_{j}": 2000 * (j + 1) + 2222 for j in range(9)}
    image = draw(tmp_path, config(steps, schedule, task_3=0.5, task_5=0.1))
    assert image.shape[0] > 900
    assert image.shape[1] == 1300
    ink = 255 - image
    for colour in COLOURS[:9]:  # each row of the raster is full of its task's colour, mixed with white
        pure = 255 - np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        alike = (ink @ pure) > 0.999 * np.linalg.norm(ink, axis=2) * np.linalg.norm(pure)
        assert (alike & (np.linalg.norm(ink, axis=2) > 20)).sum() > 10_000


def test_the_table_of_a_plan_is_exact(capsys):
    plan = [("a",), ("b",), ("b",), ("b",), ("a",), ("c",), ("a", "b")]
    console = Console(file=io.StringIO(), width=80)
    console.print(build_schedule_table(plan))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()[2:] if line.strip()]
    assert rows == [
        ["a", "3", "37.50%", "0", "6", "3"],
        ["b", "4", "50.00%", "1", "6", "2"],
        ["c", "1", "12.50%", "5", "5", "0"],
    ]
    lrs = [0.25, *[0.5] * 123_455, 1e-9]
    print_schedule([("a_task_with_a_name_of_some_length",)] * 123_456 + [("b",)], lrs)
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "123,456" in shown
    assert "100.00%" in shown
    words = [line.split() for line in shown.splitlines()]
    assert [row for row in words if row and row[0] in ("first", "largest", "last")] == [
        ["first", "0.25", "0"],
        ["largest", "0.5", "1"],
        ["last", "1e-09", "123,456"],
    ]


def write_metrics(folder: Path, tasks: list[str], num_points: int) -> None:
    folder.mkdir()
    lines = []
    for step in range(1, num_points + 1):
        progress = step / num_points
        row = {"loss": 2 * math.exp(-progress), "accuracy": progress, "examples_per_second": 9.0, "steps": 1}
        lines.append({"step": step, "kind": "train", "time": 0.0, "lr": 0.1, "tasks": dict.fromkeys(tasks, row)})
    lines[0]["tasks"] = {task: row | {"loss": None} for task, row in lines[0]["tasks"].items()}
    final = {task: {"mAP" if j % 2 else "top1": 0.9, "loss": 0.8, "num_examples": 5} for j, task in enumerate(tasks)}
    lines.append({"step": num_points, "kind": "eval", "time": 0.0, "tasks": final})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1000, "ki')


@pytest.mark.parametrize(("num_tasks", "num_points"), mark_long([(1, 1), (9, 500)], [(9, 500)]))
def test_a_run_has_a_curve_for_every_task(tmp_path, num_tasks, num_points):
    tasks = [f"task_{j}" for j in range(num_tasks)]
    write_metrics(tmp_path / "run", tasks, num_points)
    plot_run(tmp_path / "run", tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    for j in range(num_tasks):
        rows, columns = where(image, j)
        assert len(rows) > (200 if num_points > 1 else 5)
        if num_points > 1:
            assert np.ptp(columns) > 100
    curves = plot._read_curves(tmp_path / "run" / "metrics.jsonl")
    assert list(curves) == tasks
    assert curves["task_0"]["eval/top1"] == ([num_points], [0.9])
    assert curves["task_0"]["train/accuracy"][0] == list(range(1, num_points + 1))
    assert math.isnan(curves["task_0"]["train/loss"][1][0])


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


def test_a_task_with_a_schedule_of_its_own_has_a_line_of_its_own():
    from matplotlib.figure import Figure

    of = config({"a": 30, "b": 60, "c": 10}, "weighted")
    of = replace(of, tasks=of.tasks | {name: replace(of.tasks[name], lr_schedule="cosine", warmup_steps=5) for name in ("b", "c")})
    plan, axes = make_step_plan(of), Figure().subplots()
    rates = LearningRates(of, plan)
    plot._draw_rates(axes, plan, of, np.array(list(rates)))
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines) == ["× 1: a", "× 1: b (own cosine of b)", "× 1: c (own cosine of c)"]
    for name, line in zip("abc", lines.values(), strict=True):
        steps = [step for step, names in enumerate(plan) if names == (name,)]
        assert np.array_equal(line.get_xdata(), steps)
        assert np.array_equal(line.get_ydata(), [rates[step] for step in steps])
