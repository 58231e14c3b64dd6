"""The lines of a table, CSV or TSV, with a path and a label in each."""

from __future__ import annotations

import codecs
import csv
import os
import re
import stat
from collections.abc import Iterator
from typing import TextIO

from polyvit_fast.files import absolute

LABEL_COLUMNS = ("label", "labels")
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""By the byte-order mark that a file begins with. UTF-32 comes first, as its mark begins with that of UTF-16."""
NO_TEXT = (
    (b"\x1f\x8b", "it is compressed (gzip); unpack it"),
    (b"BZh91AY&", "it is compressed (bzip2); unpack it"),
    (b"\xfd7zXZ\0", "it is compressed (xz); unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed (Zstandard); unpack it"),
    (b"PK\x03\x04", "it is a spreadsheet (.xlsx, .ods) or a ZIP archive; save it as text, a table as CSV"),
    (b"\xd0\xcf\x11\xe0", "it is a spreadsheet (.xls); save it as text, a table as CSV"),
    (b"PAR1\x15", "it is a Parquet file; save it as text, a table as CSV"),
)
"""(first bytes of a file, what it is and what to do)."""


def read_rows(path: str) -> Iterator[tuple[int, str, str]]:
    """(line, path, label cell) of every line of a table, except empty ones and the first, which names the columns.

    A row that spans several lines, inside quotes, counts as its first line. Raises ValueError that names file and line.
    """
    with open_text(path, "manifest") as file:
        texts: list[str] = []
        separator = _separator(path)
        rows = csv.reader(_remember(file, texts), delimiter=separator, strict=True)
        line = 1
        try:
            header = next(rows, [])
            columns = _find_columns([name.strip().lower() for name in header], path, _suspect("".join(texts), separator))
            line = rows.line_num + 1
            texts.clear()
            for row in rows:
                if row:
                    yield line, *_pick(row, columns, len(header), f"{path}, line {line}")
                line = rows.line_num + 1
                texts.clear()
        except csv.Error as error:
            fault = f"line {rows.line_num}: {error}"
            if rows.line_num > line or "unexpected end" in str(error):
                fault = f"line {line + _open_quote(texts)}: a double quote is opened there and not closed where its cell ends ({fault})"
            raise ValueError(f"{path}, {fault}{_suspect(''.join(texts), separator) if line == 1 else ''}") from None
        except UnicodeError as error:
            raise ValueError(f"{path}, line {rows.line_num + 1}: it is not text in the encoding of its first bytes ({error})") from None
        except OSError as error:
            raise ValueError(f"manifest {absolute(path)}: {error.strerror}") from None


def renamed_columns(path: str) -> list[str]:
    """Columns that pandas renamed because another one has the same name, such as label.1 next to label."""
    with open_text(path, "manifest") as file:
        header = next(csv.reader(file, delimiter=_separator(path)), [])
    return [name for name in header if re.fullmatch(r"(path|labels?)\.[0-9]+", name.strip().lower())]


def _separator(path: str) -> str:
    return "\t" if path.lower().endswith(".tsv") else ","


def _suspect(header: str, separator: str) -> str:
    """For a message: which other separator the columns seem to have; empty when it would not give the right column names."""
    for other, word in SEPARATORS.items():
        names = [name.strip().strip('"').lower() for name in header.split(other)]
        if other != separator and "path" in names and any(name in names for name in LABEL_COLUMNS):
            remedy = {",": "give it a name that ends in .csv", "\t": "give it a name that ends in .tsv"}.get(other, "save it with commas")
            return f"; its columns seem to be separated by {word}: {remedy}"
    return ""


def _remember(file: TextIO, texts: list[str]) -> Iterator[str]:
    for text in file:
        texts.append(text)
        yield text


def _open_quote(texts: list[str]) -> int:
    """The line, counted from 0, on which the quote opens that the last line fails to close."""
    count = opened = 0
    for number, text in enumerate(texts[:-1]):
        quotes = text.count('"')
        if quotes > count % 2:  # odd ones open, even ones close or are the second of a doubled quote
            opened = number
        count += quotes
    return opened if count % 2 else len(texts) - 1


def open_text(path: str, what: str) -> TextIO:
    """Open a text file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. Raises ValueError that begins with `what`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{what} {absolute(path)}: {'Is a directory' if os.path.isdir(path) else 'not a regular file'}")
        with open(path, "rb") as file:
            start = file.read(8)
        fault = next((fault for mark, fault in NO_TEXT if start.startswith(mark)), "")
        if fault:
            raise ValueError(f"{what} {path}: {fault}")
        encoding = next((name for mark, name in ENCODINGS if start.startswith(mark)), "utf-8-sig")
        # File names need not be UTF-8, so neither need what lists them.
        return open(path, newline="", encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict")
    except OSError as error:
        raise ValueError(f"{what} {absolute(path)}: {error.strerror}") from None


def _find_columns(header: list[str], path: str, hint: str) -> tuple[int, int]:
    if any("\0" in name for name in header):
        raise ValueError(f"{path}, line 1: it holds NUL characters, as UTF-16 without a byte-order mark does; save the table as UTF-8")
    labels = [name for name in LABEL_COLUMNS if name in header]
    if "path" not in header or len(labels) != 1:
        named = ", ".join(header) or "none"
        raise ValueError(f"{path}, line 1: the columns must be named, among them path and either label or labels; it names {named}{hint}")
    twice = next((name for name in ("path", *labels) if header.count(name) > 1), None)
    if twice:
        raise ValueError(f"{path}, line 1: {header.count(twice)} columns are named {twice}; rename those that are not meant")
    return header.index("path"), header.index(labels[0])


def _pick(row: list[str], columns: tuple[int, int], width: int, where: str) -> tuple[str, str]:
    if len(row) != width:
        fault = "too few" if len(row) < width else "too many; put a path that holds the separator in double quotes"
        raise ValueError(f"{where}: {len(row)} columns where the first line names {width}: {fault}")
    path, cell = row[columns[0]], row[columns[1]].strip()
    if not path or "\0" in path:
        raise ValueError(f"{where}: the path {path!r} is empty or holds a NUL character")
    return path, cell
