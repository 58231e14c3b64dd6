import io
import struct

import numpy as np
import pytest
import soundfile
from long_forms import mark_long
from sound_files import PLAIN, RATE, SAMPLES, WAVE, chunk, encode, mux, noise, read_waves, wav, wav_format, with_dali

from polyvit_fast.data.audio.reader import read_header
from polyvit_fast.media import Media, MediaError

ELSEWHERE = {"RAW", "SD2", "MP3", "OGG"}  # without a header, with one in a second file, and FFmpeg's
UNWRITABLE = {("AIFF", "DWVW_12"), ("WAV", "MPEG_LAYER_III")}
UNREADABLE = {("AIFF", "DWVW_16"), ("AIFF", "DWVW_24")}  # by soundfile, which wants to go back and forth in it
WITHOUT_LENGTH = {"IRCAM", "PAF", "PVF", "XI"}  # libsndfile leaves that of XI open
FORMATS = [
    (container, subtype, endian)
    for container in soundfile.available_formats()
    for subtype in soundfile.available_subtypes(container)
    for endian in ("FILE", "LITTLE", "BIG")
    if container not in ELSEWHERE and (container, subtype) not in UNWRITABLE and soundfile.check_format(container, subtype, endian)
]
SHORT_FORMATS = [
    form for i, form in enumerate(FORMATS) if i == 0 or FORMATS[i - 1][0] != form[0] or form[1:] in (("PCM_16", "BIG"), ("FLOAT", "FILE"))
]
"""Of each container the first format, 16 bits and floating point; the others are long forms of tests."""


def written(path, container, subtype, endian="FILE", channels=1, seconds=0.5):
    """What libsndfile reads of a file that it wrote, [time, channels], and its rate."""
    wave = np.stack([0.3 * np.sin(np.arange(round(seconds * RATE)) * step) for step in (0.1, 0.23)[:channels]], 1)
    soundfile.write(path, wave, 8000 if container == "WVE" else RATE, format=container, subtype=subtype, endian=endian)
    if (container, subtype) in UNREADABLE:
        return wave, RATE
    return soundfile.read(path, always_2d=True)


def writable_with(channels, container, subtype):
    try:
        soundfile.SoundFile(io.BytesIO(), "w", RATE, channels, subtype, format=container).close()
    except (soundfile.LibsndfileError, ValueError):
        return False
    return True


@pytest.mark.parametrize(("container", "subtype", "endian"), mark_long(FORMATS, SHORT_FORMATS))
def test_whatever_libsndfile_reads_is_read_as_it_does(tmp_path, container, subtype, endian):
    path = tmp_path / "a"
    for channels in (1, 2):
        if channels == 2 and not writable_with(2, container, subtype):
            continue
        theirs, rate = written(path, container, subtype, endian, channels)
        [wave] = read_waves(path, sample_rate_hz=rate)
        header = read_header(Media(str(path)))
        assert (header.sample_rate_hz, header.channels) == (rate, channels)
        assert abs(header.samples - len(theirs)) <= 640  # of packed ones the header tells blocks
        assert len(wave) == len(theirs)
        assert np.abs(wave - theirs.mean(1)).max() < (1e-3 if (container, subtype) in UNREADABLE else 1e-6)


CUT = sorted({(container, subtype) for container, subtype, _ in FORMATS if container not in WITHOUT_LENGTH})


@pytest.mark.parametrize("seconds", mark_long([0.1, 3.0], [0.1]))
@pytest.mark.parametrize(("container", "subtype"), mark_long(CUT, [(container, subtype) for container, subtype, _ in SHORT_FORMATS]))
def test_what_a_header_promises_and_the_file_does_not_hold_is_truncated(tmp_path, container, subtype, seconds):
    path = tmp_path / "a"
    written(path, container, subtype, seconds=seconds)
    content = path.read_bytes()
    read_header(Media(str(path)))
    for fraction in (0.3, 0.6, 0.9, 0.97):
        path.write_bytes(content[: int(fraction * len(content))])
        if container == "FLAC":  # its header tells samples; where they are missing, DALI says so
            with pytest.raises(MediaError, match=r"truncated or damaged: .* cannot be decoded \(.*Requested \d+ samples but got \d+"):
                read_waves(path)
            continue
        reason = r"it ends after \d\.\d+ of the (0\.\d\d\d|\d\.\d+) seconds|it has \d+ of the \d+ bytes"  # bytes before the samples begin
        with pytest.raises(MediaError, match=rf"^truncated: ({reason}) that its header promises$"):
            read_header(Media(str(path)))


