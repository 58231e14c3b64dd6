"""The labels in a shard's members: class numbers or class names; values that could be mistaken for either are refused."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

MAX_BYTES = 1 << 20
NUMBER = re.compile(r"[0-9]{1,18}")
PRINTED = (
    re.compile(r"None|True|False|null|true|false|NaT|<NA>"),
    re.compile(r"""[bBrRuU]{0,2}(['"]).*\1"""),
    re.compile(r"(\w+\.)?(tensor|array|Array|Tensor|bytes|bytearray|u?int\d*|float\d*|str_?|bool_?)\(.*\)"),
    re.compile(r"""[\[({]\s*([bu]?['"]|(\w+\.)?tensor\().*[\])}]"""),
)
"""Values as programs print them: None and booleans, quoted text or bytes, typed numbers and tensors, and lists of them."""

Labels = tuple[int | str, ...]


def parse_labels(content: bytes, kind: str) -> Labels | None:
    """The classes in a .cls or .json member; None for JSON without any. Raises ValueError with only the reason."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes are too many for a label")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    return (_parse_class(text.strip(" \t\r\n")),) if kind == "cls" else _parse_json(text)


def _parse_class(text: str) -> int | str:
    if NUMBER.fullmatch(text):
        return int(text)
    if re.fullmatch("[0-9]+", text):
        raise ValueError(f"it has {len(text)} digits, too many for a class number")
    if not is_name(text):
        raise ValueError(f"{text[:40]!r} is not a class number (digits 0 to 9 alone) or a class name")
    return unicodedata.normalize("NFC", text)


def is_name(text: str) -> bool:
    """Whether a text is the name of a class: one line with a letter or a pictograph that is neither a number nor a printed value.

    Printed values are texts like tensor(1), b'1' and None. The texts 3d_model, 1a and none are names.
    """
    if not any(unicodedata.category(character)[0] == "L" or unicodedata.category(character) == "So" for character in text):
        return False
    if text != text.strip() or any(unicodedata.category(character) == "Cc" for character in text):
        return False
    return not _is_numeric(text) and not any(printed.fullmatch(text) for printed in PRINTED)


def _is_numeric(text: str) -> bool:
    for read in (float, lambda text: int(text, 0)):
        try:
            read(text)
            return True
        except ValueError:
            pass
    return False


def _parse_json(text: str) -> Labels | None:
    try:
        content = json.loads(text, parse_int=_whole_number, object_pairs_hook=_members)
    except _TwiceError:
        raise
    except (ValueError, RecursionError):
        raise ValueError(f"{text[:40]!r} is not JSON") from None
    if isinstance(content, dict):
        found = {name: content[name] for name in ("labels", "label") if content.get(name) is not None}
        if not found:
            return None
        content, *others = found.values()
        if any(_as_list(other) != _as_list(content) for other in others):
            raise ValueError(f'"label" is {_brief(found["label"])} but "labels" is {_brief(found["labels"])}')
    labels = _as_list(content)
    for label in labels:
        if isinstance(label, str) and NUMBER.fullmatch(label.strip()):
            raise ValueError(f"{_brief(label)} is not a class number but a text; write it without quotes")
        if type(label) is not int and not (isinstance(label, str) and is_name(label)):
            raise ValueError(f"{_brief(content)} is not a class number or name, or a list of them")
    return tuple(unicodedata.normalize("NFC", label) if isinstance(label, str) else label for label in labels)


class _TwiceError(ValueError):
    """A JSON object has two members with labels of the same name."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name in ("label", "labels"):
        if sum(other == name for other, _ in pairs) > 1:
            raise _TwiceError(f'"{name}" appears twice in it')
    return dict(pairs)


def _whole_number(digits: str) -> int | str:
    """An integer; where it is too long or is -0, a text, which is then refused as a label."""
    return int(digits) if len(digits) < 20 and digits != "-0" else digits


def _as_list(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def _brief(content: Any) -> str:
    text = repr(content)
    return text if len(text) <= 60 else f"{text[:57]}..."
