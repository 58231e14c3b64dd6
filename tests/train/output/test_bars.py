"""Frames as a terminal of each width shows them."""

import io

import pytest
from rich.console import Console

from polyvit_fast.train.output.bars import TaskBars, choose_columns, format_numbers, show_evaluation_progress
from polyvit_fast.train.output.colours import task_colour

NAMES = [
    *("imagenet1k", "places365", "wildlife_camera_traps_northern_europe_2021", "wildlife_camera_traps_northern_europe_2022"),
    *("kinetics400", "moments_in_time", "audioset", "vggsound", "epic_sounds", "cifar100", "oxford_pets", "resisc45", "chords", "tones"),
]
ROW = {
    "loss": 1.25,
    "accuracy": 0.5,
    "examples_per_second": 1234.0,
    "steps": 3,
    "data_wait_ratio": 0.43,
    "skipped": 0,
    "broken_files": 0,
    "lr": 0.00125,
    "grad_norm": 12.345,
    "clipped_ratio": 0.25,
}


def frame(width: int, num_tasks: int, **changes: float) -> list[str]:
    """The lines that a terminal shows, in the middle of a run."""
    console = Console(width=width, force_terminal=True, color_system="truecolor", record=True, file=io.StringIO())
    bars = TaskBars(console)
    bars.add_task("all tasks", total=48_000 * num_tasks, completed=4000, numbers={"lr": 0.00125}, colour="")
    for index, name in enumerate(NAMES[:num_tasks]):
        bars.add_task(name, total=48_000, completed=12_000, numbers=ROW | changes, colour=task_colour(index))
    console.print(bars.make_tasks_table(bars.tasks))
    return console.export_text().splitlines()


@pytest.mark.parametrize("num_tasks", [1, 2, 9, 14])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_every_task_has_one_line_of_the_terminal_s_width(width, num_tasks):
    lines = frame(width, num_tasks)
    assert len(lines) == 2 + num_tasks
    assert {len(line) for line in lines} == {width}
    assert len({line.split()[0] for line in lines[1:]}) == 1 + num_tasks  # no two names are alike
    assert all("1.250" in line and "12,000/48,000" in line for line in lines[2:])
    assert "…" not in "".join(line.partition("━")[2] for line in lines)  # no number is cut


def test_bars_take_the_width_that_numbers_leave():
    narrow, wide = (frame(width, 9) for width in (80, 200))
    assert narrow[0].split() == ["done", "loss", "acc", "ex/s", "waits", "norm", "lr"]
    assert wide[0].split() == ["done", "loss", "acc", "ex/s", "waits", "norm", "clipped", "lr"]
    assert wide[2].split()[2:] == ["12,000/48,000", "1.250", "50.0%", "1,234", "43%", "12.3", "25%", "0.00125"]
    assert [sum(lines[2].count(character) for character in "━╸╺") for lines in (narrow, wide)] == [8, 98]


def test_trouble_is_shown_before_rates():
    lines = frame(80, 2, skipped=12, broken_files=1_234)
    assert lines[0].split() == ["done", "loss", "acc", "ex/s", "waits", "lr", "skipped", "broken"]
    assert lines[2].split()[-2:] == ["12", "1,234"]


def test_columns_are_chosen_by_what_matters_most():
    rows = [{"done": "9/10", "left": "0:00:01", "loss": "1.000", "lr": "0.1"}]
    assert choose_columns(rows, 5) == ["done"]
    assert choose_columns(rows, 14) == ["done", "loss"]
    assert choose_columns(rows, 18) == ["done", "loss", "lr"]
    assert choose_columns(rows, 19) == ["done", "loss", "left"]
    assert choose_columns(rows, 23) == ["done", "loss", "lr", "left"]


def test_only_what_is_worth_a_look_has_a_text():
    assert "skipped" not in format_numbers(ROW)
    assert "waits" not in format_numbers(ROW | {"data_wait_ratio": 0.04})
    assert format_numbers({"loss": 2.0, "skipped": 3}) == {"loss": "2.000", "skipped": "3"}


def test_an_evaluation_s_bars_have_the_colours_of_all_tasks(monkeypatch):
    console = Console(width=80, force_terminal=True, color_system="truecolor", file=io.StringIO())
    monkeypatch.setattr("polyvit_fast.train.output.bars.Console", lambda: console)
    with show_evaluation_progress(["a", "b", "c"]) as show:
        show("c", 100, 400)
        show("b validation", 200, 400)
    shown = console.file.getvalue()
    for index, name in ((2, "c"), (1, "b validation")):
        red, green, blue = bytes.fromhex(task_colour(index)[1:])
        assert f"\x1b[38;2;{red};{green};{blue}m{name}" in shown
    assert "200/400" in shown
