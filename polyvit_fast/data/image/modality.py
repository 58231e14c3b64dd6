"""The record of images: any common picture file becomes a square uint8 grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from polyvit_fast.config import Modality, Preprocessing
from polyvit_fast.config.record import ConfigError, check_range


@dataclass(frozen=True, kw_only=True)
class Image(Modality):
    """Pictures: the first of a file, turned upright as its EXIF tag says, alpha dropped, 16 bits rounded to 8.

    JPEG, PNG and WebP through DALI; BMP, TIFF, GIF, PBM, PGM, PPM, JPEG 2000, AVIF, QOI, ICO, CUR, ICNS, PSD, DDS, FTEX, BLP, SGI, Sun,
    PCX, DCX, Pixar, MSP, XBM, XPM, XV thumbnails, GIMP brushes, FLI, Photo CD and TGA through Pillow; HEIC with the extra heic.
    """

    name: ClassVar[str] = "image"
    size: int = 224
    """Rows and columns of the grid."""
    patch: int = 16
    """Rows and columns of one token."""
    crop: Literal["inception", "resize_crop"] = "inception"
    """In training. inception: a random rectangle, stretched to the grid; resize_crop: a random square."""
    eval_crop: Literal["resize", "centre"] = "resize"
    """In evaluation. resize: the whole picture, stretched to the grid (as the paper); centre: the square in the middle."""
    min_area_ratio: float = 0.05
    """Smallest fraction of the picture that an inception crop covers; its aspect ratio lies between 3/4 and 4/3."""
    crop_ratio: float = 0.875
    """Side of the resize_crop and centre squares, as a fraction of the picture's short side (224 of 256)."""
    flip: bool = True
    """Mirror every other training picture left to right."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are each multiplied by a random factor up to this far from 1; 0 switches it off."""
    hue_jitter_degrees: float = 0.0
    """Hue is turned by up to this angle either way; 0 switches it off."""
    rand_augment_ops: int = 0
    """RandAugment's N: random operations on each training picture; 0 switches it off."""
    rand_augment_magnitude: float = 9.0
    """RandAugment's M: their strength, from 0 to 10."""
    random_erasing_prob: float = 0.0
    """Random Erasing: probability that a rectangle of a training picture becomes noise, after all else; 0 switches it off.
    The paper (arXiv 1708.04896) has 0.5."""
    random_erasing_area_ratios: tuple[float, float] = (0.02, 0.4)
    """Smallest and largest fraction of the grid that is erased; the paper's."""
    random_erasing_aspect_ratio: float = 0.3
    """The rectangle's height over its width is at least this, and at most its inverse; the paper's."""
    max_pixels: int = 89_478_485
    """A larger picture counts as broken and is not decoded (the default is 256 MiB of RGB)."""
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Subtracted from red, green and blue (0 to 255) before the model."""
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Divides them afterwards."""

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "size", "patch", "max_pixels")
        check_range(self, "(0, 1]", "min_area_ratio", "crop_ratio", "random_erasing_area_ratios", "random_erasing_aspect_ratio")
        check_range(self, "[0, 1]", "colour_jitter", "random_erasing_prob")
        check_range(self, "[0, 180]", "hue_jitter_degrees")
        check_range(self, "[0, 100]", "rand_augment_ops")
        check_range(self, "[0, 10]", "rand_augment_magnitude")
        check_range(self, "(0, inf)", "std")
        smallest, largest = self.random_erasing_area_ratios
        if smallest > largest:
            name = "random_erasing_area_ratios"
            raise ConfigError(name, f"{name} = {smallest} {largest} must be two fractions of the grid, the smaller one first")

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """One frame of `size` x `size` RGB pixels."""
        return (1, self.size, self.size, 3)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """One square patch."""
        return (1, self.patch, self.patch)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, in levels of 0 to 255."""
        return self.mean, self.std

    @property
    def eval_views(self) -> int:
        """One: evaluation sees one fixed crop."""
        return 1

    @property
    def preprocessing(self) -> Preprocessing:
        """As `eval_crop` says, without what decoders do about damaged files."""
        squash, size = self.eval_crop == "resize", {"height": self.size, "width": self.size}
        short_side = int(self.size / self.crop_ratio)
        cut = "the whole picture" if squash else f"the square in the middle whose side is {self.crop_ratio:g} of the short side"
        resize = {"do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        processor = (
            {"image_processor_type": "ViTImageProcessor", **resize, "size": size}
            if squash
            else {
                "image_processor_type": "BitImageProcessor",
                **resize,
                "do_convert_rgb": True,
                "size": {"shortest_edge": short_side},
                "do_center_crop": True,
                "crop_size": size,
            }
        )
        differences = ["Other libraries do not turn a picture as its EXIF tag says: call PIL.ImageOps.exif_transpose first."]
        if not squash:
            differences.append(
                f"They scale the short side to {short_side} before they cut, so that the square may lie elsewhere by up to a pixel."
            )
        return Preprocessing(
            input_name="pixels",
            dtype="uint8",
            steps=(
                "The picture is turned upright as its EXIF tag says, and becomes 8-bit RGB without alpha.",
                f"It is {cut}, scaled to {self.size} × {self.size}, bilinear with antialiasing.",
            ),
            hugging_face=processor,
            timm={
                "interpolation": "bilinear",
                "crop_pct": 1.0 if squash else self.crop_ratio,
                "crop_mode": "squash" if squash else "center",
            },
            differences=tuple(differences),
        )

    def with_views(self, *counts: int) -> Image:
        """Raises ValueError: a picture has one view."""
        raise ValueError("image: a picture has one view in evaluation, the whole of it or its centre (eval_crop)")

    def thorough(self) -> Image:
        """With the whole picture, and with attention to the warnings of libjpeg and libtiff: for a process that does nothing else."""
        fields: dict[str, Any] = vars(self) | {"eval_crop": "resize"}
        return ThoroughImage(**fields)


class ThoroughImage(Image):
    """Its decoder reads file by file, and takes what libjpeg and libtiff write to standard error as a reason against the file."""
