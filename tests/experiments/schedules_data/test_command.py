import os
import re
from dataclasses import replace

import pytest

from polyvit_fast.experiments.schedules_data import command
from polyvit_fast.experiments.schedules_data.catalogue import DATASETS
from polyvit_fast.experiments.schedules_data.dataset import read_record

DIGITS = {"train": 60, "val": 15, "test": 25}


@pytest.fixture
def make(tmp_path, capsys):
    """Run the command with `out` and `packages` in the test's folder; returns its exit code, what it prints, and its errors' lines."""

    def run(*datasets, **options):
        folders = {"out": tmp_path / "out", "packages": tmp_path / "packages"} | options
        arguments = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
        code = command.main([*arguments, *(("--datasets", *datasets) if datasets else ())])
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    return run


@pytest.fixture
def digits(tmp_path, write_digits):
    return write_digits(tmp_path / "packages", 100)


def test_a_dataset_is_made_from_a_package_that_is_there(tmp_path, make, digits):
    code, printed, errors = make("digits")
    assert code == 0
    written = read_record(tmp_path / "out" / "digits")
    assert written.counts == DIGITS
    assert re.search(rf"digits\s*│ 10\s*│ 60\s*│ 15\s*│ 25\s*│ {written.digest}", printed)
    assert [line for line in errors if line] == [
        "package scikit-learn: scikit_learn-1.9.1-py3-none-any.whl; BSD-3-Clause; digits of the UCI repository, CC-BY-4.0"
    ]
    assert "| scikit-learn | pip | 1.9.1 | digits |" in (tmp_path / "out" / "LICENCES.md").read_text()


def test_a_second_call_makes_nothing_anew_and_needs_no_package(tmp_path, make, digits):
    make("digits")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "digits").rglob("*")}
    assert len(before) > 100
    code, printed, errors = make("digits", packages=tmp_path / "nothing")
    assert (code, errors) == (0, [])
    assert read_record(tmp_path / "out" / "digits").digest in printed
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "digits").rglob("*")}
    assert not (tmp_path / "nothing").exists()


def test_files_of_another_version_are_made_anew(tmp_path, make, digits, monkeypatch):
    make("digits")
    (tmp_path / "out" / "digits" / "train" / "old.png").touch()
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], version=99))
    assert make("digits")[0] == 0
    assert read_record(tmp_path / "out" / "digits").version == 99
    assert not (tmp_path / "out" / "digits" / "train" / "old.png").exists()


def test_what_is_missing_is_named_with_a_hint_and_the_rest_is_made(tmp_path, make, digits, apt_get):
    code, printed, errors = make("letters", "digits", "speakers")
    assert code == 1
    assert "digits" in printed
    assert "letters" not in printed
    reason = (
        "apt-get download klettres-data: E: Unable to locate package klettres-data (by hand: apt-get update and apt-get download "
        f"klettres-data on Debian, or https://packages.debian.org/klettres-data, into {tmp_path}/packages)"
    )
    assert errors[-2:] == [f"missing: letters: {reason}", f"missing: speakers: {reason}"]
    assert (apt_get.folder / "calls").read_text() == "download klettres-data\n"  # asked once for both
    assert sorted(os.listdir(tmp_path / "out")) == ["LICENCES.md", "digits"]


def test_all_packages_that_a_dataset_lacks_are_named(tmp_path, make, apt_get):
    code, printed, errors = make("language")
    assert code == 1
    assert printed == ""
    (line,) = errors
    assert re.findall(r"Unable to locate package (\S+)", line) == [
        *(f"asterisk-core-sounds-{language}-wav" for language in ("en", "es", "fr", "it", "ru")),
        "ktuberling-data",
    ]


