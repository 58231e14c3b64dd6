import io

from rich.console import Console

from polyvit_fast.train.output.table import build_table


def test_long_words_wrap_and_numbers_are_whole_and_flush_right():
    table = build_table(["task"], ["steps", "fraction"])
    table.add_row("a_name_of_more_than_twenty_letters", "1,234,567", "9%")
    table.add_row("b", "8", "91%")
    shown = io.StringIO()
    Console(file=shown, width=36).print(table)
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    first = next(line for line in lines if "1,234,567" in line)
    assert all(len(line) <= 36 for line in lines)
    assert "a_name_of_more_than_twenty_letters" not in first
    assert first.endswith("1,234,567         9%")
    assert lines[-1].endswith("8        91%")
