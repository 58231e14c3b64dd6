from contextlib import nullcontext

import numpy as np
import pytest

from polyvit_fast.data.dali import Graph, UnavailableError, new_pipeline, run, split_by_size
from polyvit_fast.media import MediaError


@pytest.fixture
def decoding():
    pipeline, fn, types = new_pipeline(3, 2)
    with pipeline:
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(content))
    pipeline.build()
    return pipeline


def picture(level):
    return np.frombuffer(b"P6 2 1 255\n" + bytes([level] * 6), np.uint8)


def test_batches_of_any_size_up_to_the_largest(decoding):
    for count in (1, 3, 2, 1):
        [pictures] = run(decoding, "bad", content=[picture(40 + i) for i in range(count)])
        assert [int(pictures.at(i).max()) for i in range(count)] == [40 + i for i in range(count)]


def test_a_failure_gives_the_reason_and_the_next_run_works(decoding):
    with pytest.raises(MediaError, match=r"^no picture \(nvImageCodec failure: '#\d+'\)$"):
        run(decoding, "no picture", content=[picture(9), np.frombuffer(b"no picture at all", np.uint8)])
    [pictures] = run(decoding, "no picture", content=[picture(9)])
    assert (pictures.at(0) == 9).all()


def test_a_graph_is_built_when_it_first_runs_and_again_after_release(decoding):
    builds = []
    graph = Graph(lambda: builds.append(1) or decoding)
    assert (graph.pipeline, builds) == (None, [])
    for _ in range(2):
        [pictures] = graph.run("bad", content=[picture(7)])
        assert (pictures.at(0) == 7).all()
    assert len(builds) == 1
    graph.release()
    assert graph.pipeline is None
    assert graph.ready() is decoding
    assert len(builds) == 2


@pytest.mark.parametrize("fragile", [False, True])
def test_only_a_failed_run_of_a_fragile_graph_drops_it(decoding, fragile):
    graph = Graph(lambda: decoding, fragile=fragile)
    for content, fails in ((picture(5), False), (np.frombuffer(b"no picture at all", np.uint8), True)):
        with pytest.raises(MediaError) if fails else nullcontext():
            graph.run("bad", content=[content])
        assert (graph.pipeline is None) == (fragile and fails)
    graph.run("bad", content=[picture(5)])
    assert graph.pipeline is decoding


def test_a_graph_that_cannot_be_built_gives_the_reason():
    def build():
        raise RuntimeError(
            "Critical error in pipeline:\nError encountered:\n\nlibnvjpeg.so.13 is missing\nCurrent pipeline object is no longer valid."
        )

    with pytest.raises(UnavailableError, match=r"^libnvjpeg\.so\.13 is missing$"):
        Graph(build).run("bad", content=[])


def test_a_graph_for_a_gpu_that_is_not_there_is_unavailable():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    def build():
        pipeline, fn, types = new_pipeline(1, 1, 0)
        with pipeline:
            content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.image(content, device="mixed"))
        pipeline.build()
        return pipeline

    with pytest.raises(UnavailableError, match="CUDA"):
        Graph(build).ready()


@pytest.mark.parametrize(("limit", "expected"), [(1, [1, 1, 1, 1]), (10, [2, 1, 1]), (19, [3, 1]), (100, [4])])
def test_chunks_stay_within_their_limit(limit, expected):
    sizes = [5, 5, 9, 30]
    chunks = list(split_by_size(sizes, limit))
    assert [len(sizes[chunk]) for chunk in chunks] == expected
    assert [size for chunk in chunks for size in sizes[chunk]] == sizes
    assert list(split_by_size([], limit)) == []
