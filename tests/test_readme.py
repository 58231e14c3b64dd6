"""What README.md shows has to work as it stands there."""

import re
from pathlib import Path

import pytest

from polyvit_fast import cli, experiments
from polyvit_fast.train.schedule import SCHEDULES, count_steps, make_step_plan

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def wildlife(tmp_path, monkeypatch) -> str:
    (tmp_path / "wildlife.py").write_text(CODE[0])
    monkeypatch.chdir(tmp_path)
    return "wildlife.py"


def test_the_experiment_loads_and_plans_its_steps(wildlife):
    config = experiments.load(wildlife)
    assert count_steps(make_step_plan(config)) == {"species": 20_000, "behaviour": 30_000, "calls": 10_000}
    assert config.out == "runs/wildlife"


def test_its_schedule_is_drawn_and_its_cost_told(wildlife, capsys):
    assert cli.run(["plan", wildlife]) == 0
    assert "60,000 steps" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["plot", "schedule", wildlife, "--schedule", "uniform", "--tasks.calls.batch", "32", "--out", "runs/second"]) == 0
    assert Path("runs/second/schedule.png").exists()


def test_every_command_and_flag_exists(wildlife, capsys):
    commands = re.findall(r"^polyvit-fast (\w+)", TEXT, re.MULTILINE)
    assert set(commands) <= cli.COMMANDS.keys()
    assert len(commands) >= 5
    with pytest.raises(SystemExit):
        cli.run(["train", wildlife, "--help"])
    help_text = capsys.readouterr().out
    lines = "\n".join(line for line in TEXT.splitlines() if "polyvit_kernels.aot.compile" not in line and "benchmarks/gpu.py" not in line)
    flags = set(re.findall(r"--(?!tasks|checkpoint|benchmark|nproc|rounds|signal)[a-z][a-z.-]+", lines)) - {"--help"}
    assert {flag for flag in flags if flag not in help_text} == set()


def test_the_model_of_another_library_is_fused_as_shown(capsys):
    scope = {}
    exec(CODE[1], scope)
    assert not scope["report"].left
    assert "ViTLayer" in str(scope["report"])
    assert "of allowed" in capsys.readouterr().out


def test_the_parts_are_called_as_shown():
    scope = {}
    exec(CODE[2], scope)
    assert scope["tokens"].shape == (2, 197, 192)
    assert scope["mixed"].shape == (2, 197, 3, 64)


def test_every_schedule_and_file_is_named(wildlife):
    assert all(f"| `{name}`" in TEXT for name in SCHEDULES)
    tree = TEXT[TEXT.index("## The code, a line a file") :]
    rooms = (ROOT / "polyvit_fast", ROOT / "kernels" / "polyvit_kernels", ROOT / "benchmarks")
    files = [path for room in rooms for path in room.rglob("*.py") if path.parent.name not in ("experiments", "ops")]
    files = [path for path in files if not path.name.startswith(("__", "bench_", "conftest"))]
    assert [path.name for path in files if path.name not in tree] == []
    assert [name for name in experiments.names() if name not in tree] == []


def test_every_result_file_that_is_named_is_there():
    named = re.findall(r"benchmarks/results/[\w./-]+\w", TEXT)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
