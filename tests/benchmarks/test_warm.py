"""The card is timed on by one process at a time while peers are compiled (that they are found afterwards: `test_gpu_run.py`)."""

import multiprocessing
import time

import warm


def hold_the_lock(path, log):
    def note():
        with log.open("a") as file:
            file.write("begin ")
        time.sleep(0.1)
        with log.open("a") as file:
            file.write("end ")

    warm.one_at_a_time(note, path)()


def test_what_the_compiler_times_is_timed_by_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=hold_the_lock, args=(tmp_path / "lock", tmp_path / "log")) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert (tmp_path / "log").read_text() == "begin end " * 4


def test_torchs_compiler_still_has_the_function_that_takes_turns(tmp_path, monkeypatch):
    from torch._inductor.runtime.benchmarking import benchmarker

    monkeypatch.setattr(benchmarker, "benchmark_gpu", lambda run: run(), raising=True)
    warm.take_turns_on_the_card(str(tmp_path))
    assert benchmarker.benchmark_gpu(lambda: sorted(path.name for path in tmp_path.iterdir())) == ["lock"]


def broken(*_):
    raise RuntimeError("no memory")


def test_what_cannot_be_compiled_is_told_and_ends_nothing(capfd):
    warm.compile_all([warm.Job("step", broken, (number,)) for number in range(2)], 1)
    assert capfd.readouterr().out.count("no memory") == 2
