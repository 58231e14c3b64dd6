"""What works without the packages of the extras, and what is said where they are needed."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from polyvit_fast.extras import DECODING, EXTRAS, MissingExtraError, require

ROOT = Path(__file__).parent.parent
HIDE = """
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def __init__(self, others):
        self.others = others

    def find_spec(self, name, path=None, target=None):
        if any(name == hidden or name.startswith(hidden + ".") for hidden in {hidden!r}):
            return None
        return next(filter(None, (other.find_spec(name, path, target) for other in self.others)), None)

    def find_distributions(self, *arguments):
        for other in self.others:
            yield from getattr(other, "find_distributions", lambda *_: ())(*arguments)

sys.meta_path[:] = [Hidden(sys.meta_path[:])]
"""


def run(code, hidden=tuple(EXTRAS), folder=ROOT):
    """The code in a new process that finds none of the `hidden` modules."""
    path = f"sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
    return subprocess.run([sys.executable, "-c", HIDE.format(hidden=hidden) + path + code], cwd=folder, capture_output=True, text=True)


COMMANDS = """
import io, json
from contextlib import redirect_stderr, redirect_stdout
from polyvit_fast.__main__ import main
for arguments in {commands!r}:
    sys.argv[1:] = arguments
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code or 0, out.getvalue(), err.getvalue()]))
"""


def run_commands(commands, hidden=tuple(EXTRAS), folder=ROOT):
    """(exit code, output, errors) of each command, all in one process."""
    done = run(COMMANDS.format(commands=commands), hidden, folder)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


WITHOUT_EXTRAS = {
    "fuse": """
import torch
from polyvit_fast import fuse
layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
assert fuse(layer, verify=torch.randn(2, 5, 32)).replaced
""",
    "operations": """
import torch
import polyvit_kernels
from polyvit_kernels import attention, flops, mlp, reference
qkv = torch.randn(2, 5, 3, 2, 16)
torch.testing.assert_close(attention(qkv), reference.attention(qkv))
assert mlp(torch.randn(2, 8), torch.randn(6, 8), torch.zeros(6), torch.randn(8, 6), torch.zeros(8), "quick").shape == (2, 8)
""",
    "polyvit": """
import torch
from polyvit_fast import Block, PolyViT, experiments
from polyvit_fast.config import MODELS
config = experiments.load("smoke")
model = PolyViT.from_config(config).eval()
name, task = next(iter(config.tasks.items()))
assert model(torch.zeros(2, *task.modality.grid, dtype=torch.uint8), name).shape == (2, task.num_classes)
""",
    "run folder": "import polyvit_fast.train.run_folder.record, polyvit_fast.train.run_folder.checkpoint, polyvit_fast.train.evaluate",
    "the kernels' compiler": "from polyvit_kernels.aot import main",
}


def test_what_the_base_does():
    done = run("\n".join(WITHOUT_EXTRAS.values()))
    assert not done.returncode, done.stderr


@pytest.mark.long
def test_commands_of_the_base(tmp_path):
    commands = [["--help"], ["list"], ["--version"], ["train", "smoke", "--help"], ["plan", "smoke"]]
    for command, (code, output, errors) in zip(commands, run_commands(commands, folder=tmp_path), strict=True):
        assert code == 0, (command, errors)
        assert output, command


TRAIN, DATA = "pip install 'polyvit-fast[train]'", "pip install 'polyvit-fast[data]'"
MISSED = {
    tuple(EXTRAS): {
        "train smoke": f"training needs matplotlib, tensorboard and torchmetrics, which are not installed: {TRAIN}",
        "plot schedule smoke": f"drawing needs matplotlib, which is not installed: {TRAIN}",
    },
    ("torchmetrics", *DECODING): {
        "train smoke": f"training needs torchmetrics, which is not installed: {TRAIN}",
        "check demo": f"checking files needs nvidia-dali-cuda130, av and pillow, which are not installed: {DATA}",
    },
    ("nvidia.dali", "av"): {"train demo": f"making the demo's files needs av, which is not installed: {DATA}"},
}


FIRST, *OTHERS = MISSED


@pytest.mark.parametrize(
    "hidden",
    [FIRST, *(pytest.param(hidden, marks=pytest.mark.long) for hidden in OTHERS)],
    ids=["nothing", "without torchmetrics and data", "without decoders"],
)
def test_commands_say_in_one_sentence_what_they_miss(hidden, tmp_path):
    commands = [command.split() for command in MISSED[hidden]]
    done = run_commands(commands, hidden, tmp_path)
    for (command, message), (code, _, errors) in zip(MISSED[hidden].items(), done, strict=True):
        assert code == 2, (command, errors)
        assert message in errors
        assert "Traceback" not in errors


@pytest.mark.long
def test_a_decoder_says_what_it_misses():
    done = run(
        "from polyvit_fast.data import Image, build_decoder\nbuild_decoder(Image(size=32), batch=2, train=False, num_threads=1)", DECODING
    )
    assert done.stderr.strip().endswith(
        f"MissingExtraError: decoding files needs nvidia-dali-cuda130, av and pillow, which are not installed: {DATA}"
    )


@pytest.mark.long
def test_an_evaluation_says_what_it_misses():
    done = run(
        "from polyvit_fast import experiments\nfrom polyvit_fast.train.metrics import Metrics\n"
        "Metrics(next(iter(experiments.load('smoke').tasks.values())))"
    )
    assert done.stderr.strip().endswith(
        "MissingExtraError: evaluating needs torchmetrics, which is not installed: pip install 'polyvit-fast[train]'"
    )


def test_what_is_installed_is_not_missed():
    require("everything", *EXTRAS)


def test_extras_of_the_package_are_those_of_the_messages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = project["optional-dependencies"]
    for package, extra in EXTRAS.values():
        assert any(line.startswith(f"{package}>=") for line in brought[extra]), (package, extra)
        assert not any(line.startswith(f"{package}>=") for line in project["dependencies"]), package
    assert "polyvit-fast[data]" in brought["train"]
    assert brought["all"] == [f"polyvit-fast[{','.join(dict.fromkeys(extra for _, extra in EXTRAS.values() if extra != 'data'))}]"]


def test_a_missing_extra_is_no_fault_of_a_file():
    assert issubclass(MissingExtraError, ImportError)
    assert issubclass(MissingExtraError, ValueError)
