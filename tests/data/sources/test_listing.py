import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from polyvit_fast.data.sources.listing import count_names, hidden_as, left_out_as, list_media, scan


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")
    return folder


def relative(paths, folder):
    return [os.path.relpath(path, folder) for path in paths]


def test_files_come_before_the_folders_next_to_them_both_in_sorted_order(tmp_path):
    fill(tmp_path, "b/y", "b/x", "a/z", "c", "B", "a/deep/er/1")
    assert relative(list_media(str(tmp_path), "image", {}).files, tmp_path) == ["B", "c", "a/z", "a/deep/er/1", "b/x", "b/y"]


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("Thumbs.db", "Thumbs.db"),
        ("THUMBS.DB", "THUMBS.DB"),
        ("ehthumbs.db", "ehthumbs.db"),
        ("desktop.ini", "desktop.ini"),
        ("Icon\r", "Icon"),
        ("README", "README"),
        ("SHA256SUMS", "SHA256SUMS"),
        ("0001.TXT", ".txt"),
        ("0001.jpg.txt", ".txt"),
        ("0001.json", ".json"),
        ("0001.xml", ".xml"),
        ("labels.csv", ".csv"),
        ("clip.srt", ".srt"),
        ("list.m3u8", ".m3u8"),
        ("photo.xmp", ".xmp"),
        ("clip.mp4.md5", ".md5"),
        ("clip.mp4.part", ".part"),
        ("1.jpg:Zone.Identifier", ".identifier"),
        ("SA1.PHN", ".phn"),
        ("all.tar.gz", ".gz"),
        ("Thumbs.db:encryptable", "Thumbs.db:encryptable"),
        ("ZbThumbnail.info", ".info"),
        ("sync.ffs_db", ".ffs_db"),
        ("1.jpg.icloud", ".icloud"),
        ("drawing.svg", ".svg"),
        ("000017.cls", ".cls"),
        ("train.lst", ".lst"),
        ("job.OUT", ".out"),
        ("job.err", ".err"),
        ("1.jpg.pp3", ".pp3"),
        ("1.nef.dop", ".dop"),
        ("1.on1", ".on1"),
        ("1.ncc", ".ncc"),
        ("1.pamp", ".pamp"),
        ("Shortcut.lnk", ".lnk"),
        ("link.desktop", ".desktop"),
        ("1.jpg~", "*~"),
    ],
)
@pytest.mark.parametrize("modality", ["image", "video", "audio", "tile"])
def test_names_that_are_no_media(name, counted, modality):
    assert left_out_as(name, modality) == counted


@pytest.mark.parametrize(
    "name", ["000017", "x.jpg", "x.JPEG", "a.b.c", "photo.heic", "scan.dcm", "x.", "db", "txt", "readme.jpg", "été.png"]
)
def test_other_names_are_decided_by_content(name):
    assert left_out_as(name, "image") == ""


@pytest.mark.parametrize(
    ("name", "image", "video", "audio"),
    [
        ("cover.jpg", "", ".jpg", ".jpg"),
        ("AlbumArt.PNG", "", ".png", ".png"),
        ("moving.gif", "", "", ".gif"),
        ("clip.mp4", ".mp4", "", ""),
        ("clip.ts", ".ts", "", ""),
        ("track.wav", ".wav", ".wav", ""),
        ("track.mp3", ".mp3", ".mp3", ""),
        ("either.ogg", ".ogg", "", ""),
        ("either.webm", ".webm", "", ""),
    ],
)
def test_media_that_another_modality_decodes(name, image, video, audio):
    assert [left_out_as(name, modality) for modality in ("image", "video", "audio", "tile")] == [image, video, audio, ""]


def test_hidden_names_and_folders_of_the_system():
    names = [".DS_Store", "._1.jpg", ".hidden.jpg", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "cat", "_x"]
    assert list(map(hidden_as, names)) == [".DS_Store", "._*", ".*", "__MACOSX/", "@eaDir/", "$RECYCLE.BIN/", "lost+found/", "", ""]


def test_what_is_left_out_is_counted(tmp_path):
    fill(tmp_path, "1.jpg", "1.txt", "2.txt", "a/Thumbs.db", "a/._1.jpg", "a/@eaDir/1.jpg", ".git/config", "notes.txt/2.jpg")
    listing = list_media(str(tmp_path), "image", {})
    assert relative(listing.files, tmp_path) == ["1.jpg", "notes.txt/2.jpg"]
    assert count_names(listing.left_out) == "2 .txt, 1 .*, 1 ._*, 1 @eaDir/, 1 Thumbs.db"


