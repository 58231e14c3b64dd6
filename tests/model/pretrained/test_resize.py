import numpy as np
import pytest
import torch
from torch.nn import functional

from polyvit_fast.model.pretrained.resize import fit_kernel, fit_positions, guess_tubelets


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def convolve(grid, kernel):
    return functional.conv3d(grid.permute(0, 4, 1, 2, 3), kernel.permute(0, 4, 1, 2, 3), stride=kernel.shape[1:4])


@pytest.mark.parametrize("inflation", ["central", "average"])
@pytest.mark.parametrize("frames", [2, 4])
def test_a_still_video_has_the_tokens_of_its_picture(inflation, frames):
    kernel, picture = normal(6, 1, 4, 4, 3), normal(2, 1, 8, 12, 3)
    inflated, done = fit_kernel(kernel, (frames, 4, 4, 3), inflation)
    assert done == f"inflated to {frames} frames ({inflation})"
    torch.testing.assert_close(convolve(picture.expand(-1, frames, -1, -1, -1), inflated), convolve(picture, kernel))
    filled = [bool(frame.any()) for frame in inflated.unbind(1)]
    assert filled == ([True] * frames if inflation == "average" else [number == frames // 2 for number in range(frames)])


def test_a_videos_kernel_added_up_is_that_of_a_still_one():
    kernel, picture = normal(6, 4, 4, 4, 3), normal(2, 1, 8, 8, 3)
    summed, done = fit_kernel(kernel, (1, 4, 4, 3), "central")
    assert done == "4 frames added up"
    torch.testing.assert_close(convolve(picture, summed), convolve(picture.expand(-1, 4, -1, -1, -1), kernel))


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3)])
def test_channels_that_are_alike_may_be_one(old, new):
    kernel, grey = normal(6, 1, 4, 4, old), normal(2, 1, 8, 8, 1)
    fitted, done = fit_kernel(kernel, (1, 4, 4, new), "central")
    assert done == f"{old} to {new} channels"
    torch.testing.assert_close(convolve(grey.expand(*grey.shape[:4], new), fitted), convolve(grey.expand(*grey.shape[:4], old), kernel))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 8, 4, 3), "its tubelets have 4 × 4 pixels, the model's 8 × 4"),
        ((3, 4, 4, 3), "its tubelets have 2 frames, the model's 3; only 1 becomes several"),
        ((2, 4, 4, 2), "its grid has 3 channels, the model's 2"),
    ],
)
def test_other_kernels_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        fit_kernel(normal(6, 2, 4, 4, 3), sizes, "central")


def test_what_fits_stays_as_it_is():
    kernel, positions = normal(6, 2, 4, 4, 3), normal(1, 24, 5)
    assert fit_kernel(kernel, (2, 4, 4, 3), "central") == (kernel, "")
    fitted, done = fit_positions(positions, (2, 3, 4), (2, 3, 4), "bilinear")
    assert torch.equal(fitted, positions)
    assert done == ""


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((14, 14), (50, 8)), ((5, 3), (2, 7))])
def test_positions_are_resized_as_scipy_does_for_the_papers_code(old, new):
    zoom = pytest.importorskip("scipy.ndimage").zoom
    positions = normal(1, old[0] * old[1], 4)
    ours, done = fit_positions(positions, (1, *old), (1, *new), "bilinear")
    factors = (new[0] / old[0], new[1] / old[1], 1)
    truth = zoom(positions.view(*old, 4).numpy(), factors, order=1)
    np.testing.assert_allclose(ours.view(*new, 4).numpy(), truth, rtol=0, atol=1e-12)
    assert done == f"resized from {old[0]} × {old[1]} to {new[0]} × {new[1]} (bilinear)"


def test_positions_are_resized_as_timm_does():
    from timm.layers import resample_abs_pos_embed

    positions = normal(1, 14 * 14, 4).float()
    ours, _ = fit_positions(positions, (1, 14, 14), (1, 24, 20), "bicubic")
    theirs = resample_abs_pos_embed(positions, [24, 20], num_prefix_tokens=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_positions_of_a_picture_are_repeated_for_each_frame():
    positions = normal(1, 12, 5)
    ours, done = fit_positions(positions, (1, 3, 4), (2, 3, 4), "bilinear")
    assert torch.equal(ours, torch.cat([positions, positions], 1))
    assert done == "repeated for 2 frames"


def test_positions_of_frames_become_their_mean_or_are_interpolated():
    positions = normal(1, 3 * 4, 5)
    frames = positions.view(3, 4, 5)
    mean, done = fit_positions(positions, (3, 2, 2), (1, 2, 2), "bilinear")
    torch.testing.assert_close(mean[0], frames.mean(0))
    assert done == "mean of 3 frames"
    five, done = fit_positions(positions, (3, 2, 2), (5, 2, 2), "bilinear")
    expected = [frames[0], (frames[0] + frames[1]) / 2, frames[1], (frames[1] + frames[2]) / 2, frames[2]]
    torch.testing.assert_close(five[0].view(5, 4, 5), torch.stack(expected))
    assert done == "interpolated from 3 to 5 frames"


@pytest.mark.parametrize(
    ("count", "wanted", "found"),
    [
        (400, (1, 50, 8), (1, 50, 8)),
        (800, (1, 50, 8), (1, 100, 8)),
        (196, (1, 50, 8), (1, 14, 14)),
        (196, (1, 24, 24), (1, 14, 14)),
        (3136, (8, 14, 14), (16, 14, 14)),
        (784, (8, 14, 14), (4, 14, 14)),
        (1568, (8, 10, 10), (8, 14, 14)),
        (15, (1, 4, 4), None),
    ],
)
def test_the_grid_of_positions_is_guessed_where_nothing_tells(count, wanted, found):
    assert guess_tubelets(count, wanted) == found
