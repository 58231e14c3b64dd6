"""What README.md, CONTRIBUTING.md and docs/ show works as it is written there: code, commands, flags, and every file that they name."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision_without_extension import declare_operators

from polyvit_fast import cli, experiments
from polyvit_fast.cli.arguments import load_config
from polyvit_fast.train.schedule import SCHEDULES, count_steps, make_step_plan

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXT = "\n".join(PAGES.values())
FEW_STEPS = ["--tasks.pictures.steps", "2", "--tasks.clips.steps", "2", "--tasks.sounds.steps", "2"]
LONG = {"wildlife.py", "photos.py", "finetune.py", "demo", "schedules", "runs/wildlife"}
"""What commands name that would take too long, or has no files here; `plan` and `plot schedule` need none."""


def find_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page; those of commands name no language."""
    parts = re.split(r"^```(\w*)\n", page, flags=re.MULTILINE)
    return [text for name, text in zip(parts[1::4], parts[2::4], strict=True) if name == language]


def find_experiments() -> dict[str, str]:
    """The experiments of all pages, by the name of the file that the sentence before says."""
    found = re.findall(r"`(\w+\.py)`[^`]*```python\n(.*?)```", TEXT, re.DOTALL)
    return {name: code for name, code in found if "config = Train(" in code}


def find_commands(page: str) -> list[tuple[list[str], int]]:
    """The arguments of polyvit-fast in a page's shell blocks, and the exit code that the comment gives."""
    found = []
    for line in "".join(find_blocks(page, "")).splitlines():
        command, _, comment = line.partition("#")
        words = re.fullmatch(r"(?:polyvit-fast|torchrun \S+ \d+ -m polyvit_fast) (.*)", command.strip())
        code = re.search(r"exit code (\d+)", comment)
        if words:
            found.append((shlex.split(words[1]), int(code[1]) if code else 0))
    return found


