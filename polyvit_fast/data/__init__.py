"""Files become grids: the three modalities, where their samples come from, and their decoders."""

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.demo_files import DemoFiles
from polyvit_fast.data.sources.manifest import Folder, Manifest
from polyvit_fast.data.sources.shards import Shards
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.video.modality import Video

__all__ = ["Audio", "DemoFiles", "Folder", "Image", "Manifest", "Shards", "Synthetic", "Video", "build_decoder"]
