"""Long names in little room: broken where their words end, or shortened in the middle.

Widths are in cells, of which a letter of Chinese, Japanese or Korean takes two.
"""

from __future__ import annotations

import re

from rich.cells import cell_len, chop_cells

WORD_ENDS = re.compile(r"(?<=\w[-_/])|(?<=\s)")


def break_words(text: str, width: int) -> list[str]:
    """Lines of at most `width`, broken after spaces and after - _ and /, inside a word only where that is longer than a line."""
    lines = [""]
    for word in WORD_ENDS.split(text):
        if cell_len(lines[-1] + word.rstrip()) <= width:
            lines[-1] += word
        else:
            lines[-1:] = [line for line in (lines[-1], *chop_cells(word, max(1, width))) if line]
    return [line.rstrip() for line in lines]


def shorten(text: str, width: int) -> str:
    """The text, or its beginning and its end, with … for what is between, when it is longer than `width`."""
    if cell_len(text) <= width:
        return text
    begin = chop_cells(text, max(1, width // 2))[0]
    end = chop_cells(text[::-1], max(1, width - cell_len(begin) - 1))[0][::-1]
    return f"{begin}…{end}"
