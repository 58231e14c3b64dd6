import pytest

from polyvit_fast.cli.results import draw_curves, record_results

LINE = '{"step": 5, "kind": "train", "tasks": {"a": {"loss": 1.0, "accuracy": 0.5}}}\n'


def test_what_cannot_be_written_is_a_warning_unless_it_was_asked_for(tmp_path, capsys):
    for is_asked_for in (False, True):
        with record_results(tmp_path / "a", is_asked_for=is_asked_for):
            (tmp_path / "a").write_text("it can be")
    assert capsys.readouterr() == ("", "")
    with record_results(tmp_path / "a", is_asked_for=False):
        (tmp_path / "a" / "below a file").write_text("")
    assert capsys.readouterr().err == (
        f"warning: nothing was recorded, for {tmp_path / 'a'} cannot be written: Not a directory; --out FILE writes elsewhere\n"
    )
    with (
        pytest.raises(ValueError, match="a cannot be written: Not a directory; name another file with --out"),
        record_results(tmp_path / "a", is_asked_for=True),
    ):
        (tmp_path / "a" / "below a file").write_text("")


def test_curves_need_the_metrics_alone(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(LINE)
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    draw_curves(tmp_path, str(tmp_path / "elsewhere" / "mine.svg"))
    assert "<svg" in (tmp_path / "elsewhere" / "mine.svg").read_text()
    assert capsys.readouterr().out == f"drawn: {tmp_path / 'curves.png'}\ndrawn: {tmp_path / 'elsewhere' / 'mine.svg'}\n"


def test_curves_of_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(LINE)
    (tmp_path / "curves.png").mkdir()  # refuses root too
    draw_curves(tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("warning: nothing was recorded, for ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]  # no part of a picture is left
    with pytest.raises(ValueError, match=r"curves\.png cannot be written: Is a directory; name another file with --out"):
        draw_curves(tmp_path, str(tmp_path / "curves.png"))
