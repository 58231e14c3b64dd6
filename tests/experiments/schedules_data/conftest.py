"""Small packages, and clients that find them without a network."""

import gzip
import os
import shutil
import subprocess
import zipfile

import numpy as np
import pytest

APT_GET = """#!/bin/sh
# apt-get download NAME: from a folder of packages; else with the words and the exit code of Debian's.
echo "$@" >> {folder}/calls
cp {folder}/"$2"_*.deb . 2>/dev/null && exit
echo "E: Unable to locate package $2" >&2
exit 100
"""


@pytest.fixture
def make_wheel():
    """Write a wheel of (path in it, content)."""

    def make(folder, name, version, files):
        folder.mkdir(parents=True, exist_ok=True)
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        metadata = {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }
        path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in (files | metadata).items():
                archive.writestr(member, content)
        return path

    return make


@pytest.fixture
def write_digits(make_wheel):
    """Write a wheel of scikit-learn with a table of so many digits and nothing else."""

    def write(folder, count, version="1.9.1"):
        rows = np.concatenate([np.random.default_rng(0).integers(0, 17, (count, 64)), np.arange(count)[:, None] % 10], 1)
        table = "".join(",".join(map(str, row)) + "\n" for row in rows.tolist())
        files = {"sklearn/datasets/data/digits.csv.gz": gzip.compress(table.encode(), 1)}
        return make_wheel(folder, "scikit-learn", version, files)

    return write


@pytest.fixture
def make_deb(tmp_path_factory):
    """Write a Debian package of (path in it, content)."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb, which the command needs too, is not on this machine")

    def make(folder, name, version, files):
        folder.mkdir(parents=True, exist_ok=True)
        root = tmp_path_factory.mktemp(name)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A Test <test@example.org>\nDescription: small\n"
        for member, content in ({"DEBIAN/control": control.encode()} | files).items():
            (root / member).parent.mkdir(parents=True, exist_ok=True)
            (root / member).write_bytes(content)
        root.chmod(0o755)
        path = folder / f"{name}_{version}_all.deb"
        subprocess.run(["dpkg-deb", "-Znone", "--root-owner-group", "--build", root, path], check=True, stdout=subprocess.DEVNULL)
        return path

    return make


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """A folder whose .deb files apt-get downloads; or use `apt_get(script)` to say what it does instead. `calls` in it lists its calls."""
    folder, programs = tmp_path / "mirror", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()

    def install(script=APT_GET):
        (programs / "apt-get").write_text(script.format(folder=folder))
        (programs / "apt-get").chmod(0o755)
        return folder

    install()
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), os.environ["PATH"]]))
    install.folder = folder
    return install


@pytest.fixture
def pip_finds(tmp_path, monkeypatch):
    """A folder in which pip looks for wheels, and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return folder
