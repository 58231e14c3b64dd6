"""The flags of a record, as tyro parses them: `list_flags`. What --help prints and what a mistyped flag is compared with."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from polyvit_fast.config.record import field_types

WORDS = {int: "INT", float: "FLOAT", str: "TEXT"}


@dataclass(frozen=True)
class Flag:
    """One flag."""

    path: tuple[str, ...]
    """The names of the fields that lead to its own."""
    name: str
    """As in --optim.lr."""
    values: str
    """What stands after it."""
    value: Any
    """That it has without the flag; MISSING where it must be given."""
    text: str
    """Of its field."""
    owner: type
    """The record with its field."""

    @property
    def is_switch(self) -> bool:
        """Whether nothing stands after it, and --no-… is its opposite."""
        return not self.values

    @property
    def opposite(self) -> str:
        """The flag that switches it off."""
        first, dot, last = self.name.removeprefix("--").rpartition(".")
        return f"--{first}{dot}no-{last}"


def list_flags(record: Any, prefix: tuple[str, ...] = (), path: tuple[str, ...] = ()) -> list[Flag]:
    """The flags of a record, or of a dataclass with its defaults: its own first, then those of the records in it."""
    kind = record if isinstance(record, type) else type(record)
    own: list[Flag] = []
    further: list[Flag] = []
    hints, texts = _find_hints(kind), find_texts(kind)
    for field in fields(kind):
        value = _find_default(field) if isinstance(record, type) else getattr(record, field.name)
        hint = hints.get(field.name, Any)
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        names = prefix if tyro.conf.OmitArgPrefixes in marks else (*prefix, field.name)
        parts = {(): value} if is_dataclass(value) else {(str(key),): one for key, one in value.items()} if _holds_records(value) else {}
        for key, part in parts.items():
            further += list_flags(part, (*names, *key), (*path, field.name, *key))
        settings = next((mark for mark in marks if hasattr(mark, "metavar")), None)
        values = settings.metavar if settings and settings.metavar else _describe_values(hint, value)
        if parts or values is None:
            continue
        name = values if tyro.conf.Positional in marks else "--" + ".".join(names).replace("_", "-")
        own.append(Flag((*path, field.name), name, values, value, texts.get(field.name, ""), kind))
    return own + further


def _find_default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _holds_records(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(is_dataclass, value.values()))


def _describe_values(hint: Any, value: Any) -> str | None:
    """What stands after a flag of this type; empty after a switch; None where the type has no flag."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    origin, kinds = get_origin(hint), get_args(hint)
    if hint is bool:
        return ""
    if origin is Literal:
        return "{" + ",".join(map(str, kinds)) + "}"
    if origin is tuple and kinds:
        one = _describe_values(kinds[0], None)
        return f"[{one} ...]" if kinds[-1] is Ellipsis else " ".join(_describe_values(kind, None) or "" for kind in kinds)
    if origin in (Union, UnionType):
        found = [_describe_values(kind, None) for kind in kinds if kind is not NoneType]
        return "|".join(filter(None, found)) or None
    if is_dataclass(hint) or inspect.isabstract(hint):
        return None
    return WORDS.get(hint) or (hint.__name__.upper() if isinstance(hint, type) and hint is not NoneType else None)


@cache
def _find_hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind, include_extras=True)
    except Exception:  # a user's annotations may name what only a type checker sees
        return field_types(kind)


@cache
def find_texts(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a class and of those that it inherits from."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError, IndexError):
            continue
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for line, after in pairwise(lines):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_text(after):
                texts[line.target.id] = inspect.cleandoc(after.value.value)  # pyright: ignore[reportAttributeAccessIssue]
    return texts


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
