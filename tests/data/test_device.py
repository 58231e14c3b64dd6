import weakref

import numpy as np
import pytest
import torch

from polyvit_fast.data.dali import Graph, UnavailableError
from polyvit_fast.data.device import PATIENCE, GpuDecoder, send, send_array
from polyvit_fast.media import Media, MediaError
from polyvit_fast.randomness import generator

CPU = torch.device("cpu")
MEDIA = [Media("a"), Media("b")]


def rngs():
    return [generator("device", i) for i in range(2)]


def by_cpu(media, rngs):
    return torch.tensor([rng.random() for rng in rngs])


class Refusing(GpuDecoder):
    """Draws, then raises the next of `errors`."""

    def __init__(self, errors, on_cpu=by_cpu):
        super().__init__(on_cpu, CPU)
        self.errors, self.calls = errors, 0
        self.graphs = [Graph(object)]

    def decode(self, media, rngs):
        self.calls += 1
        self.graphs[0].ready()
        grid = by_cpu(media, rngs)
        if self.errors and (error := self.errors.pop(0)):
            raise error
        return grid


def test_a_refused_batch_goes_through_the_cpu_with_the_same_random_numbers():
    decoder = Refusing([MediaError("too odd"), None])
    assert decoder.note == ""
    assert torch.equal(decoder(MEDIA, rngs()), by_cpu(MEDIA, rngs()))
    assert decoder.note == "a batch went through the CPU, because the GPU's decoder refused: too odd"
    graph = decoder.graphs[0].pipeline
    assert graph is not None  # the file was odd, the graphs are well
    assert torch.equal(decoder(MEDIA, rngs()), by_cpu(MEDIA, rngs()))
    assert decoder.graphs[0].pipeline is graph
    assert (decoder.calls, decoder.refused) == (2, 0)


class Hungry(GpuDecoder):
    """Holds a tensor when the GPU's memory ends."""

    held = None

    def decode(self, media, rngs):
        tensor = by_cpu(media, rngs)
        self.held = weakref.ref(tensor)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_batch_that_the_gpu_has_no_memory_for_goes_through_the_cpu_without_what_the_gpu_held():
    def alone(media, rngs):
        assert decoder.held is not None
        assert decoder.held() is None
        return by_cpu(media, rngs)

    decoder = Hungry(alone, CPU)
    assert torch.equal(decoder(MEDIA, rngs()), by_cpu(MEDIA, rngs()))
    assert decoder.note.startswith("a batch went through the CPU, because the GPU's decoder refused: CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        Hungry(None, CPU)(MEDIA, rngs())


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error"), RuntimeError("a fault")], ids=repr)
def test_other_errors_are_no_refusals(error):
    with pytest.raises(type(error)):
        Refusing([error])(MEDIA, rngs())


def test_after_refusals_in_a_row_the_gpu_is_asked_no_more():
    decoder = Refusing([MediaError("no"), None, *[MediaError("no")] * PATIENCE])
    for _ in range(8):
        assert torch.equal(decoder(MEDIA, rngs()), by_cpu(MEDIA, rngs()))
    assert decoder.calls == 2 + PATIENCE
    assert decoder.note == "from now on its files go through the CPU, because the GPU's decoder refused: no"


def test_where_a_graph_cannot_be_built_the_gpu_is_asked_once():
    decoder = Refusing([UnavailableError("no libnvjpeg.so")])
    for _ in range(3):
        assert torch.equal(decoder(MEDIA, rngs()), by_cpu(MEDIA, rngs()))
    assert decoder.calls == 1
    assert decoder.note.endswith("refused: no libnvjpeg.so")


def test_a_broken_file_is_no_refusal():
    def broken(media, rngs):
        raise MediaError("truncated")

    decoder = Refusing([MediaError("nvJPEG says no")] * 9, broken)
    for _ in range(PATIENCE + 2):
        with pytest.raises(MediaError, match=r"^truncated$"):
            decoder(MEDIA, rngs())
    assert (decoder.calls, decoder.refused, decoder.note) == (PATIENCE + 2, 0, "")


def test_without_a_cpu_form_the_error_is_the_callers():
    with pytest.raises(MediaError, match="no sound"):
        Refusing([MediaError("no sound")], None)(MEDIA, rngs())


def test_the_largest_run_is_reported_and_release_drops_graphs():
    decoder = Refusing([])
    decoder(MEDIA, rngs())
    decoder.count(10, 300)
    decoder.count(20, 100)
    assert decoder.memory_bytes() == (20 + 300, 0)
    assert decoder.graphs[0].pipeline is not None
    decoder.release()
    assert decoder.graphs[0].pipeline is None


def test_what_is_sent_to_the_cpu_is_not_copied():
    array = np.arange(3)
    assert send_array(array, CPU).data_ptr() == array.ctypes.data
    tensor = torch.arange(3)
    assert send(tensor, CPU) is tensor