def test_without_a_client_nothing_is_made_and_the_client_named(tmp_path, make, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, printed, errors = make("drums")
    assert (code, printed) == (1, "")
    assert errors[0].startswith("missing: drums: there is no apt-get on this machine (by hand: ")
    assert os.listdir(tmp_path / "out") == []


def test_another_package_file_than_that_of_the_results_is_remarked(make, tmp_path, make_deb, write_digits):
    write_digits(tmp_path / "packages", 100, version="1.8.0")
    make_deb(tmp_path / "packages", "klettres-data", "1.0", {"usr/share/klettres/en/alpha/a.ogg": b""})
    code, _, errors = make("digits", "letters")
    assert code == 1
    assert "package scikit-learn: scikit_learn-1.8.0-py3-none-any.whl, not version 1.9.1; " in "\n".join(errors)
    assert "package klettres-data: klettres-data_1.0_all.deb, not the file of version 4:22.12.3-1; " in "\n".join(errors)
    assert "letters: files left out: 1, not a sound that can be read" not in errors
    letters = ", ".join("abcdefghijklmnopqrstuvwxyz")
    assert errors[-1] == f"missing: letters: klettres-data: no file of {letters} in it; another version may have them"


def test_files_that_were_left_out_are_counted(make, tmp_path, make_deb, monkeypatch):
    monkeypatch.setitem(DATASETS, "speakers", replace(DATASETS["speakers"], classes=()))
    make_deb(tmp_path / "packages", "klettres-data", "1.0", {f"usr/share/klettres/en/alpha/{name}.ogg": b"" for name in "ab"})
    code, _, errors = make("speakers")
    assert code == 0
    assert errors[-1] == "speakers: files left out: 2, not a sound that can be read"


def test_a_damaged_package_is_to_be_deleted(make, tmp_path, digits):
    digits.write_bytes(digits.read_bytes()[:-50])
    code, _, errors = make("digits")
    assert code == 1
    assert errors[-1].startswith(
        f"missing: digits: {digits} cannot be unpacked: File is not a zip file; delete it, and it is downloaded again"
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [("digit", "perhaps you meant digits"), ("imagenet", "there are digits, stamps, topics, camera, games, speed, arrow, language, ")],
)
def test_a_dataset_that_there_is_none_of_is_refused(make, tmp_path, name, hint):
    code, printed, errors = make("digits", name)
    assert (code, printed) == (2, "")
    assert len(errors) == 1
    assert errors[0].startswith(f"schedules_data: dataset {name!r} is unknown; {hint}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", [False, True])
def test_a_folder_that_cannot_be_made_is_named(make, tmp_path, digits, below):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "below" if below else tmp_path / "file"
    code, _, errors = make("digits", out=out)
    assert code == 2
    reason = "Not a directory" if below else "File exists"
    assert errors == [f"schedules_data: {out} cannot be written: {reason}; choose other folders with --out and --packages"]


def test_packages_in_a_file_are_refused(make, tmp_path):
    (tmp_path / "file").touch()
    code, _, errors = make("digits", packages=tmp_path / "file")
    assert code == 2
    assert errors == [f"schedules_data: {tmp_path}/file cannot be written: File exists; choose other folders with --out and --packages"]


def test_a_folder_with_the_users_own_files_is_left_alone(make, tmp_path, digits):
    mine = tmp_path / "out" / "digits" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("dear to me")
    code, _, errors = make("digits")
    assert code == 2
    assert f"{mine.parent} cannot be written: it holds other files than those of this command" in errors[-1]
    assert mine.read_text() == "dear to me"


def test_the_help_names_all_datasets(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    words = re.findall(r"\w+", capsys.readouterr().out)
    assert set(DATASETS) <= set(words)


def test_what_looks_like_markup_is_printed_as_it_is(make, tmp_path):
    folder = tmp_path / "[red]packages[/]"
    (folder / "klettres-data_1_all.deb").parent.mkdir(parents=True)
    (folder / "klettres-data_1_all.deb").write_text("no package")
    code, _, errors = make("letters", packages=folder)
    assert code == 1
    assert f"{folder}/klettres-data_1_all.deb cannot be unpacked" in errors[-1]
