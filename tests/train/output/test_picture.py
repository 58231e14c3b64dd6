"""What all pictures have in common."""

import warnings

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from polyvit_fast.train.output.picture import FONTS, count, drawing_style, save_figure


@pytest.mark.parametrize("text", ["$100 and $200", "a_task", "猫の写真", "мультик"])
def test_every_name_can_be_written(tmp_path, text):
    with warnings.catch_warnings(), drawing_style():
        figure = Figure()
        written = figure.text(0, 0, text)
        save_figure(figure, tmp_path / "new" / "picture.png")
        box = written.get_window_extent()
        alone = figure.text(0, 0, text[0]).get_window_extent()
    assert box.width > 0.9 * len(text) / 2 * alone.width  # no letter is read as a command of mathematics
    with Image.open(tmp_path / "new" / "picture.png") as image:
        assert image.size == (round(6.4 * 130), round(4.8 * 130))


def test_a_font_of_ours_comes_after_matplotlibs_own_where_it_is_installed():
    installed = [name for name in FONTS if name in {font.name for font in font_manager.fontManager.ttflist}]
    with drawing_style():
        assert Figure().text(0, 0, "a").get_fontfamily() == ["DejaVu Sans", *installed]


def test_counts_have_their_noun():
    assert [count(number, "step") for number in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
