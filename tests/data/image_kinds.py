"""Real picture files of all kinds for the tests: what Pillow writes, and by hand what it only reads."""

import base64
import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from PIL import ExifTags, Image, ImageOps

HEIGHT, WIDTH = 48, 64
Y, X = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([4 * X, 5 * Y, 2 * (X + Y)], -1).astype(np.uint8)
RGBA = np.dstack([RGB, (X * Y % 256).astype(np.uint8)])
GREY = RGB[..., 2]
GREY_ALPHA = np.dstack([GREY, RGBA[..., 3]])
LEVELS_16 = (1000 * X + 37 * Y).astype(np.uint16)
COLOURS = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
PICTURE = Image.fromarray(RGB)

# cjpeg -arithmetic writes these; Pillow does not
ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02>k%7Zed27Zw*D92+1gLMtdGB`8rkJupIGRb^yfRb5+Zc$tA}agcLcU4^xVke;Kft*d8%yve$z$C;?Br2pFhLjfEf9w;Ly"
    "PAe-;q;6eqq@<*zq@<*zq@<*zq@<*zq@<*zq@<*zq@<*zq@<*zq@<*zq@<*zq@<*zq@<*zq@@4J01*fPFaSUU0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid"
    "06zf#0AHlBAqRvZ`!V_T{{U)+_2ca{=AUPoBg@ep`y;=Kz!RIHv#GV8lT%N0`^I72SfVkpw9W@zx?*LyQj)?QTUmcO-`C%zYp!DO|Je"
)


def saved(picture, kind, **options):
    """The bytes of a file that Pillow writes."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def packed(levels, bits):
    """Rows of numbers of 1, 2, 4 or 8 bits."""
    return np.packbits(np.unpackbits(levels.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :].reshape(len(levels), -1), axis=1)


def steps(bits):
    return (X + Y) // 3 % (1 << bits)


def bmp(rows, bits, *, palette=b"", compression=0, header=40, masks=(), upside_down=True):
    """A BMP of rows (as bytes, or coded already) with the header of 12 (OS/2), 40 (Windows 3), 108 or 124 bytes."""
    if not isinstance(rows, bytes):
        rows = b"".join(row.tobytes().ljust(-(-row.nbytes // 4) * 4, b"\0") for row in (rows[::-1] if upside_down else rows))
    if header == 12:
        info = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        sides = (WIDTH, HEIGHT if upside_down else -HEIGHT)
        info = struct.pack("<IiiHHIIiiII", header, *sides, 1, bits, compression, len(rows), 2835, 2835, len(palette) // 4, 0)
        info = (info + struct.pack(f"<{len(masks)}I", *masks)).ljust(header, b"\0")
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + palette + rows


def bmps():
    def palette(bits, padding=b"\0"):
        return b"".join(colour[::-1].tobytes() + padding for colour in COLOURS[: 1 << bits])

    red, green, blue = (RGB[..., i].astype("<u2") for i in range(3))
    five, six = red >> 3 << 10 | green >> 3 << 5 | blue >> 3, red >> 3 << 11 | green >> 2 << 5 | blue >> 3
    bgr, bgra = RGB[..., ::-1], RGBA[..., [2, 1, 0, 3]]
    eight = (0xFF0000, 0xFF00, 0xFF)
    files = {f"{bits}-bit": bmp(packed(steps(bits), bits), bits, palette=palette(bits)) for bits in (1, 4, 8)}
    files |= {f"{bits}-bit-os2": bmp(packed(steps(bits), bits), bits, palette=palette(bits, b""), header=12) for bits in (1, 4, 8)}
    files |= {f"{bits}-bit-header-{size}": bmp(bgr, 24, header=size) for bits, size in ((24, 12), (24, 40), (24, 64), (24, 108), (24, 124))}
    files |= {
        "24-bit-top-down": bmp(bgr, 24, upside_down=False),
        "32-bit": bmp(bgra, 32),
        "32-bit-top-down": bmp(bgra, 32, upside_down=False),
    }
    files |= {"32-bit-masks": bmp(bgra, 32, compression=3, masks=eight)}
    files |= {f"32-bit-masks-{size}": bmp(bgra, 32, compression=3, header=size, masks=(*eight, 0xFF << 24)) for size in (108, 124)}
    files |= {"16-bit": bmp(five, 16), "16-bit-565": bmp(six, 16, compression=3, masks=(0xF800, 0x7E0, 0x1F))}
    files |= {"16-bit-555": bmp(five, 16, compression=3, masks=(0x7C00, 0x3E0, 0x1F))}
    runs = b"".join(b"".join(bytes((1, level)) for level in row) + b"\0\0" for row in steps(8)[::-1]) + b"\0\1"
    files |= {"rle8": bmp(runs, 8, palette=palette(8), compression=1)}
    runs = b"".join(b"".join(bytes((2, level)) for level in row) + b"\0\0" for row in packed(steps(4), 4)[::-1]) + b"\0\1"
    files |= {"rle4": bmp(runs, 4, palette=palette(4), compression=2)}
    return {f"bmp-{name}": content for name, content in files.items()} | {"dib": saved(PICTURE, "DIB")}


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png(levels, bits, colour, *chunks, interlaced=False):
    """A PNG with the rows of `levels`, in that kind of colour (0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA)."""
    passes = [levels[top::down, left::across] for top, left, down, across in ADAM7] if interlaced else [levels]
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in part)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, interlaced)
    chunks_of_file = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks_of_file)


def pngs():
    def sixteen(levels):
        return (levels.astype(np.uint16) * 257).astype(">u2")

    files = {}
    for bits in (1, 2, 4, 8):
        rows, palette = packed(steps(bits), bits), chunk(b"PLTE", COLOURS[: 1 << bits].tobytes())
        files |= {f"grey-{bits}": png(rows, bits, 0), f"grey-{bits}-transparent": png(rows, bits, 0, chunk(b"tRNS", b"\0\1"))}
        files |= {f"palette-{bits}": png(rows, bits, 3, palette)}
        files |= {f"palette-{bits}-transparent": png(rows, bits, 3, palette, chunk(b"tRNS", b"\0\x80"))}
    files |= {"rgb": png(RGB, 8, 2), "rgb-transparent": png(RGB, 8, 2, chunk(b"tRNS", bytes(6))), "rgb-16": png(sixteen(RGB), 16, 2)}
    files |= {"rgba": png(RGBA, 8, 6), "rgba-16": png(sixteen(RGBA), 16, 6)}
    files |= {"grey-alpha": png(GREY_ALPHA, 8, 4), "grey-alpha-16": png(sixteen(GREY_ALPHA), 16, 4)}
    files |= {"interlaced-rgb": png(RGB, 8, 2, interlaced=True), "interlaced-rgba": png(RGBA, 8, 6, interlaced=True)}
    gamma, primaries = chunk(b"gAMA", struct.pack(">I", 100000)), struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    files |= {
        "gamma": png(RGB, 8, 2, gamma),
        "primaries": png(RGB, 8, 2, gamma, chunk(b"cHRM", primaries)),
        "srgb": png(RGB, 8, 2, chunk(b"sRGB", b"\0")),
    }
    files |= {
        "background": png(RGBA, 8, 6, chunk(b"bKGD", bytes((0, 255, 0, 0, 0, 0)))),
        "fewer-bits": png(RGB, 8, 2, chunk(b"sBIT", b"\5\6\5")),
    }
    frames = {"save_all": True, "append_images": [ImageOps.invert(PICTURE)]}
    files |= {"animated": saved(PICTURE, "PNG", **frames), "animated-default": saved(PICTURE, "PNG", default_image=True, **frames)}
    return {f"png-{name}": content for name, content in files.items()}


def jpegs():
    cmyk = saved(PICTURE.convert("CMYK"), "JPEG")
    adobe = cmyk.index(b"\xff\xee")
    transform = cmyk.index(b"Adobe") + 11
    files = {
        "4:2:0": saved(PICTURE, "JPEG"),
        "4:2:2": saved(PICTURE, "JPEG", subsampling=1),
        "4:4:4": saved(PICTURE, "JPEG", subsampling=0),
    }
    files |= {"progressive": saved(PICTURE, "JPEG", progressive=True), "restarts": saved(PICTURE, "JPEG", restart_marker_blocks=2)}
    files |= {"grey": saved(PICTURE.convert("L"), "JPEG"), "rgb": saved(PICTURE, "JPEG", keep_rgb=True), "arithmetic": ARITHMETIC}
    files |= {
        "cmyk": cmyk,
        "cmyk-not-inverted": cmyk[:adobe] + cmyk[adobe + 16 :],
        "ycck": cmyk[:transform] + b"\2" + cmyk[transform + 1 :],
    }
    files |= {"cmyk-progressive": saved(PICTURE.convert("CMYK"), "JPEG", progressive=True), "lossless": by_ffmpeg("ljpeg", "yuvj444p")}
    files |= {"by-ffmpeg": by_ffmpeg("mjpeg", "yuvj420p"), "two-pictures": saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE])}
    return {f"jpeg-{name}": content for name, content in files.items()}


def by_ffmpeg(codec, pixels):
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt, context.time_base = WIDTH, HEIGHT, pixels, Fraction(1)
    frame = av.VideoFrame.from_ndarray(RGB, "rgb24").reformat(format=pixels)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


SHORT, LONG = 3, 4
FORMATS = {SHORT: "H", LONG: "I"}


def tiff(
    levels, *, order="<", big=False, photometric=2, bits=None, samples=None, planar=False, tile=None, rows=None, deflate=False, tags=None
):
    """A TIFF of [row, column] or [row, column, sample], in tiles of (rows, columns) or strips of `rows`; `tags` are further SHORTs."""
    samples = samples or (1 if levels.ndim == 2 else levels.shape[2])
    cube = levels.reshape(*levels.shape[:2], -1).astype(levels.dtype.newbyteorder(order))
    planes = [cube[..., i : i + 1] for i in range(samples)] if planar else [cube]
    down, across = tile or (rows or HEIGHT, cube.shape[1])
    blocks = []
    for plane in planes:
        for top in range(0, HEIGHT, down):
            for left in range(0, cube.shape[1], across):
                block = plane[top : top + down, left : left + across]
                block = np.pad(block, ((0, down - len(block)), (0, across - block.shape[1]), (0, 0))) if tile else block
                blocks.append(zlib.compress(block.tobytes()) if deflate else block.tobytes())
    fields = {256: [WIDTH], 257: [HEIGHT], 258: [bits or 8 * levels.itemsize] * samples, 259: [8 if deflate else 1], 262: [photometric]}
    fields |= {277: [samples], 284: [1 + planar]} | ({322: [across], 323: [down]} if tile else {278: [down]}) | (tags or {})
    offsets, counts = (324, 325) if tile else (273, 279)
    fields |= {offsets: [0] * len(blocks), counts: [len(block) for block in blocks]}
    kinds = {tag: LONG if tag in (offsets, counts) else SHORT for tag in fields}
    count_format, entry_format, address, head, inline = ("Q", "HHQ", "Q", 16, 8) if big else ("H", "HHI", "I", 8, 4)
    end = head + struct.calcsize(f"={count_format}") + len(fields) * (struct.calcsize(f"={entry_format}") + inline) + inline
    offset_of = {}
    for tag in sorted(fields):
        size = struct.calcsize(f"={len(fields[tag])}{FORMATS[kinds[tag]]}")
        if size > inline:
            offset_of[tag], end = end, end + size
    fields[offsets] = list(end + np.cumsum([0, *map(len, blocks[:-1])]))
    mark = b"II" if order == "<" else b"MM"
    start = struct.pack(f"{order}HHHQ", 43, 8, 0, head) if big else struct.pack(f"{order}HI", 42, head)
    entries, outside = b"", b""
    for tag in sorted(fields):
        value = struct.pack(f"{order}{len(fields[tag])}{FORMATS[kinds[tag]]}", *fields[tag])
        outside += value if tag in offset_of else b""
        value = struct.pack(f"{order}{address}", offset_of[tag]) if tag in offset_of else value.ljust(inline, b"\0")
        entries += struct.pack(f"{order}{entry_format}", tag, kinds[tag], len(fields[tag])) + value
    return mark + start + struct.pack(f"{order}{count_format}", len(fields)) + entries + bytes(inline) + outside + b"".join(blocks)


def tiffs():
    alpha, associated, sixteen = {338: [2]}, {338: [1]}, RGB.astype(np.uint16) * 257
    files = {"plain": tiff(RGB), "big-endian": tiff(RGB, order=">"), "big": tiff(RGB, big=True), "strips": tiff(RGB, rows=7)}
    files |= {
        "tiles": tiff(RGB, tile=(16, 32)),
        "tiles-deflate": tiff(RGB, tile=(16, 32), deflate=True),
        "deflate": tiff(RGB, rows=8, deflate=True),
    }
    files |= {
        "planar": tiff(RGB, planar=True),
        "planar-tiles": tiff(RGB, planar=True, tile=(16, 32)),
        "planar-deflate": tiff(RGB, planar=True, deflate=True),
    }
    files |= {"rgba": tiff(RGBA, tags=alpha), "rgba-associated": tiff(RGBA, tags=associated), "rgbx": tiff(RGBA, tags={338: [0]})}
    files |= {"rgba-planar": tiff(RGBA, tags=alpha, planar=True), "grey-alpha": tiff(GREY_ALPHA, photometric=1, tags=alpha)}
    files |= {"five-samples": tiff(np.dstack([RGBA, GREY]), tags={338: [2, 0]}), "tiles-turned": tiff(RGB, tile=(16, 32), tags={274: [6]})}
    files |= {"grey": tiff(GREY, photometric=1), "grey-inverted": tiff(GREY, photometric=0)}
    files |= {"rgb-16": tiff(sixteen), "rgb-16-big-endian": tiff(sixteen, order=">"), "rgb-16-planar": tiff(sixteen, planar=True)}
    files |= {"rgba-16": tiff(RGBA.astype(np.uint16) * 257, tags=alpha), "rgb-16-deflate": tiff(sixteen, deflate=True)}
    for bits in (1, 2, 4):
        rows, palette = packed(steps(bits), bits), {320: list((COLOURS[: 1 << bits].astype(int) * 257).T.flat)}
        files |= {f"grey-{bits}": tiff(rows, bits=bits, photometric=1), f"grey-{bits}-inverted": tiff(rows, bits=bits, photometric=0)}
        files |= {f"palette-{bits}": tiff(rows, bits=bits, photometric=3, tags=palette)}
    for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
        files |= {kind.removeprefix("tiff_"): saved(PICTURE, "TIFF", compression=kind)}
    files |= {kind: saved(PICTURE.convert("1"), "TIFF", compression=kind) for kind in ("group3", "group4", "tiff_ccitt")}
    for mode in ("P", "CMYK", "YCbCr"):
        files |= {mode.lower(): saved(PICTURE.convert(mode), "TIFF")}
    files |= {"jpeg-ycbcr": saved(PICTURE.convert("YCbCr"), "TIFF", compression="jpeg")}
    files |= {"cmyk-16": tiff(np.asarray(PICTURE.convert("CMYK")).astype(np.uint16) * 257, photometric=5)}
    files |= {
        "lab": saved(Image.merge("LAB", PICTURE.split()), "TIFF"),
        "predictor": saved(PICTURE, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}),
    }
    files |= {"pages": saved(PICTURE, "TIFF", save_all=True, append_images=[ImageOps.invert(PICTURE)])}
    return {f"tiff-{name}": content for name, content in files.items()}


def pnms():
    def plain(levels):
        return b"\n".join(b" ".join(b"%d" % level for level in row.flat) for row in levels) + b"\n"

    size, black = b"\n# a comment\n%d %d\n" % (WIDTH, HEIGHT), steps(1)
    files = {"pbm": b"P4" + size + packed(black, 1).tobytes(), "pbm-plain": b"P1" + size + plain(black)}
    files |= {"pgm": b"P5" + size + b"255\n" + GREY.tobytes(), "pgm-plain": b"P2" + size + b"255\n" + plain(GREY)}
    files |= {"ppm": b"P6" + size + b"255\n" + RGB.tobytes(), "ppm-plain": b"P3" + size + b"255\n" + plain(RGB)}
    files |= {"pgm-100": b"P5" + size + b"100\n" + (GREY % 101).tobytes(), "ppm-15": b"P6" + size + b"15\n" + (RGB >> 4).tobytes()}
    return files | {"ppm-16": b"P6" + size + b"65535\n" + (RGB.astype(np.uint16) * 257).astype(">u2").tobytes()}


def others():
    frames = {"save_all": True, "append_images": [ImageOps.invert(PICTURE)]}
    rgba, grey, palette, one = Image.fromarray(RGBA), PICTURE.convert("L"), PICTURE.convert("P"), PICTURE.convert("1")
    files = {"webp": saved(PICTURE, "WEBP"), "webp-lossless": saved(PICTURE, "WEBP", lossless=True), "webp-alpha": saved(rgba, "WEBP")}
    files |= {
        "webp-alpha-lossless": saved(rgba, "WEBP", lossless=True, exact=True),
        "webp-animated": saved(PICTURE, "WEBP", lossless=True, **frames),
    }
    files |= {
        "gif": saved(PICTURE, "GIF"),
        "gif-interlaced": saved(palette, "GIF", interlace=1),
        "gif-plain": saved(palette, "GIF", interlace=0),
    }
    files |= {
        "gif-transparent": saved(palette, "GIF", transparency=3),
        "gif-animated": saved(PICTURE, "GIF", **frames),
        "gif-grey": saved(grey, "GIF"),
    }
    files |= {"jp2": saved(PICTURE, "JPEG2000"), "j2k": saved(PICTURE, "JPEG2000", no_jp2=True), "jp2-grey": saved(grey, "JPEG2000")}
    files |= {"jp2-rgba": saved(rgba, "JPEG2000"), "jp2-grey-alpha": saved(Image.fromarray(GREY_ALPHA), "JPEG2000")}
    files |= {"jp2-ycc": saved(PICTURE.convert("YCbCr"), "JPEG2000"), "jp2-tiles": saved(PICTURE, "JPEG2000", tile_size=(32, 32))}
    files |= {"jp2-lossy": saved(PICTURE, "JPEG2000", quality_mode="rates", quality_layers=[8], irreversible=True)}
    files |= {
        "avif": saved(PICTURE, "AVIF"),
        "avif-alpha": saved(rgba, "AVIF"),
        "avif-grey": saved(grey, "AVIF"),
        "avif-animated": saved(PICTURE, "AVIF", **frames),
    }
    icon = rgba.resize((32, 32))
    files |= {"ico": saved(icon, "ICO", sizes=[(32, 32)]), "ico-bmp": saved(icon, "ICO", sizes=[(32, 32)], bitmap_format="bmp")}
    files |= {
        "icns": saved(rgba.resize((64, 64)), "ICNS"),
        "blp": saved(palette, "BLP"),
        "xbm": saved(one, "XBM"),
        "msp": saved(one, "MSP"),
    }
    for mode in ("RGB", "RGBA", "L", "LA"):
        picture = PICTURE.convert(mode)
        files |= {f"tga-{mode.lower()}": saved(picture, "TGA"), f"tga-{mode.lower()}-runs": saved(picture, "TGA", compression="tga_rle")}
        files |= {f"dds-{mode.lower()}": saved(picture, "DDS")}
    files |= {"tga-palette": saved(palette, "TGA"), "tga-one": saved(one, "TGA"), "tga-top-left": saved(PICTURE, "TGA", orientation=1)}
    files |= {f"dds-{kind.lower()}": saved(rgba, "DDS", pixel_format=kind) for kind in ("DXT1", "DXT3", "DXT5", "BC3")}
    files |= {f"pcx-{mode.lower()}": saved(PICTURE.convert(mode), "PCX") for mode in ("1", "L", "P", "RGB")}
    files |= {"dcx": struct.pack("<3I", 0x3ADE68B1, 12, 0) + files["pcx-rgb"]}
    files |= {f"sgi-{mode.lower()}": saved(PICTURE.convert(mode), "SGI") for mode in ("L", "RGB", "RGBA")}
    files |= {f"qoi-{mode.lower()}": saved(PICTURE.convert(mode), "QOI") for mode in ("RGB", "RGBA")}
    files |= {"sun": struct.pack(">8I", 0x59A66A95, WIDTH, HEIGHT, 24, RGB.nbytes, 1, 0, 0) + RGB[..., ::-1].tobytes()}
    files |= {"psd": b"8BPS" + struct.pack(">H6xHIIHH14x", 1, 3, HEIGHT, WIDTH, 8, 3) + RGB.transpose(2, 0, 1).tobytes()}
    return files | {"xpm": b'/* XPM */\nstatic char *a[] = {\n"4 2 2 1",\n"a c #ff0000",\n"b c #00ff00",\n"abab",\n"baba"\n};\n'}


def turned():
    """Each orientation that an EXIF tag can tell of, in each kind of file that holds one."""
    files = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for kind, options in {"JPEG": {}, "PNG": {}, "WEBP": {"lossless": True}, "AVIF": {}}.items():
            files[f"{kind.lower()}-orientation-{orientation}"] = saved(PICTURE, kind, exif=exif, **options)
        files[f"tiff-orientation-{orientation}"] = saved(PICTURE, "TIFF", tiffinfo={ExifTags.Base.Orientation: orientation})
    return files


KINDS = bmps() | pngs() | jpegs() | tiffs() | pnms() | others() | turned()
SHORT_KINDS = {name for name in KINDS if "orientation" not in name or name.endswith("-6")}
"""All kinds, but of the orientations one; the others are long forms of tests."""
