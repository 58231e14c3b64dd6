"""The media files of a folder. Linked folders are followed, no file is listed twice, and what is left out is counted."""

from __future__ import annotations

import os
from collections import Counter, deque
from dataclasses import dataclass, field

from polyvit_fast.files import absolute
from polyvit_fast.media import MEDIA_SUFFIXES, PICTURES, SOUNDS, VIDEOS


def _endings(text: str) -> frozenset[str]:
    return frozenset(text.split())


OWN = {"image": PICTURES, "video": VIDEOS, "audio": SOUNDS | (VIDEOS - PICTURES)}
"""Endings of the media that a modality, by its name, decodes; other media next to them are covers, thumbnails or soundtracks."""
NO_MEDIA = (
    _endings("txt md rst rtf pdf doc docx html htm url webloc lnk desktop nfo info log out err description svg svgz")
    | _endings("json jsonl ndjson xml yaml yml toml ini cfg conf csv tsv lst xls xlsx parquet arrow feather db sqlite sqlite3")
    | _endings("srt vtt sub ass ssa lrc cue m3u m3u8 pls textgrid eaf lab cls phn wrd trn ctm rttm stm thm meta gpx kml geojson")
    | _endings("xmp aae pp3 dop on1 ncc pamp vrd dr4 nksc cos cot cop comask pkf sfk asd reapeaks")  # of editors
    | _endings("md5 sha1 sha224 sha256 sha384 sha512 sfv crc par2 asc sig dvc identifier")
    | _endings("npy npz mat pkl pt pth h5 hdf5 safetensors tfrecord py pyc ipynb sh bat exe dll")
    | _endings(
        "zip tar gz tgz bz2 xz zst 7z rar part partial crdownload aria2 ytdl download tmp temp bak swp lock icloud ffs_db ffs_lock ffs_tmp"
    )
)
"""Endings of notes and drawings, tables, subtitles and other sidecars, checksums, arrays, programs, archives and unfinished copies."""
NO_MEDIA_NAMES = (
    _endings("thumbs.db ehthumbs.db ehthumbs_vista.db desktop.ini readme license licence copying notice authors changelog version makefile")
    | _endings("checksums md5sum md5sums sha1sum sha1sums sha256sum sha256sums sha512sum sha512sums")
    | {"icon\r", "thumbs.db:encryptable"}  # of a folder on macOS, and of a copy from Windows
)
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
"""Folders in which operating systems and storage devices keep copies and thumbnails."""


def left_out_as(name: str, modality: str) -> str:
    """The kind under which a file is counted as left out, as its name shows that it is not of this modality; empty: it is a sample.

    A file without an ending, or with an unknown one, is a sample: its content decides.
    """
    low = name.lower()
    if low in NO_MEDIA_NAMES:
        return name.strip()
    if low.endswith("~"):
        return "*~"
    ending = low.rpartition(".")[2] if "." in low else ""
    foreign = ending in MEDIA_SUFFIXES - OWN.get(modality, MEDIA_SUFFIXES)
    return f".{ending}" if ending in NO_MEDIA or foreign else ""


def hidden_as(name: str) -> str:
    """The kind under which a file or folder is counted as hidden or the system's own; empty: it is neither."""
    if name.startswith("."):
        return name if name == ".DS_Store" else "._*" if name.startswith("._") else ".*"
    return f"{name}/" if name.lower() in SYSTEM_FOLDERS else ""


@dataclass
class Listing:
    """The content of a folder."""

    files: list[str] = field(default_factory=list)
    """Paths of the samples: a folder's own in sorted order, then those of each folder in it, and last those behind links to folders."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files and folders were left out because of their names, by kind."""
    again: list[str] = field(default_factory=list)
    """Links to a folder that is already listed or contains the link, and listed folders in linked ones. Their files count once."""


def list_media(folder: str, modality: str, owners: dict[str, str]) -> Listing:
    """The media files in a class folder and below; each real folder once, however many links lead to it.

    `owners` maps the real path of every folder that was listed to its class folder, and is added to. Raises ValueError when something
    cannot be listed, a link leads nowhere, or a folder already belongs to another class.
    """
    listing = Listing()
    waiting, links = [(folder, os.path.realpath(folder))], deque[tuple[str, str]]()
    while waiting or links:
        # Links come last, so that a folder that can be reached without one keeps its name and its position.
        here, real = waiting.pop() if waiting else links.popleft()
        owner = owners.get(real)
        if owner == folder:
            listing.again.append(here)
            continue
        if owner is not None:
            raise ValueError(f"folder {real} belongs to two classes: it is in {owner} and, as {here}, in {folder}")
        owners[real] = folder
        folders = []
        for entry in scan(here, modality, listing.left_out):
            if not entry.is_dir():
                listing.files.append(entry.path)
            elif not entry.is_symlink():
                folders.append((entry.path, os.path.join(real, entry.name)))
            elif leads_back(entry, real):
                listing.again.append(entry.path)
            else:
                links.append((entry.path, os.path.realpath(entry.path)))
        waiting += reversed(folders)
    return listing


def scan(folder: str, modality: str, left_out: Counter[str]) -> list[os.DirEntry[str]]:
    """The folders and samples in a folder, sorted by name; `left_out` counts the rest.

    Raises ValueError that names what cannot be listed, or which link leads nowhere.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                reason = hidden_as(entry.name) or ("" if entry.is_dir() else left_out_as(entry.name, modality))
                if reason:
                    left_out[reason] += 1
                else:
                    _check_link(entry)
                    found.append(entry)
    except OSError as error:
        where = f"folder {absolute(folder)}" if error.filename in (None, folder) else absolute(error.filename)
        raise ValueError(f"{where}: {error.strerror}") from None
    return sorted(found, key=lambda entry: entry.name)


def _check_link(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        try:
            entry.stat()
        except FileNotFoundError:
            raise ValueError(f"link {absolute(entry.path)} leads nowhere: {os.readlink(entry.path)} is missing") from None


def leads_back(entry: os.DirEntry[str], real: str) -> bool:
    """Whether an entry of the folder with this real path is a link to that folder or to one that contains it."""
    target = os.path.realpath(entry.path) if entry.is_symlink() else ""
    return bool(target) and os.path.commonpath((target, real)) == target


def count_names(counts: Counter[str]) -> str:
    """Counts for a message, such as "5 .txt, 2 Thumbs.db", the most frequent first."""
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