def test_linked_folders_are_followed(tmp_path):
    fill(tmp_path, "class/1.jpg", "class/a/4.jpg", "store/more/2.jpg", "store/more/deep/3.jpg")
    (tmp_path / "class" / "link").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "class" / "relative").symlink_to("../store")
    (tmp_path / "class" / "file.jpg").symlink_to(tmp_path / "store" / "more" / "2.jpg")
    listing = list_media(str(tmp_path / "class"), "image", {})
    assert relative(listing.files, tmp_path / "class") == ["1.jpg", "file.jpg", "a/4.jpg", "link/2.jpg", "link/deep/3.jpg"]
    assert relative(listing.again, tmp_path / "class") == ["relative/more"]


def test_a_class_folder_may_be_a_link_itself(tmp_path):
    fill(tmp_path, "store/1.jpg", "store/a/2.jpg")
    (tmp_path / "class").symlink_to("store")
    assert relative(list_media(str(tmp_path / "class"), "image", {}).files, tmp_path) == ["class/1.jpg", "class/a/2.jpg"]


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "../../../root", "other"])
def test_loops_end_and_count_nothing_twice(tmp_path, target):
    root = fill(tmp_path / "root", "class/1.jpg", "class/sub/2.jpg", "class/other/3.jpg", "outside/4.jpg")
    (root / "class" / "sub" / "up").symlink_to(root / "class" / "other" if target == "other" else target)
    (root / "class" / "other" / "up").symlink_to(root / "class" / "sub")
    listing = list_media(str(root / "class"), "image", {})
    assert relative(listing.files, root / "class") == ["1.jpg", "other/3.jpg", "sub/2.jpg"]
    assert sorted(relative(listing.again, root / "class")) == ["other/up", "sub/up"]


def test_a_loop_through_a_folder_elsewhere_ends(tmp_path):
    fill(tmp_path, "root/class/1.jpg", "store/2.jpg")
    (tmp_path / "root" / "class" / "x").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "root" / "class")
    listing = list_media(str(tmp_path / "root" / "class"), "image", {})
    assert relative(listing.files, tmp_path) == ["root/class/1.jpg", "root/class/x/2.jpg"]


def test_two_links_to_one_folder_count_once(tmp_path):
    fill(tmp_path, "class/1.jpg", "store/2.jpg")
    for name in ("a", "b"):
        (tmp_path / "class" / name).symlink_to(tmp_path / "store")
    listing = list_media(str(tmp_path / "class"), "image", {})
    assert relative(listing.files, tmp_path) == ["class/1.jpg", "class/a/2.jpg"]
    assert relative(listing.again, tmp_path) == ["class/b"]


@pytest.mark.parametrize("link", ["cat/link", "dog/link"])
def test_a_folder_in_two_classes_is_refused(tmp_path, link):
    fill(tmp_path, "cat/1.jpg", "cat/in/2.jpg", "dog/3.jpg", "dog/in/4.jpg")
    other = "dog/in" if link == "cat/link" else "cat/in"
    (tmp_path / link).symlink_to(tmp_path / other)
    owners: dict[str, str] = {}
    with pytest.raises(ValueError, match=rf"folder {tmp_path}/{other} belongs to two classes: .*cat.*dog"):
        [list_media(str(tmp_path / name), "image", owners) for name in ("cat", "dog")]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    fill(tmp_path, "class/1.jpg")
    (tmp_path / "class" / "gone.txt").symlink_to("missing.txt")
    assert list_media(str(tmp_path / "class"), "image", {}).left_out == {".txt": 1}
    (tmp_path / "class" / "more").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=rf"link {tmp_path}/class/more leads nowhere: {tmp_path}/unmounted is missing"):
        list_media(str(tmp_path / "class"), "image", {})


def test_a_link_to_itself_is_named(tmp_path):
    fill(tmp_path, "class/1.jpg")
    (tmp_path / "class" / "self").symlink_to("self")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/class/self: Too many levels of symbolic links"):
        list_media(str(tmp_path / "class"), "image", {})


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"^folder {tmp_path}/gone: No such file or directory"):
        scan(str(tmp_path / "gone"), "image", Counter())


@pytest.fixture
def open_folder():
    """A folder that every user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o000, 0o311, 0o444])
def test_a_folder_that_cannot_be_read_is_an_error(open_folder, mode):
    fill(open_folder, "class/1.jpg", "class/shut/in/2.jpg")
    shut = open_folder / "class" / "shut"
    shut.chmod(mode)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(ValueError, match=rf"{shut}.*: Permission denied"):
            list_media(str(open_folder / "class"), "image", {})
    finally:
        os.seteuid(user)
        shut.chmod(0o755)
