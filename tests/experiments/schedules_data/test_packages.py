import os
import time
from dataclasses import replace

import pytest

from polyvit_fast.experiments.schedules_data.packages import Package, PackageError, compare_digest, fetch

DEB = Package(name="some-sounds", client="apt-get", version="1.0-1", sha256="", licence="CC0-1.0")
WHEEL = Package(name="some-pictures", client="pip", version="2.0", sha256="", licence="CC0-1.0")
SOUND = {"usr/share/sounds/one.wav": b"RIFF"}


def test_a_debian_package_is_downloaded_and_unpacked_once(tmp_path, make_deb, apt_get):
    make_deb(apt_get.folder, "some-sounds", "1.0-1", SOUND)
    unpacked = fetch(DEB, tmp_path / "packages")
    assert unpacked == tmp_path / "packages" / "unpacked" / "some-sounds"
    assert (unpacked / "usr/share/sounds/one.wav").read_bytes() == b"RIFF"
    (unpacked / "mark").touch()
    assert fetch(DEB, tmp_path / "packages") == unpacked
    assert (unpacked / "mark").exists()
    assert (apt_get.folder / "calls").read_text() == "download some-sounds\n"
    assert sorted(os.listdir(tmp_path / "packages")) == ["some-sounds_1.0-1_all.deb", "unpacked"]


def test_a_wheel_is_downloaded_by_pip_and_unpacked(tmp_path, make_wheel, pip_finds):
    make_wheel(pip_finds, "some-pictures", "2.0", {"pictures/one.png": b"png"})
    unpacked = fetch(WHEEL, tmp_path / "packages")
    assert (unpacked / "pictures/one.png").read_bytes() == b"png"


def test_pips_error_is_the_reason(tmp_path, pip_finds):
    with pytest.raises(PackageError, match=r"^pip download some-pictures: ERROR: Could not find a version .* some-pictures"):
        fetch(WHEEL, tmp_path / "packages")


def test_a_package_file_put_there_by_hand_is_taken_and_unpacked_anew_when_it_is_another(tmp_path, make_wheel):
    first = make_wheel(tmp_path, "some-pictures", "2.0", {"pictures/one.png": b"1"})
    assert (fetch(WHEEL, tmp_path) / "pictures/one.png").read_bytes() == b"1"
    second = make_wheel(tmp_path, "some-pictures", "1.5", {"pictures/two.png": b"2"})
    os.utime(first, (time.time() - 100,) * 2)
    assert WHEEL.find(tmp_path) == second
    unpacked = fetch(WHEEL, tmp_path)
    assert [path.name for path in (unpacked / "pictures").iterdir()] == ["two.png"]


def test_apt_gets_error_is_the_reason(tmp_path, apt_get):
    with pytest.raises(PackageError, match=r"^apt-get download some-sounds: E: Unable to locate package some-sounds$"):
        fetch(DEB, tmp_path / "packages")


def test_a_client_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=r"^there is no apt-get on this machine$"):
        fetch(DEB, tmp_path / "packages")


def test_dpkg_deb_that_is_not_there_is_named(tmp_path, monkeypatch):
    (tmp_path / "some-sounds_1.0-1_all.deb").write_bytes(b"!<arch>\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=r"^there is no dpkg-deb on this machine, which unpacks some-sounds_1\.0-1_all\.deb$"):
        fetch(DEB, tmp_path)


def test_a_client_that_brings_nothing_is_reported(tmp_path, apt_get):
    apt_get("#!/bin/sh\nexit 0\n")
    with pytest.raises(PackageError, match=r"apt-get download some-sounds ended well, but .*packages holds no file of some-sounds"):
        fetch(DEB, tmp_path / "packages")


def test_a_part_of_a_download_is_not_taken_for_a_package(tmp_path, apt_get):
    apt_get('#!/bin/sh\nhead -c 999 /dev/zero > "$2"_1.0-1_all.deb\necho "Some line." >&2\nexit 100\n')
    with pytest.raises(PackageError, match=r": Some line\.$"):
        fetch(DEB, tmp_path / "packages")
    assert os.listdir(tmp_path / "packages") == []


@pytest.mark.parametrize("package", [DEB, WHEEL], ids=lambda package: package.client)
def test_a_damaged_package_file_is_to_be_deleted(tmp_path, make_deb, make_wheel, package):
    make = make_deb if package is DEB else make_wheel
    file = make(tmp_path, package.name, package.version, {f"media/{number}": os.urandom(5000) for number in range(9)})
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(PackageError, match=rf"{file} cannot be unpacked: .*delete it, and it is downloaded again$"):
        fetch(package, tmp_path)
    file.unlink()
    make(tmp_path, package.name, package.version, {"media/0": b"whole"})
    assert (fetch(package, tmp_path) / "media/0").read_bytes() == b"whole"


def test_a_wheel_whose_content_is_damaged_is_to_be_deleted(tmp_path, make_wheel):
    file = make_wheel(tmp_path, "some-pictures", "2.0", {"pictures/one.png": b"as it was built"})
    file.write_bytes(file.read_bytes().replace(b"as it was built", b"as it is by now"))
    with pytest.raises(PackageError, match=r"Bad CRC-32.*delete it"):
        fetch(WHEEL, tmp_path)


def test_another_file_than_that_of_the_results_is_remarked(tmp_path):
    file = tmp_path / "some-sounds_1.0-1_all.deb"
    file.write_bytes(b"abc")
    published = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert compare_digest(replace(DEB, sha256=published), file) == ""
    file.write_bytes(b"abd")
    assert compare_digest(replace(DEB, sha256=published), file) == ", not the file of version 1.0-1"


def test_another_version_of_a_wheel_is_remarked(tmp_path):
    assert compare_digest(WHEEL, tmp_path / "some_pictures-2.0-py3-none-any.whl") == ""
    assert compare_digest(WHEEL, tmp_path / "some_pictures-2.0.1-py3-none-any.whl") == ", not version 2.0"


def test_how_to_get_a_package_by_hand():
    assert DEB.explain() == "apt-get update and apt-get download some-sounds on Debian, or https://packages.debian.org/some-sounds"
    assert WHEEL.explain() == "pip download --no-deps some-pictures"
