"""The picture and the tables of a step plan."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from long_forms import mark_long
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from polyvit_fast.config import Modality, Optim, Source, Task, Train
from polyvit_fast.train.output import schedule_plot
from polyvit_fast.train.output.colours import task_colour, to_rgb
from polyvit_fast.train.output.schedule_plot import build_schedule_table, plot_schedule, print_schedule
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


def config(steps: dict[str, int], schedule="weighted", **lr_scales: float) -> Train:
    def task(name: str) -> Task:
        scale = lr_scales.get(name, 1.0)
        return Task(modality=Patch(), train=Files(), val=Files(), num_classes=3, steps=steps[name], lr_scale=scale)

    return Train(tasks={name: task(name) for name in steps}, schedule=schedule, optim=Optim(warmup_steps=5))


def divide(num_steps: int, num_tasks: int) -> dict[str, int]:
    """Steps of tasks with long names: one step for the first, and the more the later a task comes."""
    names = [f"a-task-with-a-name-of-forty-letters_no_{j:02}" for j in range(num_tasks)]
    weights = np.arange(1, num_tasks) ** 2 if num_tasks > 1 else np.array([])
    others = np.maximum(1, (num_steps - 1) * weights // max(1, weights.sum()))
    steps = [1, *map(int, others)]
    steps[-1] += max(0, num_steps - sum(steps))
    return dict(zip(names, steps, strict=True))


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a configuration's plan: gives back the plan, the PNG's pixels, and the finished figure."""
    figures = []
    save = schedule_plot.save_figure
    monkeypatch.setattr(schedule_plot, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))

    def draw_plan(of: Train):
        plan, path = make_step_plan(of), tmp_path / "new" / "schedule.png"
        plot_schedule(path, plan, of, list(LearningRates(of, plan)))
        return plan, read_pixels(path), figures[-1]

    return draw_plan


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def is_coloured(pixels: np.ndarray, task: int) -> np.ndarray:
    """Which pixels are clearly a mixture of white and a task's colour."""
    pure, ink = 255 - np.array(to_rgb(task_colour(task))), 255 - pixels
    strength = ink @ pure / (pure @ pure)
    return (strength > 0.35) & (np.abs(ink - strength[..., None] * pure).max(-1) < 3)


