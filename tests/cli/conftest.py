"""A tiny run on real files, which several commands are tested on."""

from dataclasses import replace
from pathlib import Path

import pytest

import polyvit_fast as pf
from polyvit_fast import experiments
from polyvit_fast.config.model import Model
from polyvit_fast.experiments.demo import CLIP


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of the run; its tasks have 9 validation files each in files/TASK/val, and shapes has test files."""
    home = tmp_path_factory.mktemp("trained")
    demo, tasks = experiments.load("demo"), {}
    for name in ("shapes", "motion", "chords"):
        task = demo.tasks[name]
        train, val = (
            replace(getattr(task, split), num_samples=count, root=str(home / "files")) for split, count in (("train", 18), ("val", 9))
        )
        tasks[name] = replace(task, train=train, val=val, steps=2, batch=6)
    tasks["shapes"] = replace(tasks["shapes"], test=replace(tasks["shapes"].val, num_samples=6))
    tasks["motion"] = replace(tasks["motion"], modality=replace(CLIP, frames=4, tubelet_frames=2))
    config = replace(demo, tasks=tasks, model=Model(dim=32, depth=2, num_heads=2, mlp_dim=64), out="", device="cpu")
    pf.train(config, out=home / "run")
    return home / "run"


@pytest.fixture
def mixed(trained, tmp_path) -> Path:
    """A folder with pictures, a clip, a sound, three broken files and a note."""
    files, folder = trained.parent / "files", tmp_path / "mixed"
    (folder / "deeper").mkdir(parents=True)
    for source, target in (
        ("shapes/val/0001.jpg", "a.jpg"),
        ("shapes/val/0002.jpg", "deeper/b.jpg"),
        ("motion/val/0003.mp4", "c.mp4"),
        ("chords/val/0004.wav", "d.wav"),
    ):
        (folder / target).write_bytes((files / source).read_bytes())
    (folder / "text.jpg").write_text("no picture at all")
    (folder / "empty.wav").touch()
    (folder / "cut.mp4").write_bytes((files / "motion/val/0003.mp4").read_bytes()[:900])
    (folder / "notes.txt").write_text("what it is")
    return folder
