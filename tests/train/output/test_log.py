import io
import json
import math
import os
import pty
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from polyvit_fast.train.output.colours import task_colour, to_rgb
from polyvit_fast.train.output.log import Log, PeerLog, Result, build_result_table, print_results

TOTALS = {"shapes": 60, "motion": 40}


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """TensorBoard reads files in the order of their names: those of one process and second are numbered, and 10 is read before 9."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(loss: float = 1.25, accuracy: float = 0.5, **more):
    return {"loss": loss, "accuracy": accuracy, "examples_per_second": 1234.0, "steps": 3, **more}


def lines(folder: Path):
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run(folder: Path, intervals: list[int], resumed_step: int = 0, evaluations: tuple[int, ...] = (), loss: float = 1.25) -> str:
    console = plain()
    with Log(folder, TOTALS, 100, resumed_step, console=console) as log:
        for step in range(resumed_step + 1, intervals[-1] + 1 if intervals else 0):
            log.tick(step, "shapes")
            if step in intervals:
                log.log_interval(step, 0.25, {"shapes": row(loss)})
        for step in evaluations:
            log.log_evaluation(step, {"shapes": {"top1": 0.75, "loss": loss}})
    return text(console)


def test_without_a_terminal_an_interval_has_a_line_and_one_for_each_task(tmp_path):
    console = plain()
    with Log(tmp_path, TOTALS, 100, console=console) as log:
        for step in range(1, 21):
            log.tick(step, "shapes" if step % 2 else "motion")
        numbers = {"skipped": 2, "broken_files": 0, "grad_norm": 2.3456, "clipped_ratio": 0.25, "lr": 0.00125}
        log.log_interval(20, 0.00125, {"shapes": row(), "motion": row(0.5, 0.875, **numbers)})
    expected = [
        r"step 20/100 \(20%\), \d:\d\d:\d\d left, lr 0\.00125",
        r"step 20: shapes loss 1\.250 acc 50\.0% 1,234/s",
        r"step 20: motion loss 0\.500 acc 87\.5% 1,234/s norm 2\.35 clipped 25% lr 0\.00125 2 skipped",
    ]
    for found, begin in ((text(console), ""), ((tmp_path / "log.txt").read_text(), r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")):
        assert len(found.splitlines()) == 3
        assert all(re.fullmatch(begin + line, one) for line, one in zip(expected, found.splitlines(), strict=True))


def test_the_time_left_follows_from_the_steps_of_this_start(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = plain()
    with Log(tmp_path, TOTALS, 100, 40, console=console) as log:
        now[0] += 500.0  # files are made
        log.tick(41, "shapes")
        now[0] += 27.0
        log.log_interval(50, 0.1, {})  # 9 steps in 27 s, 50 to go
    assert "step 50/100 (50%), 0:02:30 left" in text(console)


def test_metrics_are_json_lines_and_tensorboard_points(tmp_path):
    with Log(tmp_path, TOTALS, 100, console=plain()) as log:
        log.log_interval(10, 0.25, {"shapes": row(float("nan")), "motion": row(float("inf"))})
        log.log_interval(20, 0.5, {"motion": row(0.5)})
        log.log_evaluation(20, {"shapes": {"top1": 0.75, "loss": 0.5}, "motion": {"mAP": 0.25, "num_examples": 7}})
    found = lines(tmp_path)
    assert all(abs(line.pop("time") - time.time()) < 60 for line in found)
    assert found == [
        {"step": 10, "kind": "train", "lr": 0.25, "tasks": {"shapes": row() | {"loss": None}, "motion": row() | {"loss": None}}},
        {"step": 20, "kind": "train", "lr": 0.5, "tasks": {"motion": row(0.5)}},
        {"step": 20, "kind": "eval", "tasks": {"shapes": {"top1": 0.75, "loss": 0.5}, "motion": {"mAP": 0.25, "num_examples": 7}}},
    ]
    shown = points(tmp_path)
    assert shown["lr"] == [(10, 0.25), (20, 0.5)]
    assert shown["motion/train/loss"][1] == (20, 0.5)
    assert math.isnan(shown["shapes/train/loss"][0][1])
    assert shown["motion/eval/mAP"] == [(20, 0.25)]


def test_after_resuming_no_step_appears_twice(tmp_path):
    run(tmp_path, [10, 20, 30, 40], evaluations=(20, 40), loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "kind": "tr')  # killed while writing
    run(tmp_path, [30, 40, 50], resumed_step=25, evaluations=(50,), loss=2.0)
    steps = [(line["step"], line["kind"], line["tasks"]["shapes"]["loss"]) for line in lines(tmp_path)]
    before = [(10, "train", 1.0), (20, "train", 1.0), (20, "eval", 1.0)]
    assert steps == [*before, (30, "train", 2.0), (40, "train", 2.0), (50, "train", 2.0), (50, "eval", 2.0)]
    shown = points(tmp_path)
    assert shown["shapes/train/loss"] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
    assert shown["shapes/eval/loss"] == [(20, 1.0), (50, 2.0)]
    assert "step 40/100" in (tmp_path / "log.txt").read_text()  # the text tells what happened, every time


def test_resumed_at_a_logged_step_that_step_is_kept_once(tmp_path):
    run(tmp_path, [10, 20], evaluations=(20,), loss=1.0)
    said = run(tmp_path, [], resumed_step=20, evaluations=(20,), loss=1.0)
    assert "step 20: shapes: top1 0.7500, loss 1.0000" in said
    assert [(line["step"], line["kind"]) for line in lines(tmp_path)] == [(10, "train"), (20, "train"), (20, "eval")]
    assert points(tmp_path)["shapes/eval/top1"] == [(20, 0.75)]


def test_a_run_from_the_start_drops_what_an_earlier_one_left(tmp_path):
    run(tmp_path, [10, 20], loss=1.0)
    run(tmp_path, [10], loss=2.0)
    assert [line["tasks"]["shapes"]["loss"] for line in lines(tmp_path)] == [2.0]
    assert points(tmp_path)["shapes/train/loss"] == [(10, 2.0)]


@contextmanager
def terminal(width: int = 100) -> Iterator[tuple[Console, list[str]]]:
    """A real pseudo-terminal, and what was written to it once the block is left."""
    master, slave = pty.openpty()
    shown: list[str] = []
    received = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(master, 65536):
                received.extend(chunk)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    file = os.fdopen(slave, "w")
    try:
        yield Console(file=file, width=width, color_system=None), shown
    finally:
        file.close()
        reader.join()
        os.close(master)
        shown.append(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", received.decode()).replace("\r", ""))


def test_on_a_terminal_there_is_a_bar_for_the_run_and_each_task(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with terminal() as (console, shown):
        assert console.is_terminal
        with Log(tmp_path, TOTALS, 100, 40, done={"shapes": 25, "motion": 15}, console=console) as log:
            log.tick(41, "shapes")
            log.tick(42, ("shapes", "motion"))
            log.log_interval(42, 0.001, {"shapes": row(), "motion": row(0.5)})
            log.message("the file [bold]/data/a.jpg[/bold] is broken: " + "x" * 120, "warning")
            log.show_evaluation("motion", 30, 400)
            log.progress.refresh()
            log.log_evaluation(42, {"motion": {"mAP": 0.5}})
    last = shown[0].splitlines()
    bars = [line for line in last if "━" in line or "╸" in line]
    assert any(line.split() == ["done", "loss", "acc", "ex/s", "lr", "left"] for line in last)
    assert any(re.match(r"all tasks +━+.* 42/100 +0\.001", line) for line in bars)
    assert any(re.match(r"shapes +━+.* 27/60 1\.250 50\.0% 1,234", line) for line in bars)
    assert any(re.match(r"motion +━+.* 16/40 0\.500 50\.0% 1,234", line) for line in bars)
    assert any(re.match(r"eval motion +[━╸]+.* 30/400", line) for line in bars)
    assert "eval" not in bars[-1]
    # Lines end between words, and no markup is read.
    assert re.search(r"warning: the file \[bold\]/data/a\.jpg\[/bold\] is broken: *\nx{120}\n", shown[0])
    assert "step 42/100" not in shown[0]
    assert "step 42: shapes" not in shown[0]
    assert "step 42/100" in (tmp_path / "log.txt").read_text()
    assert "warning: the file [bold]" in (tmp_path / "log.txt").read_text()


def test_long_evaluations_say_that_they_are_alive(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = plain()
    with Log(tmp_path, TOTALS, 100, console=console) as log:
        for done in range(100):
            now[0] += 1.0
            log.show_evaluation("motion", done, 100)
        log.log_evaluation(5, {"motion": {"mAP": 0.5}})
    shown = text(console).splitlines()
    assert shown[0] == "evaluating motion: 10 of 100"
    assert 8 <= len(shown) <= 11
    assert shown[-1] == "step 5: motion: mAP 0.5000"


def test_a_step_costs_no_file_access_and_next_to_no_time(tmp_path):
    with Log(tmp_path, TOTALS, 20_000, console=plain()) as log:
        log.tensorboard.flush()  # its thread has the head of its file yet to write
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        started = time.perf_counter()
        for step in range(1, 20_001):
            log.tick(step, "shapes")
        seconds = (time.perf_counter() - started) / 20_000
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    print(f"{seconds * 1e6:.1f} µs a step")
    assert seconds < 2e-4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread dies of the full disk
def test_a_full_disk_ends_the_files_not_the_run(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    console = plain()
    try:
        with Log(folder, TOTALS, 5000, console=console) as log:
            for step in range(1, 1500):
                log.log_interval(step, 0.5, {"shapes": row(), "motion": row()})
            log.message("still here")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    shown = text(console)
    assert "step 1,499/5,000" in shown
    assert "still here" in shown
    for name in ("metrics.jsonl", "log.txt", "TensorBoard"):
        assert shown.count(f"warning: {name} is not written any more: [Errno 28] No space left on device") == 1


def test_an_exception_passes_and_the_files_are_closed(tmp_path):
    log = Log(tmp_path, TOTALS, 100, console=plain())
    log.message("one", "error")
    with pytest.raises(KeyError, match="lost"), log:
        log.tick(1, "lost")
    assert log.text.closed
    assert log.metrics.closed
    assert (tmp_path / "log.txt").read_text().endswith(" error: one\n")


RESULTS = [
    Result("shapes", "image", "top1", 0.98125, 1200, 1534.4),
    Result("a_task_with_a_name_of_some_length_indeed", "spectrogram", "mAP", 1.0, 130_000, float("nan")),
]


def test_the_result_table_is_readable_when_piped(tmp_path, capsys):
    print_results(RESULTS)
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "\x1b" not in shown
    assert shown.splitlines()[0].split() == ["task", "modality", "metric", "value", "steps", "examples/s"]
    assert any(line.split() == ["shapes", "image", "top1", "0.9812", "1,200", "1,534"] for line in shown.splitlines())
    assert any(line.split()[-4:] == ["mAP", "1.0000", "130,000", "-"] for line in shown.splitlines())


def test_other_processes_tell_only_what_is_their_own():
    console = plain()
    with PeerLog(3, console) as log:
        log.message("what all processes know")
        log.message("task a: broken file x.jpg", "warning")
        log.tick(1, "a")
        log.log_interval(1, 0.1, {"a": {"loss": 1.0}})
        log.show_evaluation("a", 1, 2)
        log.log_evaluation(1, {"a": {"top1": 1.0}})
        log.note("error")
    assert text(console) == "process 3: warning: task a: broken file x.jpg\n"


def test_waiting_for_data_is_shown_where_it_matters(tmp_path):
    console = plain()
    with Log(tmp_path, {"a": 10, "b": 10}, 20, console=console) as log:
        log.log_interval(5, 0.1, {"a": {"loss": 1.0, "data_wait_ratio": 0.31}, "b": {"loss": 2.0, "data_wait_ratio": 0.02}})
    assert "step 5: a loss 1.000 waits 31%\nstep 5: b loss 2.000\n" in text(console)


def test_an_evaluation_is_told_in_words(tmp_path):
    console = plain()
    with Log(tmp_path, TOTALS, 100, console=console) as log:
        rows = {"top1": 0.75, "loss": 1.25, "num_examples": 1300, "num_broken": 2, "examples_per_second": 915.3}
        log.log_evaluation(5, {"shapes": rows, "motion": rows | {"num_broken": 0}})
    assert text(console).splitlines() == [
        "step 5: shapes: top1 0.7500, loss 1.2500, 1,300 files, 2 left out as broken, 915/s",
        "step 5: motion: top1 0.7500, loss 1.2500, 1,300 files, 915/s",
    ]


@pytest.mark.parametrize("width", [80, 200])
def test_each_task_has_its_colour_in_bars_and_results_and_none_without_a_terminal(tmp_path, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    with Log(tmp_path, {"first": 0, "second": 10}, 10, console=console) as log:
        log.progress.refresh()
        console.print(build_result_table([Result(name, "image", "top1", 0.5, 5, 1.0) for name in ("first", "second")]))
    first, second = (";".join(map(str, to_rgb(task_colour(index)))) for index in range(2))
    assert f"\x1b[48;2;{first}m \x1b[0m first" in text(console)  # a mark in a table
    assert f"\x1b[48;2;{second}m \x1b[0m second" in text(console)
    assert f"\x1b[38;2;{second}msecond" in text(console)
    assert text(console).count("first") == 1  # without steps it has no bar, but the second keeps its colour
    bare = plain()
    bare.print(build_result_table([Result("first", "image", "top1", 0.5, 5, 1.0)]))
    assert "\x1b" not in text(bare)
