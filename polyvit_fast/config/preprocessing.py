"""How evaluation makes a grid of a file, for those who use a model elsewhere: `Preprocessing`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from polyvit_fast.config.record import Record


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Record):
    """What evaluation does with a file before the model sees its grid, in words and as settings of other libraries.

    Mean and std are not part of it: they are `Modality.normalisation`.
    """

    input_name: str = "grid"
    """What to call a model's input: pixels, spectrogram."""
    dtype: Literal["uint8", "float32"] = "float32"
    """Of the grid."""
    is_mono: bool = False
    """Whether the grid's channels are copies of one, so that a model elsewhere needs one of them only."""
    steps: tuple[str, ...] = ()
    """Sentences, in order. Empty: nobody has described it."""
    hugging_face: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json of the processor that does the same, without its mean and std. Empty where there is none."""
    timm: dict[str, Any] = field(default_factory=dict)
    """The fields of timm's pretrained_cfg that say so to its transforms. Empty where there are none."""
    differences: tuple[str, ...] = ()
    """What these do otherwise, in sentences."""
