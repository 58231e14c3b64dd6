"""Photographs, broken image files and decoded images for the tests."""

import struct
import zlib
from functools import cache

import numpy as np
from generators import rngs
from image_kinds import PICTURE, RGB, png, saved
from image_kinds import WIDTH as WIDTH_OF_KINDS
from PIL import Image as Pillow

from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.media import Media

HEIGHT, WIDTH = 300, 450


@cache
def photo(height=HEIGHT, width=WIDTH, seed=0):
    """Waves of many lengths, edges and noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 17 + y / 29), np.cos(x / 5) * np.sin(y / 9), np.sign(np.sin((x * y) / 3000))], -1)
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    return Pillow.fromarray((127 + 90 * waves + noise).clip(0, 255).astype(np.uint8))


def decode_images(image, *paths, train=False, num_threads=2, seed=0):
    decoder = build_decoder(image, batch=max(1, len(paths)), train=train, num_threads=num_threads)
    return decoder([Media(str(path)) for path in paths], rngs(len(paths), seed))


def png_header(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def lying_jpeg(height, width):
    content = bytearray(saved(photo(), "JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def thumbnailed_and_cut():
    thumbnail = saved(photo(40, 60), "JPEG")
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x00\x00" + bytes(8) + thumbnail
    content = saved(photo(), "JPEG", exif=exif)
    return content[: len(content) * 2 // 3]


def short_webp():
    content = saved(photo(), "WEBP")[:20000]
    return content[:4] + struct.pack("<I", len(content) - 8) + content[8:]


def short_gif():
    content = saved(PICTURE.crop((0, 0, WIDTH_OF_KINDS, 24)), "GIF")
    size, taller = struct.pack("<HH", WIDTH_OF_KINDS, 24), struct.pack("<HH", WIDTH_OF_KINDS, 48)
    return content.replace(size, taller)


GIF = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x02\x4c\x01\x00;"
BAD = {
    "missing": (None, "the file is missing"),
    "empty": (b"", "the file is empty"),
    "text": (
        b"<html>404 not found</html>" * 9,
        "not an image that can be decoded: it is an HTML page, perhaps from a download that failed",
    ),
    "random bytes": (bytes(range(256)) * 4, "not an image that can be decoded"),
    "header only": (saved(photo(), "JPEG")[:200], "truncated: the JPEG's end is missing"),
    "cut jpeg": (saved(photo(), "JPEG")[:9000], "truncated: the JPEG's end is missing"),
    "jpeg without its last two bytes": (saved(photo(), "JPEG")[:-2], "truncated: the JPEG's end is missing"),
    "jpeg without data but with its end": (saved(photo(), "JPEG")[:700] + b"\xff\xd9", "truncated or damaged: data of the JPEG is missing"),
    "cut jpeg with a thumbnail": (thumbnailed_and_cut(), "truncated: the JPEG's end is missing"),
    "cut png": (saved(photo(), "PNG")[:-9000], "truncated: the PNG's end is missing"),
    "cut webp": (saved(photo(), "WEBP")[:-900], r"truncated: the WebP has \d+ of its \d+ bytes"),
    "png that holds half of its rows": (png(RGB[:24], 8, 2), "truncated or damaged"),
    "webp that tells of no more than is there": (short_webp(), "truncated or damaged"),
    "gif that holds half of its rows": (short_gif(), "truncated or damaged"),
    "cut bmp": (saved(photo(), "BMP")[:-900], "truncated or damaged"),
    "cut tiff": (saved(photo(), "TIFF")[: 300 * 450], "truncated or damaged"),
    "cut gif": (saved(photo(), "GIF")[:-9000], "truncated or damaged: its header is good, .*truncated"),
    "jpeg that claims 65500 x 65500": (lying_jpeg(65500, 65500), "65500 x 65500 pixels, more than max_pixels = 89478485"),
    "30000 x 30000 png": (png_header(30000, 30000), "it has 30000 x 30000 pixels, more than max_pixels = 89478485"),
    "png that claims 8000 x 8000": (png_header(8000, 8000), "truncated or damaged|not an image"),
    "gif with a huge frame": (GIF, "it has more pixels than its header states, or than Pillow decodes"),
}


def vary_pictures(height, width):
    """Waves with noise, one grey, one with all levels, one with two."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = 110 + 70 * np.stack([np.sin(x / 5), np.cos(y / 7), np.sin((x + 2 * y) / 9)], -1)
    made = [(waves + rng.normal(0, 10, waves.shape)).clip(20, 230) for _ in range(4)]
    made += [np.full(waves.shape, 7), 255 * rng.random(waves.shape) ** 3, 90 + 100 * (waves > 110)]
    return np.stack(made).astype(np.uint8)
