"""The record of videos: any common video file becomes clips of square uint8 frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from polyvit_fast.config import Modality, Preprocessing
from polyvit_fast.config.record import ConfigError, check_range

THOROUGH_CLIPS = 8  # of 32 frames with stride 2 they are 20 seconds, twice the length of Kinetics' files


@dataclass(frozen=True, kw_only=True)
class Video(Modality):
    """Clips: MP4, MOV, MKV, WebM, AVI and MPEG with H.264, HEVC, AV1, VP8, VP9, MPEG-4 or MJPEG, turned and mirrored as the file says."""

    name: ClassVar[str] = "video"
    size: int = 224
    """Rows and columns of the grid."""
    patch: int = 16
    """Rows and columns of one token."""
    frames: int = 32
    """Frames of a clip. A shorter video repeats its last frame."""
    stride: int = 2
    """Frames of the file from one frame of the clip to the next."""
    tubelet_frames: int = 4
    """Frames of one token."""
    short_side: int = 256
    """Pixels that a frame's shorter side is scaled to before it is cropped."""
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    """In training, height and width are each multiplied by a random factor in this range, before the crop (the paper: 0.9 1.33)."""
    flip: bool = True
    """Mirror every other training clip left to right. Switch it off where left and right mean something."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation of a clip are each multiplied by a random factor up to this far from 1; 0 switches it off."""
    hue_jitter_degrees: float = 0.0
    """Hue of a clip is turned by up to this angle either way; 0 switches it off."""
    colour_jitter_prob: float = 1.0
    """Probability that the colours of a training clip are changed."""
    grey_prob: float = 0.0
    """Probability that a training clip loses its colours."""
    eval_clips: int = 1
    """Evenly spaced clips of a file in evaluation; one is the middle. Their logits are averaged."""
    eval_crops: Literal[1, 3] = 1
    """Squares of a clip in evaluation. 1: the middle; 3: both ends of the longer side too."""
    max_pixels: int = 33_177_600
    """A file with larger frames counts as broken and is not decoded (the default is 8K)."""
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Subtracted from red, green and blue (0 to 255) before the model."""
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Divides them afterwards."""

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "size", "patch", "frames", "stride", "tubelet_frames", "max_pixels")
        check_range(self, "[1, 1000]", "eval_clips")
        check_range(self, "(0, 10]", "scale_jitter")
        check_range(self, "[0, 1]", "colour_jitter", "colour_jitter_prob", "grey_prob")
        check_range(self, "[0, 180]", "hue_jitter_degrees")
        check_range(self, "(0, inf)", "std")
        if self.short_side < self.size:
            raise ConfigError("short_side", f"short_side = {self.short_side} must be at least size = {self.size}")
        if self.scale_jitter[0] > self.scale_jitter[1]:
            raise ConfigError("scale_jitter", f"scale_jitter = {self.scale_jitter} must be two positive numbers, the smaller first")

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """`frames` of `size` x `size` RGB pixels."""
        return (self.frames, self.size, self.size, 3)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """A square patch of several frames."""
        return (self.tubelet_frames, self.patch, self.patch)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, in levels of 0 to 255."""
        return self.mean, self.std

    @property
    def eval_views(self) -> int:
        """`eval_crops` of each of `eval_clips`."""
        return self.eval_clips * self.eval_crops

    @property
    def preprocessing(self) -> Preprocessing:
        """The middle clip, or several."""
        views = "" if self.eval_views == 1 else f" Logits are averaged over {self.eval_clips} clips with {self.eval_crops} squares each."
        return Preprocessing(
            input_name="pixels",
            dtype="uint8",
            steps=(
                f"A clip is {self.frames} frames, every {_count(self.stride)} frame of the file; a shorter file repeats its last one."
                f" Evaluation takes the clip in the middle.{views}",
                f"Frames are 8-bit RGB, scaled bilinearly so that the short side has {self.short_side} pixels.",
                f"The square of {self.size} × {self.size} in the middle is cut out.",
            ),
            hugging_face={
                "image_processor_type": "VideoMAEImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": self.short_side},
                "resample": 2,
                "do_center_crop": True,
                "crop_size": {"height": self.size, "width": self.size},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
            },
            differences=("The processor takes frames: which ones of a file, you choose. It scales with Pillow, the run with FFmpeg.",),
        )

    def with_views(self, *counts: int) -> Video:
        """With so many clips of a file, and squares of each if there is a second count."""
        clips, *crops = counts
        if len(crops) > 1 or crops not in ([], [1], [3]):
            raise ValueError(f"video: views are clips x crops with 1 or 3 crops, such as 4x3, and not {'x'.join(map(str, counts))}")
        return replace(self, eval_clips=clips, eval_crops=crops[0] if crops else self.eval_crops)

    def thorough(self) -> Video:
        """With clips from all over the file."""
        return replace(self, eval_clips=max(self.eval_clips, THOROUGH_CLIPS))


def _count(stride: int) -> str:
    return "single" if stride == 1 else {2: "2nd", 3: "3rd"}.get(stride, f"{stride}th")
