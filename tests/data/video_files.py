"""Moving pictures whose frames tell which they are and where they were cut, and decoded videos for the tests."""

from dataclasses import replace

import av
import numpy as np
from generators import rngs
from image_files import photo
from video_kinds import KINDS, encode

from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.video.modality import Video
from polyvit_fast.media import Media

NUM_FRAMES, HEIGHT, WIDTH = 60, 48, 80
SMALL = {"size": 32, "patch": 16, "frames": 4, "stride": 3, "tubelet_frames": 2, "short_side": 48, "flip": False}


def write_gradients(path, num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH):
    """An H.264 file whose every frame tells its number by its red, the column by its green and the row by its blue."""
    rows, columns = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "6", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for number in range(num_frames):
            red = np.full_like(rows, 30 + 3 * number)
            frame = np.stack([red, 20 + columns * 200 // width, 20 + rows * 200 // height], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode_videos(video, *paths, train=False, num_threads=2, seed=0):
    decoder = build_decoder(video, batch=max(1, len(paths)), train=train, num_threads=num_threads)
    return decoder([Media(str(path)) for path in paths], rngs(len(paths), seed))


def frames_shown(clip):
    """The frame numbers that a clip [frames, rows, columns, 3] shows."""
    return ((clip[..., 0].double().mean((1, 2)) - 30) / 3).round().int().tolist()


def corner_shown(clip, height=HEIGHT, width=WIDTH):
    """(top, left) of the square that a clip shows, in pixels of the file, from its middle."""
    size = clip.shape[1]
    green, blue = (clip[0, ..., channel].double().mean().item() for channel in (1, 2))
    return (blue - 20) / 200 * height - size / 2, (green - 20) / 200 * width - size / 2


def write_moving(path, codec="libvpx-vp9", height=180, width=240, count=24, colorspace=None):
    """A photograph that moves up and to the left."""
    whole = np.asarray(
        photo(height + count, width + 2 * count).resize((width // 4, height // 4)).resize((width + 2 * count, height + count))
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=25, options={"g": "10", "b": "2M", "deadline": "realtime", "cpu-used": "8", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if colorspace:
            stream.codec_context.colorspace = colorspace
        for i in range(count):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(whole[i : i + height, 2 * i : 2 * i + width]), format="rgb24")
            if colorspace:
                picture = picture.reformat(format="yuv420p", dst_colorspace=colorspace)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return Media(str(path))


def numbered_file(path, name, count=120):
    """Square pictures whose numbers can be read, of one of `KINDS`."""
    return Media(str(encode(path, replace(KINDS[name], size=(192, 192), count=count))))


NUMBERED = [Video(size=192, frames=8, stride=stride, short_side=192, flip=False, eval_clips=2) for stride in (1, 5, 20)]
