import io

import pytest
from rich.console import Console
from rich.text import Text

from polyvit_fast.train.output.colours import task_colour, to_rgb
from polyvit_fast.train.output.table import Words, build_table, task_cell


def show(table, width: int, **options) -> list[str]:
    shown = io.StringIO()
    Console(file=shown, width=width, **options).print(table)
    return [line.rstrip() for line in shown.getvalue().splitlines()]


def test_long_words_wrap_and_numbers_are_whole_and_flush_right():
    table = build_table(["task"], ["steps", "fraction"])
    table.add_row("a_name_of_more_than_twenty_letters", "1,234,567", "9%")
    table.add_row("b", "8", "91%")
    lines = show(table, 36)
    first = next(line for line in lines if "1,234,567" in line)
    assert all(len(line) <= 36 for line in lines)
    assert "a_name_of_more_than_twenty_letters" not in first
    assert first.endswith("1,234,567         9%")
    assert lines[-1].endswith("8        91%")


@pytest.mark.parametrize("width", [36, 44, 80, 200])
def test_names_wrap_where_their_words_end(width):
    words = ["moments", "in", "time", "of", "three", "seconds", "nwpu", "resisc45"]
    table = build_table(["task"], ["steps"])
    table.add_row("_".join(words[:6]) + "-" + "-".join(words[6:]), "1,234,567")
    table.add_row("in the folder [bold]", "9")
    text = "\n".join(show(table, width))
    assert all(word in text for word in words)
    assert "[bold]" in text  # no markup
    assert text.count("1,234,567") == 1


def test_a_task_has_a_mark_in_its_colour_on_a_terminal_alone():
    table = build_table(["task"], ["steps"])
    name = "imagenet_21k_winter_release"
    table.add_row(task_cell(name, 3), "7")
    assert [line.split() for line in show(table, 80)][2:] == [[name, "7"]]
    coloured = show(table, 80, force_terminal=True, color_system="truecolor")
    assert ";".join(map(str, to_rgb(task_colour(3)))) in coloured[2]
    plain = [Text.from_ansi(line).plain for line in show(table, 33, force_terminal=True, color_system="truecolor")]
    assert plain[2].startswith("   imagenet_21k_winter_ ")
    assert plain[3].rstrip() == "   release"
    assert [line.split() for line in show(table, 80, force_terminal=True, no_color=True)][-1][-2:] == [name, "7"]


def test_words_are_as_wide_as_their_longest():
    console = Console(width=80, color_system=None)
    size = Words("moments_in_time-v2").__rich_measure__(console, console.options)
    assert size == (len("moments_"), len("moments_in_time-v2"))
