import ast
import json
import math
from pathlib import Path

import pytest

from polyvit_fast.strict_json import dumps

ROOT = Path(__file__).parent.parent


def refuse(word):
    raise ValueError(f"{word} is no JSON")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_wherever_it_stands(number):
    value = {"a": number, "b": [1.5, (number, {"c": number, "d": "NaN"})], "e": 3, "f": True, "g": None}
    expected = {"a": None, "b": [1.5, [None, {"c": None, "d": "NaN"}]], "e": 3, "f": True, "g": None}
    for indent in (None, 2):
        assert json.loads(dumps(value, indent), parse_constant=refuse) == expected


def test_all_else_is_what_the_library_writes():
    value = {"a": [1, 2.5, "ü", None, True, 1e300], "b": {}}
    assert dumps(value) == json.dumps(value)
    assert dumps(value, 1) == json.dumps(value, indent=1)


def calls_of_json(path: Path) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in ("json.dump", "json.dumps")]


@pytest.mark.parametrize("room", ["polyvit_fast", "kernels", "benchmarks"])
def test_nobody_writes_json_that_might_hold_nan(room):
    for path in (ROOT / room).rglob("*.py"):
        for call in calls_of_json(path):
            strict = any(word.arg == "allow_nan" and ast.unparse(word.value) == "False" for word in call.keywords)
            assert strict, f"{path}, line {call.lineno}: strict_json.dumps, or allow_nan=False where no number can be NaN"
