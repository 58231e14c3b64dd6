import numpy as np
import pytest
import torch
from tiny_runs import Tile, tile_task

from polyvit_fast.data.augment.mixing import Mix, draw_mix, mix_grids
from polyvit_fast.data.video.modality import Video


class Wide(Tile):
    """Of 40 rows and 24 columns."""

    @property
    def grid(self):
        return (1, 40, 24, 3)


def draw(count=2000, **changes):
    task = tile_task(**({"modality": Wide()} | changes))
    return [draw_mix(task, 7, "t", step) for step in range(count)]


def area(mix):
    top, left, bottom, right = mix.box
    return (bottom - top) * (right - left)


def test_a_mix_is_a_pure_function_of_seed_task_and_step():
    task = tile_task(cutmix=1.0, mixup=0.3)
    found = [draw_mix(task, *parts) for parts in ((1, "a", 5), (1, "a", 5), (2, "a", 5), (1, "b", 5), (1, "a", 6))]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_the_ratio_is_the_exact_area_that_stays():
    for mix in draw(cutmix=1.0):
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 40
        assert 0 <= left <= right <= 24
        assert mix.ratio == 1 - area(mix) / (40 * 24)


def test_boxes_are_those_of_the_papers_code():
    """`rand_bbox` of CutMix's authors, with the same random numbers: fraction of the sides, centre, cut off at the edges."""
    for step, mix in enumerate(draw(50, cutmix=0.7)):
        rng = np.random.Generator(np.random.Philox(key=_key(step)))
        lam = rng.beta(0.7, 0.7)
        ratio = np.sqrt(1.0 - lam)
        cy = rng.integers(40)
        cx = rng.integers(24)
        height, width = int(40 * ratio), int(24 * ratio)
        expected = [*np.clip([cy - height // 2, cx - width // 2], 0, None), min(cy + height // 2, 40), min(cx + width // 2, 24)]
        assert list(mix.box) == expected


def _key(step):
    from polyvit_fast.randomness import key

    return key(7, "cutmix", "t", step)


def test_boxes_cover_all_of_the_grid_and_have_the_distribution_of_their_area():
    mixes = draw(cutmix=1.0)
    covered = np.zeros((40, 24))
    for mix in mixes:
        top, left, bottom, right = mix.box
        covered[top:bottom, left:right] += 1
    assert covered.min() > 0.1 * len(mixes)
    assert covered[20, 12] > 1.5 * covered[0, 0]
    # A uniform fraction 1 - u of the area, of which the edges cut off some.
    assert 0.25 < np.mean([1 - mix.ratio for mix in mixes]) < 0.5
    small = draw(cutmix=50.0)  # of a Beta distribution around a half
    assert np.std([mix.ratio for mix in small]) < 0.6 * np.std([mix.ratio for mix in mixes])


def test_with_mixup_every_other_batch_is_mixed_that_way_by_the_ratio_that_it_has_alone():
    both, alone, cut = draw(cutmix=1.0, mixup=0.4), draw(mixup=0.4), draw(cutmix=1.0)
    blended = [mix.box == (0, 0, 0, 0) for mix in both]
    assert np.mean(blended) == pytest.approx(0.5, abs=0.05)
    assert all(mix.ratio == other.ratio for mix, other, is_blended in zip(both, alone, blended, strict=True) if is_blended)
    assert {mix.box for mix in alone} == {None}
    assert draw(3) == [Mix()] * 3
    assert all(mix.box is not None for mix in cut)


def grids(frames=2, dtype=torch.uint8):
    values = torch.randint(0, 256, (4, frames, 6, 5, 3), generator=torch.Generator().manual_seed(0))
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_inside_the_box_all_frames_are_the_partners(dtype):
    mine, theirs = grids(dtype=dtype), grids(dtype=dtype).flip(0)
    found = mix_grids(mine, theirs, torch.tensor(0.3), torch.tensor([1, 2, 4, 5], dtype=torch.int32), mixup=False)
    expected = mine.clone()
    expected[:, :, 1:4, 2:5] = theirs[:, :, 1:4, 2:5]
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_with_both_a_box_keeps_the_rest_as_it_is_and_an_empty_one_blends():
    mine, theirs, ratio = grids(), grids().flip(0), torch.tensor(0.3)
    cut = mix_grids(mine, theirs, ratio, torch.tensor([1, 2, 4, 5], dtype=torch.int32), mixup=True)
    alone = mix_grids(mine, theirs, ratio, torch.tensor([1, 2, 4, 5], dtype=torch.int32), mixup=False)
    assert torch.equal(cut, alone.float())
    blended = mix_grids(mine, theirs, ratio, torch.zeros(4, dtype=torch.int32), mixup=True)
    assert torch.equal(blended, mix_grids(mine, theirs, ratio, None, mixup=True))
    torch.testing.assert_close(blended.double(), 0.3 * mine + 0.7 * theirs.double(), rtol=1e-6, atol=1e-4)


def test_a_spectrogram_of_one_channel_repeated_is_cut_too():
    narrow = torch.rand(4, 1, 6, 5, 1)
    found = mix_grids(
        narrow.expand(-1, -1, -1, -1, 3),
        narrow.flip(0).expand(-1, -1, -1, -1, 3),
        torch.tensor(0.5),
        torch.tensor([0, 0, 6, 2], dtype=torch.int32),
        mixup=False,
    )
    assert torch.equal(found[..., :2, :], narrow.flip(0).expand(-1, -1, -1, -1, 3)[..., :2, :])
    assert torch.equal(found[..., 2:, :], narrow.expand(-1, -1, -1, -1, 3)[..., 2:, :])


def test_a_video_s_box_is_one_of_rows_and_columns():
    task = tile_task(modality=Video(size=32, patch=16, frames=4, tubelet_frames=2), cutmix=1.0)
    assert all(max(draw_mix(task, 0, "t", step).box) <= 32 for step in range(200))
