import numpy as np
import pytest
import torch

from polyvit_fast.data.video.modality import Video


def test_grid_tubelet_views_and_tokens_are_the_papers():
    video = Video()
    assert video.grid == (32, 224, 224, 3)
    assert video.tubelet == (4, 16, 16)
    assert video.num_tokens == 1569
    assert Video(tubelet_frames=2).num_tokens == 3137
    assert Video(eval_clips=4, eval_crops=3).eval_views == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 0}, "frames = 0 must be at least 1"),
        ({"stride": 0}, "stride = 0"),
        ({"eval_clips": 0}, "eval_clips = 0"),
        ({"max_pixels": 0}, "max_pixels = 0"),
        ({"scale_jitter": (1.3, 0.9)}, "scale_jitter"),
        ({"colour_jitter": 1.5}, "colour_jitter"),
        ({"grey_prob": 2.0}, "grey_prob = 2.0"),
        ({"std": (0.0, 1.0, 1.0)}, r"std\[0\] = 0.0 must be positive"),
    ],
)
def test_impossible_fields_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        Video(**changes)


def test_other_views():
    video = Video(eval_crops=3)
    assert video.with_views(4) == Video(eval_clips=4, eval_crops=3)
    assert video.with_views(4, 1) == Video(eval_clips=4)
    assert video.with_views(2, 3).eval_views == 6
    for counts in ((4, 2), (4, 3, 1)):
        with pytest.raises(ValueError, match=f"1 or 3 crops, such as 4x3, and not {'x'.join(map(str, counts))}"):
            video.with_views(*counts)


def test_hugging_faces_image_processor_cuts_frames_as_an_evaluation_does():
    from transformers import VideoMAEImageProcessorPil

    video = Video(size=32, short_side=36, frames=4, stride=3)
    found = video.preprocessing
    rows, columns = np.mgrid[:54, :72]
    frame = np.stack([128 + 100 * np.sin(rows / 17 + n) * np.cos(columns / (13 + n)) for n in range(3)], -1).astype(np.uint8)
    processor = VideoMAEImageProcessorPil(**found.hugging_face, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    theirs = torch.as_tensor(processor([frame] * 4, return_tensors="pt")["pixel_values"])[0] * 255
    scaled = torch.nn.functional.interpolate(torch.tensor(frame).movedim(-1, 0)[None], (36, 48), mode="bilinear", antialias=True)
    ours = scaled[0, :, 2:34, 8:40]
    assert theirs.shape == (4, 3, 32, 32)
    assert (theirs - ours).abs().max() <= 2
    assert found.dtype == "uint8"
    assert "every 3rd frame of the file" in found.steps[0]
    assert "averaged over 4 clips with 3 squares each" in Video(eval_clips=4, eval_crops=3).preprocessing.steps[0]
    assert "every single frame" in Video(stride=1).preprocessing.steps[0]
    assert "every 12th frame" in Video(stride=12).preprocessing.steps[0]
