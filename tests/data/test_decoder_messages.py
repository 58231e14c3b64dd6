"""Standard error of whole processes and of this one, in which real libraries decode damaged files."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from image_files import photo
from image_kinds import saved
from tiny_runs import tile_task, tiny_config
from video_files import write_moving

from polyvit_fast.data.decoder_messages import catch_decoder_messages, decode_or_forget, describe_messages
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.manifest import Folder
from polyvit_fast.data.stream import Loader
from polyvit_fast.media import Media, MediaError

IMAGE = Image(size=32, patch=16)


def flip(content: bytes, seed: int = 0) -> bytes:
    """The file with some bytes of its second half changed."""
    damaged, rng = bytearray(content), np.random.default_rng(seed)
    for position in rng.integers(len(content) // 2, len(content) - 64, 6):
        damaged[position] ^= 0xFF
    return bytes(damaged)


def damaged_jpeg() -> bytes:
    content = saved(photo(), "JPEG", progressive=True)
    return flip(content)


def damaged_fax() -> bytes:
    return flip(saved(photo().convert("1"), "TIFF", compression="group4"))


def write_folder(folder: Path, damaged: dict[str, bytes], count: int = 6) -> Folder:
    """One class of good JPEGs, and the damaged files."""
    (folder / "a").mkdir(parents=True)
    for number in range(count):
        (folder / "a" / f"good{number}.jpg").write_bytes(saved(photo(seed=number), "JPEG"))
    for name, content in damaged.items():
        (folder / "a" / name).write_bytes(content)
    return Folder(path=str(folder))


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [(damaged_jpeg(), "JPEG", "Corrupt JPEG data"), (damaged_fax(), "TIFF", "Fax4Decode: Bad code word")],
    ids=["libjpeg", "libtiff"],
)
def test_what_libraries_write_is_taken_off_standard_error(tmp_path, capfd, content, kind, said):
    path = tmp_path / "x"
    path.write_bytes(content)
    decoder = build_decoder(IMAGE, batch=1, train=False, num_threads=1)
    decode = lambda index: decoder([Media(str(path))], [np.random.default_rng(0)])  # noqa: E731
    decode(0)
    assert said in capfd.readouterr().err  # else there would be nothing to take off
    reported = set()
    with catch_decoder_messages():
        decode(0)
        [text] = describe_messages(reported, [Media(str(path))], decode)
        decode(0)
        assert not list(describe_messages(reported, [Media(str(path))], decode))
    assert reported == {kind}
    assert text.startswith(f"{path} may be damaged ({kind} library: {said}")
    assert capfd.readouterr().err == ""


def test_a_loader_names_one_file_for_each_kind_and_task(tmp_path, capfd):
    source = write_folder(tmp_path / "files", {"torn.jpg": damaged_jpeg(), "torn2.jpg": damaged_jpeg(), "fax.tif": damaged_fax()})
    task = tile_task(modality=IMAGE, train=source, val=source, num_classes=1)
    config, reports = tiny_config(tasks={"photos": task}), []
    with catch_decoder_messages():
        loader = Loader("photos", config, train=True, report=reports.append)
        first = loader.load(0)
        for step in range(1, 4):
            loader.load(step)
    assert len(reports) == 2
    [jpeg] = [text for text in reports if "JPEG library" in text]
    [fax] = [text for text in reports if "TIFF library" in text]
    assert jpeg.startswith(
        (f"task photos: {tmp_path}/files/a/torn.jpg may be damaged", f"task photos: {tmp_path}/files/a/torn2.jpg may be damaged")
    )
    assert fax.startswith(f"task photos: {tmp_path}/files/a/fax.tif may be damaged")
    assert capfd.readouterr().err == ""
    assert not loader.broken
    again = Loader("photos", config, train=True).load(0)
    assert first.grid.equal(again.grid)


def test_a_broken_file_s_messages_come_in_no_second_report(tmp_path):
    png = saved(photo(), "PNG")
    source = write_folder(tmp_path / "files", {"torn.png": flip(png)})
    task = tile_task(modality=IMAGE, train=source, val=source, num_classes=1)
    config, reports = tiny_config(tasks={"photos": task}, max_bad_ratio=0.5), []
    with catch_decoder_messages():
        loader = Loader("photos", config, train=True, report=reports.append)
        for step in range(3):
            loader.load(step)
    [report] = reports
    assert report.startswith(f"task photos: broken file {tmp_path}/files/a/torn.png: truncated or damaged")


def refuse(media, rngs):
    raise MediaError("truncated")


def test_all_else_passes_at_once_and_standard_error_is_given_back(capfd):
    before, stream = os.fstat(2), sys.stderr
    with catch_decoder_messages():
        os.write(2, b"Corrupt JPEG data: 3 extraneous bytes before marker 0xd9\n\x1b[0;31m[ERROR] \x1b[0m[jpeg_parser] Invalid marker\n")
        os.write(2, b"a warning of PyTorch\n")
        subprocess.run(["sh", "-c", "echo of another process >&2"], check=True)
        with catch_decoder_messages():  # an evaluation inside of a run
            os.write(2, b"unfinished")
        [text] = describe_messages(set(), [Media("a.jpg"), Media("b.jpg")], lambda index: None)
        assert text.startswith("one of 2 files, of which a.jpg is the first, may be damaged")
        os.write(2, b"libpng error: bad adaptive filter value\n")
        with pytest.raises(MediaError):
            decode_or_forget(refuse, [Media("a.jpg")], [])
        assert not list(describe_messages(set(), [Media("a.jpg")], lambda index: None))
    assert os.path.samestat(os.fstat(2), before)
    assert sys.stderr is stream
    os.write(2, b"libpng error: later\n")
    assert (
        capfd.readouterr().err
        == "a warning of PyTorch\nof another process\nunfinishedlibpng error: bad adaptive filter value\nlibpng error: later\n"
    )


def run_code(code: str, redirect: str = "") -> subprocess.CompletedProcess:
    begin = "import os, sys\nfrom polyvit_fast.data.decoder_messages import catch_decoder_messages\n"
    command = ["/bin/sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, begin + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_process_without_standard_error_runs_all_the_same():
    done = run_code(
        """
        with catch_decoder_messages():
            print("inside", sys.stderr)
        """,
        "2>&-",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "inside None\n", "")


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL], ids=str)
def test_a_crash_keeps_its_last_words(number):
    """Written by a library that holds Python's lock, so that no thread of this process can pass them on."""
    done = run_code(
        f"""
        import ctypes
        library, words = ctypes.PyDLL(None), b"terminate called after throwing an instance of 'std::bad_alloc'\\n"
        with catch_decoder_messages():
            library.write(2, words, len(words)), getattr(library, "raise")({int(number)})
        """
    )
    assert done.returncode == -number
    assert done.stderr == "terminate called after throwing an instance of 'std::bad_alloc'\n"


