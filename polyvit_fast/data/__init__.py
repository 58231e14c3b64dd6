"""Files become grids: the three modalities, where their samples come from, and their decoders."""

from typing import TYPE_CHECKING, Any

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.demo_files import DemoFiles
from polyvit_fast.data.sources.manifest import Folder, Manifest
from polyvit_fast.data.sources.shards import Shards
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.video.modality import Video

if TYPE_CHECKING:
    from polyvit_fast.data.decoders import build_decoder

__all__ = ["Audio", "DemoFiles", "Folder", "Image", "Manifest", "Shards", "Synthetic", "Video", "build_decoder"]


def __getattr__(name: str) -> Any:
    """Imports the decoders, and PyTorch with them, when they are first asked for: records alone are quick to import."""
    if name != "build_decoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from polyvit_fast.data.decoders import build_decoder

    return build_decoder
