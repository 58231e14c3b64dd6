import io
import re
from contextlib import redirect_stdout
from dataclasses import MISSING, dataclass, replace

import pytest
import tyro

from polyvit_fast import experiments
from polyvit_fast.cli.flags import find_texts, list_flags
from polyvit_fast.cli.prediction import PredictOptions
from polyvit_fast.config import Train
from polyvit_fast.data import Image


def flags_of_tyro(config: Train, monkeypatch) -> set[str]:
    """All that its own help lists."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"), redirect_stdout(io.StringIO()) as text:
        tyro.cli(Train, default=config, args=["--help"], prog="x")
    lines = re.findall(r"(?m)^[ │|]+(--[a-z][\w.-]*)(?:, (--[a-z][\w.-]*))?", text.getvalue())
    return {flag for line in lines for flag in line if flag} - {"--help"}


@pytest.mark.parametrize("name", ["smoke", "polyvit_b16"])
def test_they_are_those_that_tyro_parses(name, monkeypatch):
    config = experiments.load(name)
    if name == "smoke":
        config = replace(
            config, tasks=config.tasks | {"more_pictures": replace(config.tasks["pictures"], test=config.tasks["pictures"].val)}
        )
    ours = list_flags(config)
    names = {flag.name for flag in ours} | {flag.opposite for flag in ours if flag.is_switch}
    assert len(names) > 150
    assert names == flags_of_tyro(config, monkeypatch)


def test_each_has_the_value_and_the_text_of_its_field():
    config = experiments.load("smoke")
    found = {flag.name: flag for flag in list_flags(config)}
    steps = found["--tasks.clips.steps"]
    assert (steps.path, steps.values, steps.value) == (("tasks", "clips", "steps"), "INT", config.tasks["clips"].steps)
    assert steps.text.startswith("The paper's U_j")
    assert found["--optim.betas"].values == "FLOAT FLOAT"
    assert found["--optim.freeze"].values == "[TEXT ...]"
    assert found["--device"].values == "{auto,cpu,cuda}"
    assert found["--schedule"].values == "NAME"
    assert (found["--resume"].is_switch, found["--resume"].opposite) == (True, "--no-resume")
    assert found["--tasks.clips.head-norm"].opposite == "--tasks.clips.no-head-norm"
    assert not any(not flag.text for flag in found.values())


def test_options_of_a_command():
    found = {flag.name: flag for flag in list_flags(PredictOptions)}
    assert found["FILES"].value is MISSING
    assert (found["--top"].values, found["--top"].value) == ("INT", 5)


@dataclass(frozen=True, kw_only=True)
class Wide(Image):
    """Of a user."""

    width: int | None = None
    """How wide."""


def test_texts_of_inherited_fields_too():
    texts = find_texts(Wide)
    assert texts["width"] == "How wide."
    assert texts["patch"] == find_texts(Image)["patch"] == "Rows and columns of one token."
    assert "Learned tokens" in texts["num_class_tokens"]
    assert "\nSmallest" not in texts["pool"]