def make_pictures(folder: Path, classes: tuple[str, ...]) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((48, 48, 3), 5 * number + index, np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.jpg")


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with every experiment of the pages, and tiny files for those that are trained here; the working directory."""
    for name, code in find_experiments().items():
        (tmp_path / name).write_text(code)
    make_pictures(tmp_path / "photos", tuple(f"species {number}" for number in range(40)))
    make_pictures(tmp_path / "pictures", ("cat", "dog"))
    broken = tmp_path / "pictures" / "train" / "cat" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    for split in ("train", "val"):
        (tmp_path / "heat" / split).mkdir(parents=True)
        for index in range(8):
            np.save(tmp_path / "heat" / split / f"{index % 2}-{index}.npy", np.full((32, 32), index / 8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_code(name: str) -> dict:
    scope: dict = {}
    for number, code in enumerate(find_blocks(PAGES[name], "python")):
        exec(compile(code, f"{name}, block {number}", "exec"), scope)
    return scope


def shorten(words: list[str]) -> list[str]:
    """Flags by which a command of many steps has few."""
    if words[:2] == ["train", "smoke"]:
        left_out = {"pictures", "clips", "sounds"} - set(words) if "--only" in words else ()
        pairs = zip(FEW_STEPS[::2], FEW_STEPS[1::2], strict=True)
        return [word for pair in pairs if pair[0].split(".")[1] not in left_out for word in pair]
    tasks = experiments.load(words[2]).tasks if words[:2] == ["plot", "schedule"] else {}
    return [word for name, task in tasks.items() for word in (f"--tasks.{name}.steps", str(max(1, task.steps // 100)))]


def run_commands(name: str) -> None:
    for words, code in find_commands(PAGES[name]):
        subject = words[2] if words[:2] == ["plot", "schedule"] else words[1]
        if subject not in LONG or words[0] == "plan" or words[:2] == ["plot", "schedule"]:
            assert cli.run(words + shorten(words)) == code, words


@pytest.fixture
def demo(files) -> Path:
    """The run that `make demo` leaves behind, and its files, but few of them and after few steps; the working directory."""
    flags = ["--model.dim", "48", "--model.depth", "2", "--optim.warmup-steps", "0"]
    for name in experiments.load("demo").tasks:
        task = f"--tasks.{name}"
        flags += [f"{task}.steps", "1", f"{task}.train.num-samples", "12", f"{task}.val.num-samples", "6"]
    assert cli.run(["train", "demo", *flags]) == 0
    return files


def test_readme(demo, capsys):
    declare_operators()  # timm imports a torchvision whose extension does not load here
    scope = run_code("README.md")
    text = capsys.readouterr().out
    assert "block" in text.lower()
    assert "0001.jpg" in text
    assert "torch.Size([1, 48])" in text
    assert scope["model"].tasks["motion"].num_classes == 6
    assert experiments.load("photos.py").out == "runs/photos"


def test_inference(demo, capsys):
    run_code("inference.md")
    run_commands("inference.md")
    text = capsys.readouterr().out
    assert "torch.Size([1, 48]) ['demo-files/tones/val/0000.flac']" in text
    assert (demo / "runs" / "demo" / "confusion-shapes.png").exists()
    assert {"classes.csv", "features.npz", "answers.csv"} <= {path.name for path in demo.iterdir()}


def test_export(demo, capsys):
    declare_operators()
    run_code("export.md")
    run_commands("export.md")
    text = capsys.readouterr().out
    assert text.count("differ from the run's by at most") == 7
    assert "nothing was compared" not in text
    assert (demo / "tuned" / "config.json").exists()


SEPARATE = ("README.md", "export.md", "inference.md", "reliability.md", "extending.md", "paper.md", "kernels.md")
"""Pages whose examples show something to look at."""


@pytest.mark.parametrize("name", [name for name in PAGES if name not in SEPARATE])
def test_page(name, files):
    run_code(name)
    run_commands(name)


def test_reliability(files, capsys):
    run_code("reliability.md")
    run_commands("reliability.md")
    assert "cat/0.jpg" in (files / "clean-manifests" / "broken.tsv").read_text()
    assert (files / "runs" / "twice" / "curves.png").exists()
    assert "cat/0.jpg" in (files / "runs" / "pictures" / "log.txt").read_text()


def test_extending(files):
    run_code("extending.md")
    run_commands("extending.md")
    assert (files / "runs" / "heat" / "evaluations.jsonl").exists()


def test_paper(files, capsys):
    run_code("paper.md")
    assert capsys.readouterr().out.split() == ["92,683,471", "177,737,935"]


def test_kernels(files, capsys):
    scope = run_code("kernels.md")
    assert not scope["report"].left
    assert scope["tokens"].shape == (2, 197, 192)
    assert scope["mixed"].shape == (2, 197, 3, 64)
    shown = capsys.readouterr().out
    assert "ViTLayer" in shown
    assert "of allowed" in shown
    assert shown.endswith("197 64 triton\n197 96 triton\n577 64 triton\n577 96 cudnn\n")


def test_every_page_has_an_example():
    without = [name for name, page in PAGES.items() if not find_blocks(page, "python") and not find_commands(page)]
    assert without == ["CONTRIBUTING.md"]


def test_wildlife_trains_each_dataset_as_often_as_it_says(files):
    config = experiments.load("wildlife.py")
    assert count_steps(make_step_plan(config)) == {"species": 20_000, "behaviour": 30_000, "calls": 10_000}


def test_flags_of_commands_are_accepted(files):
    commands = [words for page in PAGES.values() for words, _ in find_commands(page)]
    assert {words[0] for words in commands} >= {"train", "eval", "check", "plan", "plot"}
    for command, name, *flags in (words for words in commands if words[0] in ("train", "plan")):
        if "--help" not in flags:
            load_config(name, flags, command)


def test_flags_in_the_text_exist(files, capsys):
    for command in ("train", "check", "eval", "predict", "features", "probe", "export"):
        with pytest.raises(SystemExit):
            cli.run([command, "wildlife.py", "--help-all"])
    known = set(re.findall(r"--[a-z][a-z.-]+", capsys.readouterr().out)) | {"--help", "--help-all", "--traceback", "--signal"}
    for script in ("conftest.py", "gpu.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "benchmarks" / script).read_text()))
    foreign = r"torchrun|pytest|benchmark|polyvit_kernels\.aot"
    lines = [line for line in TEXT.splitlines() if not re.search(foreign, line)]
    flags = {flag for line in lines for flag in re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", line) if "--tasks" not in flag}
    assert len(flags) > 15
    assert sorted(flags - known) == []


SCRIPTS = [
    *("python benchmarks/gpu.py", "python benchmarks/tune.py", "python benchmarks/install.py"),
    *("python -m polyvit_kernels.aot", "python tests/measure_tree.py"),
]


@pytest.mark.parametrize("shown", SCRIPTS)
def test_flags_of_our_scripts_exist(shown, capsys, monkeypatch):
    commands = re.findall(rf"{re.escape(shown)}[^`#\n]*", TEXT)
    assert commands or "measure" in shown
    name = shown.split()[-1]
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / name), run_name="__main__") if name.endswith(".py") else runpy.run_module(name, run_name="__main__")
    text = capsys.readouterr().out
    assert {flag for line in commands for flag in re.findall(r"--[a-z-]+", line)} - set(re.findall(r"--[a-z-]+", text)) == set()


def test_every_schedule_is_described():
    assert all(f"| `{name}`" in PAGES["schedules.md"] for name in SCHEDULES)


def test_every_target_of_make_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.MULTILINE)) <= targets


def test_every_link_leads_to_a_file():
    folders = {name: ROOT if (ROOT / name).exists() else ROOT / "docs" for name in PAGES}
    links = [(name, link) for name, page in PAGES.items() for link in re.findall(r"\]\(([^)#]+)\)", page) if "://" not in link]
    assert len(links) > 10
    assert [(name, link) for name, link in links if not (folders[name] / link).exists()] == []


def test_every_path_in_the_text_exists():
    named = re.findall(r"`((?:tests|benchmarks|kernels|polyvit_fast|docs)/[\w./-]+)`", TEXT)
    named += [f"benchmarks/results/{name}" for name in re.findall(r"\b(?:cpu-2-cores|nvidia-h100-80gb-hbm3|compiled)/[\w.-]*\w", TEXT)]
    named += re.findall(r"benchmarks/bench_\w+\.py", TEXT)
    assert len(named) > 20
    assert sorted({name for name in named if "NAME" not in name and not (ROOT / name).exists()}) == []


def test_every_result_of_a_table_is_a_file():
    results = {path.name for path in (ROOT / "benchmarks" / "results").rglob("*") if path.is_file()}
    for name in ("README.md", "gpus.md", "cpu.md"):
        files = re.findall(r"`(?:[\w-]+/)*([\w-]+\.(?:jsonl|json|txt))`", PAGES[name])
        assert len(files) >= 3
        assert [file for file in files if file not in results | {"metrics.jsonl"}] == []


def test_the_tree_of_the_readme_names_files_and_folders_that_exist():
    tree = PAGES["README.md"].partition("## The code\n")[2].partition("Five files")[0]
    parts = [
        path.relative_to(ROOT) for room in ("polyvit_fast", "kernels", "benchmarks", "tests", "docs") for path in (ROOT / room).rglob("*")
    ]
    there = {path.name for path in parts} | {"polyvit_fast", "kernels", "benchmarks", "tests", "docs", "polyvit_kernels"}
    named = re.findall(r"(\w+\.py)\b|\b(\w+)/", tree)
    assert len(named) > 25
    assert sorted({file or folder for file, folder in named if (file or folder) not in there}) == []


def test_the_first_pages_stay_short():
    assert PAGES["README.md"].count("\n") <= 150
    assert PAGES["CONTRIBUTING.md"].count("\n") <= 120
