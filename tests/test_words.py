"""Words that the code, the tests and the documents no longer use, because the field has a word of its own for each.

The words of this project are in CONTRIBUTING.md; CHANGELOG.md is history, and keeps the words of its time.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHERE = ("polyvit_fast", "kernels", "benchmarks", "tests", "docs", "README.md", "CONTRIBUTING.md", "Makefile")

INSTEAD = {
    "taint": "found_inf; an update is skipped",
    "lanes?": "candidate, column",
    "crews?": "candidates, runners",
    "lab": "runner",
    "trials?": "candidate, run",
    "contests?": "benchmark, comparison",
    "twins?": "ported model, counterpart",
    "told": "said, logged, reported",
    "agrees?": "equals, matches; all_reduce_max among processes",
    "from_first": "broadcast",
    "first_first": "rank0_first",
    "reachable": "translate_errors, or a plain sentence",
    "joined": "concatenated; process_group",
    "(?<!model )cards?": "GPU",
    "processors": "SMs of a GPU, cores of a CPU",
    "layer_norm_beside": "layer_norm_residual",
    "beside": "next to, with, besides",
    "(?-i:PARTS)": "EPILOGUE_SUBTILES",
    "(?<!mu-)laws?": "distribution, rule",
    "(?<!standard )deviations?": "standard deviation; difference",
    "chances?": "probability",
    "pieces?": "chunk, part",
    "(?<!in )places?": "position, index, file",
    "slots?(?!=True)": "index, buffer, view",
    "shares?": "fraction, ratio, part; tasks have a tokenizer in common",
    "yardsticks?": "baseline",
    "(?<!data )races?": "data race in the GPU's memory; else benchmark, comparison",
}
"""Patterns for whole words, and what to write."""

EXCEPTIONS: list[tuple[str, str, str]] = [
    ("lab", "polyvit_fast/data/sources/listing.py", "the ending of a file's name"),
    ("lab", "tests/data/image_kinds.py", "a colour space"),
]
"""(word, file, why it is right there)."""


RECORDED = ("benchmarks/results/", "tests/files/run_folders/")
"""Folders of what was measured, and of what earlier versions wrote."""


def list_files() -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *WHERE]
    names = sorted(set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()))
    return [name for name in names if not name.startswith(RECORDED) and name != "tests/test_words.py" and (ROOT / name).is_file()]


def find_words() -> list[tuple[str, str, int, str]]:
    """(word, file, line, what to write) of every old word."""
    patterns = [(re.compile(rf"\b{pattern}\b", re.IGNORECASE), instead) for pattern, instead in INSTEAD.items()]
    any_word = re.compile("|".join(rf"\b{pattern.replace('(?-i:', '(')}\b" for pattern in INSTEAD), re.IGNORECASE)
    found = []
    for name in list_files():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:  # weights and pictures
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if any_word.search(line):
                found += [(m[0].lower(), name, number, instead) for pattern, instead in patterns for m in pattern.finditer(line)]
    return found


def test_old_words_are_gone():
    excepted = {(word, name) for word, name, _ in EXCEPTIONS}
    left = [f"{name}:{line}: {word} -> {instead}" for word, name, line, instead in find_words() if (word, name) not in excepted]
    assert not left, "\n" + "\n".join(left)


def test_every_exception_is_used():
    used = {(word, name) for word, name, _, _ in find_words()}
    assert not {(word, name) for word, name, _ in EXCEPTIONS} - used
