"""The command as users start it: a process of its own, with real signals and a full disk."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polyvit_fast.experiments.schedules_data.catalogue import PACKAGES
from polyvit_fast.experiments.schedules_data.packages import fetch

COMMAND = [sys.executable, "-m", "polyvit_fast.experiments.schedules_data"]


def start(*arguments, **more):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more)


def files_below(folder: Path):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=lambda value: str(value))
def test_a_signal_during_a_download_leaves_no_part_of_it(tmp_path, apt_get, number, code):
    apt_get('#!/bin/sh\necho part > "$2"_1_all.deb\ntouch {folder}/begun\nexec sleep 60\n')
    out = tmp_path / "out"
    process = start("--out", str(out), "--datasets", "letters")
    wait_for((apt_get.folder / "begun").exists)
    process.send_signal(number)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert (printed, error) == (
        "",
        f"schedules_data: stopped by {number.name}; the same command goes on with the datasets that are not there yet\n",
    )
    assert files_below(out) == ["packages"]


def test_ctrl_c_while_files_are_made_leaves_complete_datasets_alone(tmp_path, make_wheel, write_digits):
    write_digits(tmp_path / "packages", 10_000)
    out = tmp_path / "out"
    process = start("--out", str(out), "--packages", str(tmp_path / "packages"), "--datasets", "digits")
    wait_for((out / ".digits.making" / "train" / "0099.png").exists)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("schedules_data: stopped by SIGINT; ")
    assert "Traceback" not in error
    assert files_below(out) == []


def test_a_full_disk_is_a_sentence(tmp_path, write_digits):
    out, packages = tmp_path / "out", tmp_path / "packages"
    write_digits(packages, 500)
    fetch(PACKAGES["scikit-learn"], packages)  # which needs more than the disk then has
    process = start(
        *("--out", str(out), "--packages", str(packages), "--datasets", "digits"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.splitlines()[-1] == (
        f"schedules_data: {out} cannot be written: File too large; free some space, or choose other folders with --out and --packages"
    )
    assert files_below(out) == []
