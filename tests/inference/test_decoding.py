from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast.config import Train
from polyvit_fast.data.stream import DataError, Loader, evaluation_size
from polyvit_fast.inference.decoding import GridReader
from polyvit_fast.media import Media, MediaError


def never(name, error):
    raise AssertionError(name)


def read(reader, inputs, skip=never):
    batches = list(reader.read(inputs, skip))
    return [name for names, _ in batches for name in names], [grids for _, grids in batches]


def test_files_are_decoded_as_an_evaluation_decodes_them(run):
    for name in run.config.tasks:
        loader = Loader(name, run.config, train=False)
        expected = [loader.load_validation(start).grid for start in range(0, len(loader.samples), loader.size)]
        names, grids = read(GridReader(name, run.config), run.files(name))
        assert names == run.files(name)
        for ours, theirs in zip(grids, expected, strict=True):  # in the same batches
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_grids_of_different_kinds_are_read_in_order():
    task = tile_task(batch=16, modality=Tile(views=2))
    reader = GridReader("a", tiny_config(tasks={"a": task}))
    assert evaluation_size(task) == 8
    grids = torch.randn(20, 2, *task.modality.grid)
    inputs = [grids[:3], grids[3:4].to(torch.uint8), grids[4:5, :1], grids[5:]]
    names, found = read(reader, inputs)
    assert [len(one) for one in found] == [3, 1, 1, 3, 8, 4]
    assert names[:5] == ["input[0][0]", "input[0][1]", "input[0][2]", "input[1]", "input[2]"]
    torch.testing.assert_close(torch.cat(found[3:]), grids[5:])
    assert reader.decoder is None


@dataclass(frozen=True, kw_only=True)
class Odd(Tile):
    """Tiles with a decoder of their own that has seen some bad files."""


def odd_reader(error: Exception, numbers: tuple[int, ...]) -> GridReader:
    def decode(media, rngs):
        if any(int(one.path) in numbers for one in media):
            raise error
        return torch.stack([torch.full((1, *Odd().grid), float(one.path)) for one in media])

    config: Train = tiny_config(tasks={"a": replace(tile_task(batch=4), modality=Odd())})
    return GridReader("a", config, decode)


@pytest.mark.parametrize("error", [MediaError("damaged"), ValueError("damaged"), OSError("damaged")])
def test_broken_files_are_found_in_their_batch(error):
    broken = []
    names, grids = read(
        odd_reader(error, (2, 5, 8, 9)), [Media(str(n)) for n in range(10)], lambda name, why: broken.append((name, str(why)))
    )
    assert names == ["0", "1", "3", "4", "6", "7"]
    assert torch.cat(grids)[:, 0, 0, 0, 0, 0].tolist() == [0, 1, 3, 4, 6, 7]
    assert broken == [(name, "damaged") for name in ("2", "5", "8", "9")]


def test_a_bug_in_a_decoder_is_no_broken_file():
    with pytest.raises(TypeError, match="oops") as caught:
        read(odd_reader(TypeError("oops"), (1,)), [Media("0"), Media("1")])
    assert "while decoding 0, 1. It is a bug in the decoder" in caught.value.__notes__[0]


def test_a_library_that_is_missing_is_no_broken_file():
    from polyvit_fast.data.dali import UnavailableError

    with pytest.raises(DataError, match="task a: no library"):
        read(odd_reader(UnavailableError("no library"), (0,)), [Media("0")])


def test_a_modality_without_a_decoder_is_named():
    with pytest.raises(ValueError, match="Tile: no decoder is known for this modality"):
        read(GridReader("a", tiny_config()), [Media("x.png")])
    array = np.zeros((2, 1, 1, 16, 16, 3), np.float32)
    assert read(GridReader("a", tiny_config()), array)[0] == ["input[0]", "input[1]"]