def find_columns(plan, name: str, width: int) -> np.ndarray:
    """Which of `width` columns of pixels must show a task, found step by step."""
    shows, length = np.zeros(width, bool), len(plan)
    for step in (step for step, tasks in enumerate(plan) if name in tasks):
        if length > width:
            shows[step * width // length] = True
            continue
        first, end = step * width // length, (step + 1) * width // length
        columns = [column for column in range(first, end + 1) if step * 2 * width <= (2 * column + 1) * length < (step + 1) * 2 * width]
        assert columns  # a step has a whole column of its own
        shows[columns] = True
    return shows


SIZES = [(steps, tasks) for steps in (1, 2, 7, 60, 861, 999, 1000, 1001, 4321, 300_000) for tasks in (1, 2, 5, 14, 40)]


@pytest.mark.parametrize(("num_steps", "num_tasks"), mark_long(SIZES, [(1, 1), (7, 5), (861, 14), (1001, 2), (300_000, 5)]))
def test_the_picture_loses_no_step_at_any_size(draw, num_steps, num_tasks):
    of = config(divide(num_steps, num_tasks))
    plan, image, figure = draw(of)
    left, bottom, right, top = np.round(figure.axes[0].bbox.extents).astype(int)
    rows = image[image.shape[0] - top : image.shape[0] - bottom, left:right]
    height = len(rows) / num_tasks
    for task, name in enumerate(of.tasks):
        row = is_coloured(rows[round(task * height) + 3 : round((task + 1) * height) - 3], task)
        assert (row == find_columns(plan, name, right - left)).all()
        assert len(row) > 20


@pytest.mark.parametrize(("num_steps", "num_tasks"), mark_long(SIZES, [size for size in SIZES if size[0] < 5000]))
def test_every_column_of_pixels_has_its_steps_at_any_size(num_steps, num_tasks):
    of = config(divide(num_steps, num_tasks))
    plan = make_step_plan(of)
    for width in (640, 1001):
        counts = schedule_plot._count_in_bins(schedule_plot._find_steps(plan, list(of.tasks)), width)
        assert counts.sum(1).tolist() == [task.steps for task in of.tasks.values()]
        pixels = schedule_plot._paint(counts, 3 * num_tasks, width)  # rows of a single pixel between two white ones
        for task, name in enumerate(of.tasks):
            assert (is_coloured(pixels[3 * task + 1], task) == find_columns(plan, name, width)).all()


def test_a_column_is_the_darker_the_more_of_its_steps_are_the_tasks():
    counts = np.array([[0, 1, 2, 4]])
    ink = 255 - schedule_plot._paint(counts, 9, 4)[4].astype(int)
    pure = 255 - np.array(to_rgb(task_colour(0)))
    assert np.allclose(ink, np.outer([0, 0.55, 0.7, 1], pure), atol=1)


def test_names_are_as_far_apart_as_they_must_be_and_no_further():
    assert schedule_plot._keep_apart([], 5) == []
    assert schedule_plot._keep_apart([90, 50, 10], 5) == [90, 50, 10]
    assert schedule_plot._keep_apart([52, 50, 48], 5) == pytest.approx([55, 50, 45])
    assert schedule_plot._keep_apart([90, 51, 50, 20], 5) == pytest.approx([90, 53, 48, 20])
    assert schedule_plot._keep_apart([1, 0.5, 0], 5) == pytest.approx([10, 5, 0])
    assert schedule_plot._keep_apart([100, 99.5, 99], 5) == pytest.approx([100, 95, 90])


@pytest.mark.parametrize("num_tasks", mark_long([5, 14, 40], [14]))
def test_no_text_covers_another_or_leaves_the_picture(draw, num_tasks):
    of = config(divide(861, num_tasks))
    names = list(of.tasks)
    of = replace(of, tasks={name: replace(task, lr_scale=1 / (1 + j % 7)) for j, (name, task) in enumerate(of.tasks.items())})
    _, image, figure = draw(of)
    boxes = []
    for axes in figure.axes:
        legend = axes.get_legend()
        texts = [axes._left_title, *axes.texts, *(legend.get_texts() if legend else [])]
        texts += axes.get_yticklabels() if axes is figure.axes[0] else []
        boxes += [Text.get_window_extent(text) for text in texts]  # without the line of an annotation
    assert len(boxes) > 3 * len(names)
    assert all(0 <= box.x0 < box.x1 <= image.shape[1] and 0 <= box.y0 < box.y1 <= image.shape[0] for box in boxes)
    covered = [(one, other) for number, one in enumerate(boxes) for other in boxes[:number] if one.shrunk(0.9, 0.8).overlaps(other)]
    assert not covered


def test_a_task_without_a_step_has_an_empty_row(draw):
    of = config({"a": 3, "b": 4, "c": 5}, lambda of: [("a",), ("c",), ("a", "c")])
    _, image, figure = draw(of)
    assert not is_coloured(image, 1).any()
    assert [text.get_text() for text in figure.axes[0].texts] == ["2  (50.0%)", "no step", "2  (50.0%)"]


def test_many_steps_are_drawn_fast_enough_and_rare_tasks_are_not_called_none(draw):
    steps = {f"task_{j}": 2000 * (j + 1) + 2222 for j in range(9)} | {"rare": 1}
    _, _, figure = draw(config(steps, task_3=0.5, task_5=0.01))
    assert [text.get_text() for text in figure.axes[0].texts][-1] == "1  (< 0.1%)"
    assert "steps; darker is more of them" in figure.axes[0].get_title("left")
    assert figure.axes[2].get_yscale() == "log"  # a rate of a hundredth is a line too


def test_the_table_of_a_plan_is_exact(capsys):
    plan = [("a",), ("b",), ("b",), ("b",), ("a",), ("c",), ("a", "b")]
    console = Console(file=io.StringIO(), width=80)
    console.print(build_schedule_table(plan, ["c", "a", "b", "d"]))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()[2:] if line.strip()]
    assert rows == [
        ["c", "1", "12.50%", "5", "5", "0"],
        ["a", "3", "37.50%", "0", "6", "3"],
        ["b", "4", "50.00%", "1", "6", "2"],
        ["d", "0", "0.00%", "-", "-", "-"],
    ]
    assert schedule_plot._percent(0.00009, 2) == "< 0.01%"
    lrs = [0.25, *[0.5] * 123_455, 1e-9]
    names = ["a_task_with_a_name_of_some_length", "b"]
    print_schedule([(names[0],)] * 123_456 + [("b",)], names, lrs)
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


def test_a_task_with_a_schedule_of_its_own_has_a_line_of_its_own(draw):
    of = config({"a": 30, "b": 60, "c": 10}, "weighted")
    of = replace(of, tasks=of.tasks | {name: replace(of.tasks[name], lr_schedule="cosine", warmup_steps=5) for name in ("b", "c")})
    plan, _, figure = draw(of)
    rates = LearningRates(of, plan)
    lines = {str(line.get_label()).replace("\n", " "): line for line in figure.axes[2].lines}
    assert list(lines) == ["× 1: a", "× 1: b (own cosine of b)", "× 1: c (own cosine of c)"]
    for name, line in zip("abc", lines.values(), strict=True):
        steps = [step for step, names in enumerate(plan) if names == (name,)]
        assert np.array_equal(line.get_xdata(), steps)
        assert np.array_equal(line.get_ydata(), [rates[step] for step in steps])


def test_lines_of_several_tasks_differ_in_their_dashes(draw):
    of = config(dict.fromkeys("abcd", 20), a=0.5, b=0.5)
    _, _, figure = draw(of)
    looks = {str(line.get_label()): (line.get_color(), line.get_linestyle()) for line in figure.axes[2].lines}
    assert list(looks) == ["× 1: c, d", "× 0.5: a, b"]
    assert len(set(looks.values())) == 2