@pytest.mark.parametrize("container", sorted(WITHOUT_LENGTH))
def test_a_format_that_promises_nothing_is_taken_as_it_is(tmp_path, container):
    path = tmp_path / "a"
    theirs, rate = written(path, container, {"XI": "DPCM_16"}.get(container, "PCM_16"))
    path.write_bytes(path.read_bytes()[: 3 * path.stat().st_size // 4])
    [wave] = read_waves(path, sample_rate_hz=rate)
    assert np.array_equal(wave, theirs[: len(wave), 0].astype(np.float32))
    assert 0.6 * len(theirs) < len(wave) < 0.8 * len(theirs)


@pytest.mark.parametrize("missing", [1, 2, 100])
def test_less_than_a_hundredth_may_be_missing(tmp_path, missing):
    """Some programs count their header, of 44 bytes, as sound."""
    (tmp_path / "a.wav").write_bytes(PLAIN[:-missing])
    [wave] = read_waves(tmp_path / "a.wav")
    assert np.array_equal(wave, WAVE[: len(wave)].astype(np.float32) / 32768)
    assert len(wave) == len(WAVE) - (missing + 1) // 2


SHORT = (noise(0.5, RATE)[:, 0] * 0.9).astype(np.float32)
PIPED = [("w64", "pcm_s16le"), ("aiff", "pcm_s16be"), ("aiff", "pcm_s16le"), ("aiff", "pcm_f32be"), ("au", "pcm_s16be"), ("au", "pcm_alaw")]
PIPED += [("caf", "pcm_s16be"), ("caf", "pcm_s16le"), ("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("wav", "pcm_s24le")]


@pytest.mark.parametrize(("container", "codec"), PIPED)
def test_a_file_that_was_written_to_a_pipe_is_whole(tmp_path, container, codec):
    (tmp_path / "a").write_bytes(mux(SHORT, RATE, container, codec, piped=True))
    (tmp_path / "b").write_bytes(mux(SHORT, RATE, container, codec))
    piped, whole = read_waves(tmp_path / "a", tmp_path / "b")
    assert np.array_equal(piped, whole)
    assert len(whole) == len(SHORT)


OTHERS = [("wav", codec, 4096) for codec in ("pcm_s64le", "adpcm_yamaha", "adpcm_swf", "libmp3lame", "g722", "ac3")]
OTHERS += [("au", "g722", 4096), ("caf", "alac", 4096), ("voc", "pcm_u8", 300), ("aiff", "pcm_f32be", 0), ("w64", "pcm_f32le", 0)]


@pytest.mark.parametrize(("container", "codec", "more"), OTHERS)
def test_other_codecs_in_these_containers_are_ffmpegs_but_held_to_the_header(tmp_path, container, codec, more):
    rate = 44_100 if codec in ("adpcm_swf", "ac3", "libmp3lame") else RATE
    content = mux(noise(2, rate)[:, 0], rate, container, codec)
    (tmp_path / "a").write_bytes(content)
    [wave] = read_waves(tmp_path / "a", sample_rate_hz=rate)
    assert abs(len(wave) - 2 * rate) <= more
    for fraction in (0.5, 0.9, 0.97):
        (tmp_path / "a").write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(MediaError, match="truncated: "):
            read_waves(tmp_path / "a")


def test_a_voc_file_of_many_blocks_ends_with_the_last(tmp_path):
    content = mux(noise(2, RATE)[:, 0], RATE, "voc", "pcm_u8")
    (tmp_path / "a").write_bytes(content[:-1])
    with pytest.raises(MediaError, match="truncated: the block that ends a VOC file is missing"):
        read_waves(tmp_path / "a")


GUID = bytes.fromhex("0100000000001000800000aa00389b71")


def extensible(order, guid):
    body = struct.pack(order + "HHIIHHHHI", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4)
    return struct.pack(order + "4sI", b"fmt ", 40) + body + guid


def test_every_form_of_an_extensible_header(tmp_path):
    """The GUID of ambisonics too; one of another program is not guessed at."""
    path = tmp_path / "a.wav"
    for guid in (GUID, bytes.fromhex("010000002107d3118644c8c1ca000000")):
        path.write_bytes(wav(extensible("<", guid), chunk(b"data", SAMPLES)))
        assert with_dali(path)
        assert np.array_equal(read_waves(path)[0], WAVE.astype(np.float32) / 32768)
    path.write_bytes(wav(extensible("<", GUID[:15] + b"x"), chunk(b"data", SAMPLES)))
    assert not with_dali(path)
    big = struct.pack(">IHH", *struct.unpack("<IHH", GUID[:8])) + GUID[8:]
    swapped = WAVE.astype(">i2").tobytes()
    content = b"RIFX" + bytes(4) + b"WAVE" + extensible(">", big) + struct.pack(">4sI", b"data", len(swapped)) + swapped
    path.write_bytes(content)
    assert with_dali(path)
    assert np.array_equal(read_waves(path)[0], soundfile.read(path, dtype="float32")[0])
    assert np.array_equal(read_waves(path)[0], WAVE.astype(np.float32) / 32768)


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [((0xFFFFFFFF, 0xFFFFFFFF), True), ((0, 0), True), ((0, 0x7FFFFFFF), True), ((44 + 99_999_999, 99_999_999), False)],
)
def test_sizes_that_a_program_could_not_know(tmp_path, sizes, kept):
    content = bytearray(PLAIN)
    struct.pack_into("<I", content, 4, sizes[0])
    struct.pack_into("<I", content, PLAIN.index(b"data") + 4, sizes[1])
    (tmp_path / "a.wav").write_bytes(content)
    if kept:
        assert np.array_equal(read_waves(tmp_path / "a.wav")[0], WAVE.astype(np.float32) / 32768)
    else:
        with pytest.raises(MediaError, match=r"truncated: it ends after 1\.0 of the 3125\.0 seconds"):
            read_waves(tmp_path / "a.wav")


def test_chunks_in_front_of_the_format_and_of_odd_sizes(tmp_path):
    """In both byte orders, and in AIFF with the samples before what they are."""
    plain, big = WAVE.astype(np.float32) / 32768, WAVE.astype(">i2").tobytes()
    path = tmp_path / "a"
    chunks = [(b"bext", bytes(603)), (b"LIST", b"odd"), (b"fmt ", struct.pack(">HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)), (b"data", big)]
    body = b"".join(struct.pack(">4sI", name, len(content)) + content + bytes(len(content) % 2) for name, content in chunks)
    path.write_bytes(b"RIFX" + struct.pack(">I", 4 + len(body)) + b"WAVE" + body)
    assert np.array_equal(read_waves(path)[0], plain)
    comm = struct.pack(">4sIHIHHQ", b"COMM", 18, 1, len(WAVE), 16, 16_383 + 13, RATE << 50)
    ssnd = struct.pack(">4sIII", b"SSND", 8 + len(big), 0, 0) + big
    for parts in ((comm, ssnd), (ssnd, comm)):
        body = b"AIFF" + struct.pack(">4sI", b"NAME", 3) + b"odd\0" + b"".join(parts)
        path.write_bytes(b"FORM" + struct.pack(">I", len(body)) + body)
        assert np.array_equal(read_waves(path)[0], plain)


def test_what_is_refused_says_why(tmp_path):
    path = tmp_path / "a"
    written(path, "NIST", "PCM_16")
    path.write_bytes(path.read_bytes().replace(b"-s3 pcm\n", b"-s26 pcm,embedded-shorten-v2.00\n", 1))
    with pytest.raises(MediaError, match=r"its coding, pcm,embedded-shorten-v2\.00, is not supported"):
        read_waves(path)
    written(path, "SVX", "PCM_S8")
    content = bytearray(path.read_bytes())
    content[content.index(b"VHDR") + 8 + 15] = 1
    path.write_bytes(content)
    with pytest.raises(MediaError, match="its compression is not supported"):
        read_waves(path)
    for container in ("RAW", "SD2"):
        written_to = tmp_path / "b"
        soundfile.write(written_to, noise(0.5, RATE), RATE, format=container, subtype="PCM_16")
        with pytest.raises(MediaError, match="not a sound that can be decoded"):
            read_waves(written_to)


APPENDED = "another recording begins at byte {}, where a second file was appended: split it there"
JOINABLE = [form for form in FORMATS if form[0] not in {"HTK", "IRCAM", "PAF", "PVF"}]  # which promise nothing, or whose start is no mark


@pytest.mark.parametrize(("container", "subtype", "endian"), mark_long(JOINABLE, SHORT_FORMATS))
def test_a_second_file_is_not_lost_silently(tmp_path, container, subtype, endian):
    path = tmp_path / "a"
    written(path, container, subtype, endian)
    one = path.read_bytes()
    path.write_bytes(one + one)
    with pytest.raises(MediaError, match=APPENDED.format(len(one))):
        read_waves(path)


def test_a_second_file_is_found_behind_tags_and_where_the_size_is_unknown(tmp_path):
    path, tag = tmp_path / "a", chunk(b"LIST", b"odd")
    start = PLAIN.index(b"data")
    for size in (0, 0xFFFFFFFF, 0x7FFFFFFF):
        piped = PLAIN[: start + 4] + struct.pack("<I", size) + SAMPLES
        path.write_bytes(piped + piped)
        with pytest.raises(MediaError, match=APPENDED.format(len(piped))):
            read_waves(path)
    path.write_bytes(PLAIN + tag + PLAIN)
    with pytest.raises(MediaError, match=APPENDED.format(len(PLAIN + tag))):
        read_waves(path)
    odd = wav(wav_format(bits=8), chunk(b"data", SAMPLES[:777]))
    for one in (odd, odd[:-1]):  # some programs leave the filling byte out
        path.write_bytes(one + PLAIN)
        with pytest.raises(MediaError, match=APPENDED.format(len(one))):
            read_waves(path)
    flac, id3 = encode(noise(0.5, RATE), RATE, ".flac"), b"ID3\4" + bytes(6)
    path.write_bytes(id3 + flac + id3 + flac)
    with pytest.raises(MediaError, match=APPENDED.format(len(id3 + flac + id3))):
        read_waves(path)


def test_a_second_file_is_found_however_long_the_first_is(tmp_path):
    one = encode(noise(60, RATE), RATE, ".flac")
    assert len(one) > 1 << 20
    (tmp_path / "a").write_bytes(one + one)
    with pytest.raises(MediaError, match=APPENDED.format(len(one))):
        read_waves(tmp_path / "a")


TAGS = {"ID3v1": b"TAG" + bytes(125), "LIST": chunk(b"LIST", b"INFO"), "bext": chunk(b"bext", bytes(602)), "zeros": bytes(1000)}
TAGGED = ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "MAT4", "MAT5", "VOC", "NIST", "SVX", "AVR", "MPC2K", "WVE", "FLAC"]


@pytest.mark.parametrize("tag", mark_long(TAGS, ["LIST", "zeros"]))
@pytest.mark.parametrize("container", TAGGED)
def test_what_follows_the_samples_is_neither_a_second_file_nor_sound(tmp_path, container, tag):
    path = tmp_path / "a"
    theirs, rate = written(path, container, "ALAW" if container == "WVE" else "PCM_16")
    path.write_bytes(path.read_bytes() + TAGS[tag])
    [wave] = read_waves(path, sample_rate_hz=rate)
    assert np.array_equal(wave, theirs[:, 0].astype(np.float32))


def test_a_variable_of_one_number_is_no_second_file(tmp_path):
    path = tmp_path / "a"
    theirs, _ = written(path, "MAT4", "PCM_16", "LITTLE")
    path.write_bytes(path.read_bytes() + struct.pack("<5I5sd", 0, 1, 1, 0, 5, b"gain\0", 1.0))
    assert np.array_equal(read_waves(path)[0], theirs[:, 0].astype(np.float32))
