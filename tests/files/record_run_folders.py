"""What a version leaves behind: two runs that it trains, stopped half way, written to run_folders/VERSION next to this file.

    git worktree add --detach ../0.7.0 COMMIT
    python tests/files/record_run_folders.py ../0.7.0

Every release is recorded once, by its own code, and its runs must then resume, evaluate and plot with all later versions. For each run
there are: its folder with the newest checkpoint, an evaluation of that, and the metrics of the same run that nobody stopped. records.json
holds all records of the configuration as the version stores them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent / "run_folders"
KEPT = ("config.json", "classes.json", "command.txt", "versions.json", "metrics.jsonl", "evaluations.jsonl")
SGD = "--optim.name sgd --optim.lr 0.05 --optim.warmup-steps 0 --optim.ema-decay 0 --model.num-adaptor-layers 0"
RUNS = {
    "adamw": ("", 16),
    "sgd": (f"{SGD} --schedule accumulating --eval-every-steps 5", 8),
}
"""The flags of each run, and the logged step after which it is stopped: of 36, and of 12 with accumulating, one of which is evaluated."""
NAMES = ["Audio", "DemoFiles", "Folder", "Image", "Manifest", "Shards", "Synthetic", "Video"]
IMPORTS = """from polyvit_fast.config import Model, Optim, Task, Train
from polyvit_fast.data import Audio, Folder, Image, Synthetic, Video
"""
IMPORTS_BEFORE_0_6 = """from polyvit_fast.config import Model, Optim, Task, Train
from polyvit_fast.data.audio import Audio
from polyvit_fast.data.image import Image
from polyvit_fast.data.manifest import Folder
from polyvit_fast.data.synthetic import Synthetic
from polyvit_fast.data.video import Video
"""
EXPERIMENT = """
SYNTHETIC = {"train": Synthetic(num_samples=20), "val": Synthetic(num_samples=10, seed=1)}
config = Train(
    tasks={
        "pictures": Task(
            modality=Image(size=8, patch=4),
            train=Folder(path="pictures/train"),
            val=Folder(path="pictures/val"),
            num_classes=2,
            batch=4,
            steps=12,
        ),
        "clips": Task(
            modality=Video(size=8, patch=4, frames=2, tubelet_frames=2), **SYNTHETIC, num_classes=3, batch=6, micro_batches=2, steps=12
        ),
        "sounds": Task(
            modality=Audio(clip_seconds=0.32, num_mel_bins=16, patch=8),
            **SYNTHETIC,
            num_classes=4,
            batch=4,
            steps=12,
            loss="sigmoid",
            multi_label=True,
        ),
    },
    model=Model(dim=4, depth=2, num_heads=2, mlp_dim=8, num_adaptor_layers=1),
    optim=Optim(name="adamw", lr=3e-3, warmup_steps=2, ema_decay=0.9),
)
"""
RECORDS = """
import importlib, json, pathlib, sys
import polyvit_fast
root = pathlib.Path(polyvit_fast.__file__).parent
found = {}
for path in sorted((root / "data").rglob("*.py")):
    name = ".".join(("polyvit_fast", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    module = importlib.import_module(name)
    found |= {name: getattr(module, name) for name in sys.argv[1:] if hasattr(module, name)}
try:
    from polyvit_fast.train.run_folder.config_json import to_json
except ImportError:
    from polyvit_fast.train.record import to_json
from polyvit_fast.config import Task, Train
sources = [
    found["DemoFiles"](kind="shapes"), found["Folder"](path="a"), found["Manifest"](path="a.csv"), found["Shards"](paths=("a.tar",)),
    found["Synthetic"](),
]
modalities = [found[name]() for name in ("Image", "Video", "Audio")]
tasks = {}
for number, source in enumerate(sources):
    tasks[str(number)] = Task(modality=modalities[number % 3], train=source, val=source, num_classes=6, steps=3)
print(json.dumps(to_json(Train(tasks=tasks))))
"""


def make_pictures(folder: Path) -> None:
    """Twelve pictures to train on and eight to evaluate: blue and red noise of an odd size, every second one a JPEG."""
    for split, count in (("train", 6), ("val", 4)):
        for channel, name in ((2, "blue"), (0, "red")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([len(split), channel, number])
                coarse = rng.integers(0, 120, (5, 4, 3), np.uint8)
                coarse[..., channel] += 100
                picture = Image.fromarray(coarse).resize((19, 22), Image.Resampling.NEAREST)
                picture.save(folder / split / name / f"{number}.{'png' if number % 2 else 'jpg'}")


def write_experiment(version: str) -> str:
    """The experiment file in the spelling of a version."""
    return (IMPORTS_BEFORE_0_6 if version < "0.6.0" else IMPORTS) + EXPERIMENT


def record(checkout: Path, run: str, flags: str, stop_after: int, out: Path) -> None:
    """Train one run of a version twice, once with a stop, and keep what it leaves."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        shutil.copytree(HERE / "pictures", home / "pictures")
        (home / "tiny.py").write_text(write_experiment(out.name))
        common = [*flags.split(), "--log-every-steps", "4", "--keep", "1", "--compute-threads", "1"]
        start(checkout, home, "train", "tiny.py", "--out", "straight", *common).wait()
        while True:
            process = start(checkout, home, "train", "tiny.py", "--out", f"runs/{run}", *common)
            stop(process, home / "runs" / run / "metrics.jsonl", stop_after)
            if not is_within_an_update(home / "runs" / run):
                break
            shutil.rmtree(home / "runs" / run)
        assert start(checkout, home, "eval", f"runs/{run}").wait() == 0
        found, target = home / "runs" / run, out / run
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in KEPT:
            if (found / name).exists():
                shutil.copy(found / name, target)
        shutil.copytree(found / "checkpoints", target / "checkpoints")
        shutil.copy(home / "straight" / "metrics.jsonl", out / f"{run}-straight.jsonl")


def start(checkout: Path, home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A command of that version."""
    paths = os.pathsep.join([str(checkout), str(checkout / "kernels")])
    return subprocess.Popen([sys.executable, "-m", "polyvit_fast", *arguments], cwd=home, env=os.environ | {"PYTHONPATH": paths})


def stop(process: subprocess.Popen[bytes], metrics: Path, after: int) -> None:
    """Stop a run by SIGTERM as soon as it has logged so many steps."""
    while process.poll() is None:
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        if whole and whole[-1]["step"] >= after:
            time.sleep(0.01)  # a step or two, so that some are done but not logged
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.0005)
    assert process.wait() == 75, "the run ended before it could be stopped; try again"


def is_within_an_update(run: Path) -> bool:
    """Whether the checkpoint has counted one of several minibatches of an update: 0.5 to 0.7 then log that one twice."""
    state = json.loads((sorted((run / "checkpoints").iterdir())[-1] / "state.json").read_text())
    counts = {row[2] for row in state["counters"]}
    return "accumulating" in (run / "command.txt").read_text() and len(counts) > 1


def list_records(checkout: Path) -> dict:
    """A configuration with all records that there are, as that version stores it."""
    paths = os.pathsep.join([str(checkout), str(checkout / "kernels")])
    command = [sys.executable, "-c", RECORDS, *NAMES]
    environment = os.environ | {"PYTHONPATH": paths}
    return json.loads(subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True).stdout)


def main(checkout: Path, names: list[str]) -> None:
    """Record a version: all runs, or those of these names."""
    if not (HERE / "pictures").exists():
        make_pictures(HERE / "pictures")
    version = (checkout / "polyvit_fast" / "__init__.py").read_text().partition('__version__ = "')[2].partition('"')[0]
    for run in names or RUNS:
        record(checkout, run, *RUNS[run], HERE / version)
    (HERE / version / "records.json").write_text(json.dumps(list_records(checkout), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
