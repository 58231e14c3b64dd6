import sys
from dataclasses import replace

import pytest

from polyvit_fast import experiments
from polyvit_fast.experiments.loading.run_file import run_file

EXPERIMENT = '''"""Mine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polyvit_fast.config import Task, Train
from polyvit_fast.data import Folder, Image, Synthetic


@dataclass(frozen=True, kw_only=True)
class Small(Image):
    size: int = 32
    notes: tuple[str, ...] = ()


HERE = Path(__file__).parent
config = Train(tasks={"a": Task(modality=Small(notes=["x"]), train=Folder(path=HERE / "photos"), val=Synthetic(), num_classes=2, steps=3)})
'''


@pytest.mark.usefixtures("unchecked_types")
def test_a_file_is_run_with_its_name_its_path_and_its_classes(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    config = experiments.load("mine.py")
    assert config.out == "runs/mine"
    assert config.tasks["a"].train.path == f"{tmp_path}/photos"
    modality = config.tasks["a"].modality
    assert modality.notes == ("x",)
    assert type(modality).__module__ == "polyvit_experiment_mine"
    assert sys.modules["polyvit_experiment_mine"].Small is type(modality)
    with pytest.raises(ValueError, match="notes = 3 must be a tuple of texts"):
        replace(modality, notes=3)


def test_an_edit_in_the_same_second_counts(tmp_path):
    path = tmp_path / "mine.py"
    for number in (1, 2, 3):
        path.write_text(f"number = {number}\n")
        assert run_file(path).number == number
    assert not (tmp_path / "__pycache__").exists()


def test_the_encoding_is_python_s(tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes("# coding: latin-1\nname = 'café'\n".encode("latin-1"))
    assert run_file(path).name == "café"
    path.write_bytes("name = 'café'\r\n".encode("utf-8-sig"))
    assert run_file(path).name == "café"


def test_a_file_that_may_not_be_read(tmp_path):
    with pytest.raises(ValueError, match=rf"experiment file {tmp_path}/mine.py: No such file or directory"):
        run_file(tmp_path / "mine.py")


def test_ctrl_c_is_no_fault_of_the_file(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        run_file(tmp_path / "mine.py")
