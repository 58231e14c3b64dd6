import numpy as np
import pytest

from polyvit_fast.data.dali import new_pipeline, run
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
