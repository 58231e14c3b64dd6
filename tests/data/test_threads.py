import multiprocessing
import os
import threading
import time
import weakref

import pytest
import torch

from polyvit_fast.data import threads
from polyvit_fast.data.threads import MAX_DECODING_THREADS, count_decoding_threads, map_in_threads


@pytest.mark.parametrize("num_threads", [1, 2, 5, 100])
def test_results_are_in_the_order_of_the_items(num_threads):
    def slow_first(item):
        time.sleep(0.02 if item < 3 else 0)
        return 10 * item

    assert map_in_threads(slow_first, range(20), num_threads) == [10 * item for item in range(20)]


def test_no_items_give_no_results():
    assert map_in_threads(lambda item: 1 / 0, [], 4) == []


def test_every_item_is_used_once():
    used = []
    map_in_threads(used.append, range(2000), 8)
    assert sorted(used) == list(range(2000))


def test_items_are_worked_on_side_by_side_on_as_many_threads_as_asked_for():
    barrier = threading.Barrier(3)
    names = map_in_threads(lambda item: (barrier.wait(10), threading.get_ident())[1], range(3), 3)
    assert len(set(names)) == 3
    assert threading.get_ident() not in names
    assert len(set(map_in_threads(lambda item: threading.get_ident(), range(50), 1))) == 1
    running, most = [], []

    def count(item):
        running.append(item)
        most.append(len(running))
        time.sleep(0.001)
        running.remove(item)

    map_in_threads(count, range(30), 2)
    assert max(most) == 2


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_the_first_failing_items_error_is_raised_after_all_have_ended(num_threads):
    ended = []

    def fail(item):
        if item == 2:
            time.sleep(0.1)  # fails after item 5 has
        ended.append(item)
        if item in (2, 5):
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 2"):
        map_in_threads(fail, range(10), num_threads)
    assert sorted(ended) == list(range(10))


def test_an_exit_inside_an_item_is_not_lost():
    def leave(item):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        map_in_threads(leave, [1], 1)


@pytest.mark.parametrize("num_threads", [0, -1])
def test_without_threads_there_are_no_results(num_threads):
    with pytest.raises(ValueError, match=f"num_threads = {num_threads} must be at least 1"):
        map_in_threads(str, [1, 2], num_threads)


@pytest.fixture
def two_torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def torch_threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_pytorch_computes_alone_in_each_thread_and_as_before_in_others(two_torch_threads, monkeypatch):
    monkeypatch.setattr(threads, "_idle", [])  # all five are born here
    barrier = threading.Barrier(5)
    assert map_in_threads(lambda item: (barrier.wait(10), torch.get_num_threads())[1], range(5), 5) == [1] * 5
    assert torch.get_num_threads() == torch_threads_of_a_new_thread() == 2


def test_work_is_done_where_no_further_thread_is_to_be_had(two_torch_threads, monkeypatch):
    start = threading.Thread.start

    def start_decoders_only(thread):
        if thread.name != "decode":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threads, "_idle", [])
    monkeypatch.setattr(threading.Thread, "start", start_decoders_only)
    assert map_in_threads(lambda item: item + 1, range(4), 2) == [1, 2, 3, 4]
    monkeypatch.undo()
    assert torch_threads_of_a_new_thread() == 2


def test_idle_threads_work_again_and_keep_nothing():
    class Item:
        pass

    def work(item):
        return threading.get_ident()

    first = map_in_threads(work, range(9), 1)
    kept = Item()
    reference = weakref.ref(kept)
    assert map_in_threads(work, [kept], 1) == first[:1]
    del kept
    deadline = time.monotonic() + 5  # the thread says that it has ended a moment before it lets go
    while reference() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reference() is None


def test_maps_inside_maps_have_threads_of_their_own():
    assert map_in_threads(lambda item: sum(map_in_threads(abs, [-item, item], 2)), range(4), 2) == [0, 2, 4, 6]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own():
    map_in_threads(abs, [1, 2], 2)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(map_in_threads, (abs, [-1, -2], 2)).get(20) == [1, 2]


def test_decoding_threads_are_the_cores_of_a_process_unless_they_are_set():
    cores = len(os.sched_getaffinity(0))
    assert 1 <= count_decoding_threads(0) <= min(cores, MAX_DECODING_THREADS)
    assert count_decoding_threads(0, local_processes=2 * cores) == 1
    assert count_decoding_threads(40) == count_decoding_threads(40, local_processes=8) == 40
