"""What is wrong with an experiment file, and on which line."""

from __future__ import annotations

import ast
import difflib
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from polyvit_fast.config.record import ConfigError, Record, field_types

PACKAGE = Path(__file__).resolve().parents[2]
QUOTED = r"'(\w+)'"
LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def explain(error: BaseException, path: Path) -> str:
    """The line, of the file or a neighbour, and what is wrong there: the end of a sentence that begins with the file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_name_line(Path(error.filename), error.lineno or 1, path)}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(Path(frame.filename), path)]
    reason = _name_reason(error)
    if not frames:
        return f": {reason}"
    return f"{_name_line(Path(frames[-1].filename), _find_line(frames[-1], error, reason), path)}: {reason}"


def _name_line(file: Path, line: int, path: Path) -> str:
    return f", line {line}" if file.resolve() == path.resolve() else f": {file}, line {line}"


def _is_users(file: Path, path: Path) -> bool:
    """Whether a file is the experiment's, or lies in its folder and is neither of this package, of Python nor of an installed library."""
    folders = set(file.resolve().parents)
    is_neighbour = path.resolve().parent in folders and not {PACKAGE, *LIBRARIES} & folders
    return file == path.absolute() or (is_neighbour and file.is_file())


def _name_reason(error: BaseException) -> str:
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, ValueError) and PACKAGE in last.resolve().parents:
        return str(error)  # in our words
    if isinstance(error, TypeError) and (reason := _explain_call(str(error))):
        return reason
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"the file ends the program (SystemExit{f': {text}' if text else ''}), and must only define config"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _explain_call(text: str) -> str:
    """What Python's message about the arguments of a record means; empty for a message about something else."""
    called = re.match(r"(?:([\w.<>]+)\.__init__\(\) |Can't instantiate abstract class (\w+))", text)
    record = called and _find_record(called[1] or called[2])
    if not called or record is None:
        return ""
    name = record.__name__
    if called[2]:
        return f"{name} stands for several classes: {record.suggest(None)}" if record.__module__.startswith(PACKAGE.name) else ""
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", text):
        return f"{name} has no field {unknown[1]}{_suggest_field(record, unknown[1])}"
    if "required" in text:
        return f"{name} lacks {' and '.join(re.findall(QUOTED, text))}"
    return f"{name} takes its values by name: write {name}({next(iter(field_types(record)), 'field')}=…, …)"


def _find_record(name: str) -> type[Record] | None:
    return next((record for record in _list_records(Record) if record.__qualname__ == name), None)


def _list_records(base: type[Record]) -> Iterator[type[Record]]:
    for record in base.__subclasses__():
        yield record
        yield from _list_records(record)


def _suggest_field(record: type[Record], unknown: str) -> str:
    """Where a field with this name is, or one that may be meant."""
    for name, kind in field_types(record).items():
        if isinstance(kind, type) and issubclass(kind, Record) and unknown in field_types(kind):
            return f"; it is one of {kind.__name__}: write {name}={kind.__name__}({unknown}=…)"
    names = list(field_types(record))
    close = difflib.get_close_matches(unknown, names, 1)
    return f"; perhaps you meant {close[0]}" if close else f"; it has {', '.join(names)}"


def _find_line(frame: traceback.FrameSummary, error: BaseException, reason: str) -> int:
    """The line of the field that is wrong, as far as the call that failed names it; else the line on which the call begins."""
    line = frame.lineno or 1
    words = re.findall(r"[A-Za-z]\w*", reason.replace("-", "_"))
    named = [error.field] if isinstance(error, ConfigError) else [words[4]] if re.match(r"\w+ has no field ", reason) else words[:1]
    call = _find_call(frame)
    if call is None:
        return line
    inner = [node for node in ast.walk(call) if isinstance(node, ast.keyword)]
    lines = {keyword.arg: keyword.lineno for keyword in (*reversed(inner), *call.keywords)}
    direct = [keyword.arg for keyword in call.keywords]
    return next((lines[word] for word in (*named, *(word for word in words if word in direct)) if word in lines), line)


def _find_call(frame: traceback.FrameSummary) -> ast.Call | None:
    """The call in which an error arose, as it stands in its file."""
    try:
        tree = ast.parse(Path(frame.filename).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    begin, end = (frame.lineno, frame.colno), (frame.end_lineno, frame.end_colno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (node.lineno, node.col_offset) == begin and (node.end_lineno, node.end_col_offset) == end:
            return node
    return None
