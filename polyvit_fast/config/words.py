"""Types and values in the words of a message."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NewType, TypeVar, Union, get_args, get_origin

SHOWN_CHARACTERS = 80
"""Of a value, in a message."""
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", NoneType: "None", dict: "a dict", tuple: "a tuple"}


def strip(kind: Any) -> Any:
    """A type without what does not say which values fit."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif isinstance(kind, NewType):
            kind = kind.__supertype__
        else:
            return NoneType if kind is None else Any if isinstance(kind, TypeVar) else kind


def describe(kind: Any) -> str:
    """What a field of this type holds, in words: a whole number, text, "sgd" or "adamw"."""
    kind = strip(kind)
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(describe, kinds))
    if origin is Literal:
        *first, last = map(show, kinds)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple and kinds:
        items = [describe(one) for one in kinds if one is not Ellipsis]
        is_endless = kinds[-1] is Ellipsis
        return f"a tuple of {_plural(items[0])}" if is_endless else f"a tuple of {len(items)} {_plural(items[0])}"
    if origin is dict:
        key, item = _example(kinds[0], "name"), _example(kinds[1], "text")
        return f"a dict such as {{{key}: {item}}}"
    if kind is Callable or origin is Callable:
        return "a function"
    if isinstance(origin or kind, type):
        kind = origin or kind
        article = "an" if kind.__name__[:1].lower() in "aeiou" else "a"
        return WORDS.get(kind) or ("a path" if issubclass(kind, PurePath) else f"{article} {kind.__name__}")
    return str(kind)


def _example(kind: Any, text: str) -> str:
    kind = strip(kind)
    return {str: f'"{text}"', int: "1", float: "0.5"}.get(kind) or (
        f"{kind.__name__}(…)" if isinstance(kind, type) and kind is not Any else "…"
    )


def _plural(words: str) -> str:
    article, _, noun = words.partition(" ")
    return f"{noun}s" if article in ("a", "an") else {"text": "texts"}.get(words, words)


class _Brief(reprlib.Repr):
    """Python's own notation, on one line and not too long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxtuple, self.maxlist, self.maxdict = 3, 8, 8, 4
        self.maxstring = self.maxother = SHOWN_CHARACTERS

    def repr_str(self, x: str, level: int) -> str:
        text = super().repr_str(x, level)
        return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text

    def repr_instance(self, x: object, level: int) -> str:
        if isinstance(x, type):
            return f"<class {x.__name__}>"
        if hasattr(type(x), "__dataclass_fields__"):
            return f"{type(x).__name__}(…)"
        try:
            text = " ".join(repr(x).split())
        except Exception:  # of a user's class
            return f"<{type(x).__name__}>"
        return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


_brief = _Brief()


def show(value: object) -> str:
    """A value as Python writes it, shortened, for a message."""
    try:
        text = _brief.repr_instance(value, 3) if isinstance(value, type) else _brief.repr(value)
    except Exception:  # of an integer of ten thousand digits, say
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 2 * SHOWN_CHARACTERS else f"{text[: 2 * SHOWN_CHARACTERS]}…"


SAME = {"gpu": "cuda", "adam": "adamw", "fp16": "bf16"}
"""What users write for another word."""


def find_word(value: object, words: Iterable[Any]) -> str:
    """Which of the words was meant; empty where none is close."""
    texts = {word.lower(): word for word in words if isinstance(word, str)}
    text = value.strip().lower() if isinstance(value, str) else ""
    close = [SAME[text]] if SAME.get(text) in texts else difflib.get_close_matches(text, texts, 1, 0.7)
    return texts[close[0]] if close else ""


def suggest_word(value: object, words: Iterable[Any]) -> str:
    """The same for the end of a message."""
    found = find_word(value, words)
    return f"; perhaps you meant {show(found)}" if found else ""