def test_a_library_that_keeps_python_s_lock_while_it_writes_does_not_wait_for_ever():
    code = """
        import ctypes
        from polyvit_fast.data.decoder_messages import catch_decoder_messages

        library, line = ctypes.PyDLL(None), b"libpng warning: damaged".ljust(127) + b"\\n"
        with catch_decoder_messages():
            for _ in range(40_000):
                library.write(2, line, len(line))
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_an_exception_a_warning_and_a_late_handler_of_logging_are_shown():
    done = run_code(
        """
        import logging, warnings
        logger = logging.getLogger("one")
        with catch_decoder_messages():
            logger.addHandler(logging.StreamHandler())
            warnings.warn("be warned")
        logger.warning("later")
        with catch_decoder_messages():
            logger.warning("in the next run")
            raise ValueError("the reason")
        """
    )
    assert done.returncode == 1
    for text in ("UserWarning: be warned", "later\n", "in the next run\n", "ValueError: the reason\n"):
        assert done.stderr.count(text) == 1


def test_what_ffmpeg_writes_where_it_is_let_counts_too(tmp_path):
    write_moving(tmp_path / "good.mp4", "libx264")
    content = bytearray((tmp_path / "good.mp4").read_bytes())
    start = content.index(b"mdat")
    for position in range(start + 2000, start + 6000, 7):
        content[position] ^= 0xFF
    (tmp_path / "torn.mp4").write_bytes(content)
    done = run_code(
        f"""
        import av
        from polyvit_fast.data.decoder_messages import describe_messages
        from polyvit_fast.media import Media
        av.logging.set_level(av.logging.ERROR)
        av.logging.restore_default_callback()

        def decode(index):
            with av.open({str(tmp_path / "torn.mp4")!r}) as container:
                for frame in container.decode(video=0):
                    pass

        with catch_decoder_messages():
            try:
                decode(0)
            except av.error.FFmpegError:
                pass
            print(*describe_messages(set(), [Media("torn.mp4")], decode), sep="\\n")
        """
    )
    assert done.stdout.count("may be damaged (FFmpeg library: [h264 @ 0x") == 1
    assert done.stderr == ""


def test_where_nobody_reads_standard_error_what_is_not_a_decoder_s_is_lost_and_nothing_fails():
    code = """
        import os
        from polyvit_fast.data import decoder_messages

        with decoder_messages.catch_decoder_messages():
            for _ in range(3):
                os.write(2, b"a line of another library\\nand one that does not end")
                decoder_messages._current.take()
        print("done")
    """
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=write, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "done\n")
