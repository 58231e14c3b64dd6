"""What a run goes on from, through the command line: files that moved, more steps, and what each refusal advises."""

import hashlib
import json
import os
import re
import resource
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from long_forms import mark_long
from PIL import Image as Pillow
from safetensors.torch import load_file

from polyvit_fast import cli, experiments
from polyvit_fast.data.sources.fingerprint import fingerprint_names
from polyvit_fast.train.output.log import Log
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.resume import list_earlier_lengths
from polyvit_fast.train.schedule import make_step_plan

EXPERIMENT = """
from polyvit_fast.config import LogOptions, Model, Optim, Task, Train
from polyvit_fast.data import Folder, Image, Manifest, Shards

config = Train(
    tasks={{
        "p": Task(modality=Image(size=32, patch=16), train={train}, val=Folder(path="data/val"), num_classes=2, batch=4, steps=10),
    }},
    model=Model(dim=32, depth=1, num_heads=2, mlp_dim=64),
    optim=Optim(name="adamw", lr=1e-3, warmup_steps=2),
    log=LogOptions(save_every_steps=100, log_every_steps=5),
)
"""
FOLDER = 'Folder(path="data/train")'
SOURCES = {
    "folder": (FOLDER, "path", "train"),
    "manifest": ('Manifest(path="data/train.csv")', "path", "train.csv"),
    "root": ('Manifest(path="table.csv", root="data/train")', "root", "train"),
    "shards": ('Shards(paths=("data/train-{0..1}.tar",))', "paths", "train-{0..1}.tar"),
}
"""An experiment's source, the field that says where its files are, and what of `data` it names."""


SECOND = """
        "q": Task(
            modality=Image(size=32, patch=16),
            train=Folder(path="data/train"),
            val=Folder(path="data/val"),
            num_classes=2,
            batch=4,
            steps=10,
        ),"""
DARK = """
from dataclasses import dataclass
from polyvit_fast.data import Folder, build_decoder


@dataclass(frozen=True, kw_only=True)
class Dark(Folder):
    def decoder(self, task, *, batch, train, num_threads, device="cpu"):
        inner = build_decoder(task.modality, batch=batch, train=train, num_threads=num_threads, device=device)
        return lambda media, rngs: inner(media, rngs) // 8
"""


def write_files(folder: Path) -> None:
    """A folder per class, the same files as a table and as shards."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Pillow.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / split / name / f"{number}.jpg")
                rows += [f"{name}/{number}.jpg,{label}\n"] if split == "train" else []
    (folder / "train.csv").write_text("path,label\n" + "".join(f"train/{row}" for row in rows))
    (folder.parent / "table.csv").write_text("path,label\n" + "".join(rows))
    for label, name in enumerate(("cat", "dog")):
        with tarfile.open(folder / f"train-{label}.tar", "w") as shard:
            for number in range(8):
                Path(folder / "label").write_text(str(label))
                shard.add(folder / "train" / name / f"{number}.jpg", f"{name}{number}.jpg")
                shard.add(folder / "label", f"{name}{number}.cls")


def write_experiment(train: str = FOLDER) -> None:
    Path("mine.py").write_text(EXPERIMENT.format(train=train))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, with an experiment, mine.py, and its files in data/."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "data")
    write_experiment()
    return tmp_path


@pytest.fixture
def stop_at(monkeypatch) -> Callable[[int], None]:
    """A function after which the next run gets a real SIGTERM while the given step ends; at 0 none does."""
    tick, steps = Log.tick, [0]

    def tick_and_signal(log: Log, done: int, task: str) -> None:
        tick(log, done, task)
        if done == steps[0]:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(Log, "tick", tick_and_signal)

    def stop(step: int) -> None:
        steps[0] = step

    return stop


def train(*flags: str, out: str = "run", code: int = 0) -> None:
    assert cli.run(["train", "mine.py", "--out", out, *flags]) == code


def weights(folder: str) -> dict[str, torch.Tensor]:
    newest = checkpoint.find_newest(Path(folder))
    assert newest
    return load_file(newest.path / "model.safetensors") | {f"optimizer {k}": v for k, v in newest.load_tensors("optimizer").items()}


def assert_equal(one: str, other: str) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def read_state(folder: str) -> dict:
    newest = checkpoint.find_newest(Path(folder))
    assert newest
    return newest.state


def rewrite_state(folder: str, change: Callable[[dict], None]) -> None:
    """Change the newest checkpoint's state.json as an earlier version would have written it."""
    newest = checkpoint.find_newest(Path(folder))
    assert newest
    change(newest.state)
    text = json.dumps(newest.state).encode()
    (newest.path / "state.json").write_bytes(text)
    manifest = json.loads((newest.path / checkpoint.MANIFEST).read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (newest.path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", mark_long(SOURCES, ["folder", "manifest", "shards"]))
def test_a_run_whose_data_moved_ends_with_the_weights_of_one_that_was_never_moved(here, stop_at, capsys, kind):
    source, field, name = SOURCES[kind]
    write_experiment(source)
    train(out="straight")
    stop_at(5)
    train(code=75)
    stop_at(0)
    os.rename("data", here / "elsewhere")
    if kind != "root":  # a table is read without its files
        train(code=2)
        said = capsys.readouterr().err
        assert f" {here / 'data'}/" in said
        assert f". If the files have moved, say where they are with --tasks.p.train.{field}" in said
    moved = [f"--tasks.p.train.{field}", str(here / "elsewhere" / name), "--tasks.p.val.path", "elsewhere/val"]
    train(*moved)
    assert_equal("straight", "run")
    assert read_state("run")["metrics"]["p"]["loss"] == read_state("straight")["metrics"]["p"]["loss"]
    capsys.readouterr()
    assert cli.run(["eval", "straight", "--tasks.p.val.path", "elsewhere/val", "--checkpoint", "newest"]) == 0
    assert "not those of" not in capsys.readouterr().out
    assert cli.run(["eval", "straight", "--split", "train", *moved[:2]]) == 0
    assert "not those of" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", mark_long(SOURCES, ["shards"]))
def test_a_run_of_an_earlier_version_whose_data_moved_resumes(here, stop_at, kind):
    """Up to 0.7 a checkpoint had a digest of the paths as the configuration gave them."""
    source, field, name = SOURCES[kind]
    write_experiment(source)
    stop_at(5)
    train(code=75)
    stop_at(0)
    paths = {"folder": "data/train/{}/{}.jpg", "manifest": "data/train/{}/{}.jpg", "root": "data/train/{}/{}.jpg"}
    paths |= {"shards": "data/train-{label}.tar:{}{}.jpg"}

    def forget(state: dict) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for label, word in enumerate(("cat", "dog")):
            for number in range(8):
                digest.update(f"{paths[kind].format(word, number, label=label)}\x1f({label},)\x1e".encode())
        state.pop("lengths")
        state["samples"]["p"].pop("list")
        state["samples"]["p"]["names"] = f"16 files, {digest.hexdigest()}"

    rewrite_state("run", forget)
    shutil.copytree("run", "unmoved")
    train(out="unmoved")
    os.rename("data", here / "elsewhere")
    train(f"--tasks.p.train.{field}", str(here / "elsewhere" / name), "--tasks.p.val.path", "elsewhere/val")
    assert_equal("unmoved", "run")


def test_other_files_at_the_new_location_are_refused(here, stop_at, capsys):
    stop_at(5)
    train(code=75)
    stop_at(0)
    shutil.copytree("data", "other")
    Pillow.new("RGB", (40, 40)).save("other/train/dog/3.jpg")
    Pillow.new("RGB", (40, 40)).save("other/val/dog/1.jpg")
    train("--tasks.p.train.path", "other/train", code=2)
    assert re.search(r"task p: its training files are not those of \S+ \(sizes of other/train/dog/3.jpg\)", capsys.readouterr().err)
    train("--tasks.p.val.path", "other/val", code=2)
    said = capsys.readouterr().err
    assert "its validation files are not those of" in said
    assert "Set tasks.p.val back to resume, allow the change with --changed-files allow" in said
    train("--tasks.p.train.path", "data/val", code=2)
    assert "names and labels: 16 files" in capsys.readouterr().err
    train("--tasks.p.val.path", "other/val", "--tasks.p.train.path", "other/train", "--changed-files", "allow")
    assert "its metrics are those of other files now" in capsys.readouterr().out.replace("\n", " ")


def test_files_of_a_table_that_are_gone_are_named_with_the_flag_for_their_location(here, stop_at, capsys):
    write_experiment(SOURCES["root"][0])
    stop_at(5)
    train(code=75)
    stop_at(0)
    os.rename("data/train", "data/moved")
    train(code=2)
    said = capsys.readouterr().err
    assert f"{here}/data/train/cat/0.jpg is missing: if the files have moved, say where they are now with --tasks.p.train.root" in said
    train("--tasks.p.train.root", "data/moved")


def test_the_table_of_the_same_files_may_stand_for_their_folder(here, stop_at):
    train(out="straight")
    stop_at(5)
    train(code=75)
    stop_at(0)
    Path("data/classes.txt").write_text("cat\ndog\n")
    write_experiment('Manifest(path="data/train.csv", classes="data/classes.txt")')
    text = Path("data/train.csv").read_text()
    Path("data/train.csv").write_text(text.replace(",0", ",cat").replace(",1", ",dog"))
    train()
    assert_equal("straight", "run")


def test_eval_and_probe_take_locations_and_no_other_field(here, capsys):
    train()
    os.rename("data", "elsewhere")
    assert cli.run(["eval", "run"]) == 2
    assert "say where they are with --tasks.p.val.path" in capsys.readouterr().err
    for flag, words in (
        ("--tasks.p.batch", "--tasks.p.batch cannot be changed: the weights belong to the configuration"),
        ("--tasks.q.val.path", "there is no task q; there are p"),
        ("--tasks.p.test.path", "task p has no test files"),
    ):
        assert cli.run(["eval", "run", flag, "3"]) == 2
        assert words in capsys.readouterr().err
    assert cli.run(["eval", "run", "--tasks", "p", "--tasks.p.val.path=elsewhere/val", "--split", "val"]) == 0
    assert cli.run(["eval", "run", "--tasks.p.val.path", "elsewhere/train", "--tasks", "p"]) == 0
    assert "these validation files are not those of run/checkpoints/step_00000010" in capsys.readouterr().out
    moved = ["--tasks.p.train.path", "elsewhere/train", "--tasks.p.val.path", "elsewhere/val"]
    assert cli.run(["probe", "run", "--experiment", "mine.py", "--heads", "linear", *moved]) == 0


LENGTHENED = ("--tasks.p.steps", "20")


def test_a_finished_run_that_is_lengthened_and_stopped_is_the_one_that_was_lengthened_at_once(here, stop_at, capsys):
    train("--keep", "9")
    first, lines = weights("run"), Path("run/metrics.jsonl").read_text()
    shutil.copytree("run", "stopped")
    capsys.readouterr()
    train(*LENGTHENED, "--keep", "9")
    said = " ".join(capsys.readouterr().out.split())
    assert "the run is lengthened from 10 to 20 steps (p 10 -> 20)" in said
    # The cosine after two steps of warm-up: over 8 steps it ends at (1 + cos(7 pi / 8)) / 2, over 18 it is at (1 + cos(8 pi / 18)) / 2.
    assert "with its peak of 0.001 after the warm-up of 2 steps, which is over and not repeated: it was 3.81e-05 in the last step" in said
    assert "and is 0.000587 now" in said
    stop_at(13)
    train(*LENGTHENED, out="stopped", code=75)
    stop_at(0)
    train(*LENGTHENED, out="stopped")
    assert_equal("run", "stopped")
    assert Path("run/metrics.jsonl").read_text().startswith(lines)
    [old] = [found for found in checkpoint.iterate(Path("run")) if found.step == 10]
    assert all(torch.equal(tensor, first[name]) for name, tensor in old.load_tensors("model").items())
    state = read_state("run")
    assert (state["step"], state["metrics_step"], state["lengths"]) == (20, 20, [{"p": 10}, {"p": 20}])
    capsys.readouterr()
    train(*LENGTHENED)
    assert "this run is finished" in capsys.readouterr().out
    train(code=2)
    assert "a run cannot become shorter" in (said := capsys.readouterr().err)
    assert "set --tasks.p.steps 20 (here 10) or more" in said
    assert cli.run(["eval", "run"]) == 0
    assert cli.run(["plot", "run"]) == 0


def test_an_unfinished_run_is_lengthened_after_its_own_plan(here, stop_at):
    stop_at(5)
    train(code=75)
    stop_at(13)
    train(*LENGTHENED, code=75)
    stop_at(0)
    assert read_state("run")["lengths"] == [{"p": 10}, {"p": 20}]
    train("--tasks.p.steps", "25")
    state = read_state("run")
    assert (state["step"], state["lengths"]) == (25, [{"p": 10}, {"p": 20}, {"p": 25}])


def test_a_lengthened_run_may_stop_early_again(here):
    """Early stopping counts anew, for the evaluations before belong to a run that had come to its end."""
    flags = ("--eval-every-steps", "5", "--early-stop-evaluations", "2")
    train(*flags, "--optim.lr", "1e-30")
    assert read_state("run")["evaluations_since_best"] == 1
    rewrite_state("run", lambda state: state.update(evaluations_since_best=2))
    train(*flags, "--optim.lr", "1e-30", "--tasks.p.steps", "30")
    assert read_state("run")["step"] == 20
    assert "stopped early after step 20 of 30" in Path("run/log.txt").read_text()


def test_a_run_that_stopped_early_goes_on_when_it_is_lengthened(here):
    flags = ("--eval-every-steps", "2", "--early-stop-evaluations", "2", "--optim.lr", "1e-30")
    train(*flags)
    assert read_state("run")["step"] == 6
    train(*flags, "--tasks.p.steps", "40")
    assert read_state("run")["step"] == 10


def test_the_picture_of_a_lengthened_run_s_schedule_is_of_its_own_plan(here):
    Path("mine.py").write_text(
        Path("mine.py").read_text().replace("tasks={", "schedule='weighted', tasks={").replace("\n    },", SECOND + "\n    },")
    )
    train()
    train(*LENGTHENED)
    config = experiments.load("mine.py")
    longer = replace(config, out="run", tasks=config.tasks | {"p": replace(config.tasks["p"], steps=20)})
    assert list_earlier_lengths(longer) == [{"p": 10, "q": 10}]
    assert list_earlier_lengths(replace(longer, out="elsewhere")) == []
    plan = make_step_plan(longer, list_earlier_lengths(longer))
    assert plan[:20] == make_step_plan(replace(config, out="run"))
    assert plan != make_step_plan(longer)
    assert cli.run(["plot", "schedule", "mine.py", "--out", "run", *LENGTHENED]) == 0


def test_a_source_whose_decoder_is_the_user_s_is_not_taken_for_its_files(here, capsys):
    Path("dark.py").write_text(DARK)
    train_with = Path("mine.py").read_text()
    Path("mine.py").write_text(
        "from dark import Dark\n" + train_with.replace('train=Folder(path="data/train")', 'train=Dark(path="data/train")')
    )
    train()
    Path("mine.py").write_text(train_with)
    capsys.readouterr()
    train("--tasks.p.steps", "12", code=2)
    assert "tasks.p.train: dark:Dark -> Folder" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["samples", "validation_samples"])
def test_files_at_another_location_are_not_taken_on_trust_where_a_checkpoint_knows_only_names(here, stop_at, capsys, split):
    stop_at(5)
    train(code=75)
    stop_at(0)
    names = fingerprint_names(experiments.load("mine.py").tasks["p"].train.samples(experiments.load("mine.py").tasks["p"]))
    rewrite_state("run", lambda state: state.update({split: {"p": names} if split == "samples" else {}}))
    os.rename("data", "moved")
    flags = ("--tasks.p.train.path", "moved/train", "--tasks.p.val.path", "moved/val")
    train(*flags, code=2)
    assert "kept no sizes and contents, so nobody can tell whether these files are the same" in capsys.readouterr().err
    train(*flags, "--changed-files", "allow")


def test_an_experiment_s_copy_has_its_bytes(here, capsys):
    Path("mine.py").write_bytes(b"# -*- coding: latin-1 -*-\r\n# caf\xe9\r\n" + Path("mine.py").read_bytes().replace(b"\n", b"\r\n"))
    train()
    assert Path("run/experiment.py").read_bytes() == Path("mine.py").read_bytes()


def test_paths_that_are_no_text_do_not_keep_a_run_from_going_on(here):
    os.rename("data/train", b"data/tr\xe9in")
    flags = ("--tasks.p.train.path", os.fsdecode(b"data/tr\xe9in"))
    train(*flags)
    train(*flags)
    assert cli.run(["eval", "run"]) == 0


def break_files(count: int) -> None:
    for number in range(count):
        path = Path(f"data/train/cat/{number}.jpg")
        path.write_bytes(path.read_bytes()[:200])


def repair() -> tuple[str, ...]:
    """Replace the broken files; they are as many bytes again, but not the same pictures."""
    for number in range(8):
        Pillow.new("RGB", (40, 40), "white").save(f"data/train/cat/{number}.jpg")
    return ()


def take_clean_manifest() -> tuple[str, ...]:
    if not Path("clean-manifests").exists():
        assert cli.run(["check", "mine.py"]) == 65
    write_experiment('Manifest(path="clean-manifests/p-train.csv", classes="clean-manifests/p-classes.txt")')
    return ()


def raise_limit() -> tuple[str, ...]:
    return ("--max-bad-ratio", "0.5")


@pytest.mark.parametrize("way", [raise_limit, repair, take_clean_manifest])
def test_after_too_many_files_broke_each_way_that_the_message_names_goes_on(here, monkeypatch, capsys, way):
    tick = Log.tick

    def tick_and_break(log: Log, done: int, task: str) -> None:
        tick(log, done, task)
        if done == 2:
            break_files(4)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "tick", tick_and_break)
        train("--max-bad-ratio", "0", "--prefetch", "1", code=65)
    said = capsys.readouterr().err
    assert "Start the same command again with a larger --max-bad-ratio, and the run goes on without them; or once you have repaired" in said
    assert "or made the manifest tasks.p.train of the experiment. Files that have changed since the run began need --changed-files" in said
    done = read_state("run")["step"]
    assert 2 <= done < 10
    train(*way(), code=2)
    assert "allow the change" in capsys.readouterr().err
    train(*way(), "--changed-files", "allow")
    out = capsys.readouterr().out
    assert f"resumed from step {done} of 10" in out
    if way is take_clean_manifest:
        assert "the run goes on with them as they are now: 12 files, in an order of their own from here on" in out.replace("\n", "")
    assert read_state("run")["step"] == 10
    train()  # and from then on the command needs no flag, for the checkpoint knows the files of now
    assert "this run is finished" in capsys.readouterr().out


def test_a_higher_limit_alone_goes_on_where_files_were_broken_before(here, stop_at, capsys):
    break_files(2)
    train(code=65)  # a single one is always allowed
    done = read_state("run")["step"]
    assert 0 < done < 10
    train("--max-bad-ratio", "0.5")
    assert f"resumed from step {done} of 10" in capsys.readouterr().out


def test_broken_files_of_an_evaluation_are_left_out_as_its_message_says(here, capsys):
    train()
    for number in range(2):
        Path(f"data/val/cat/{number}.jpg").write_bytes(b"no picture")
    assert cli.run(["eval", "run"]) == 65
    assert "again after you have repaired or replaced them, or with a larger --max-bad-ratio" in capsys.readouterr().err
    assert cli.run(["eval", "run", "--max-bad-ratio", "0.5"]) == 0
    assert " 4        2 " in capsys.readouterr().out
    train("--max-bad-ratio", "0.5")


HANGING = """
import time
from dataclasses import dataclass, replace
from polyvit_fast.data.decoders import build_task_decoder

@dataclass(frozen=True, kw_only=True)
class Slow(Folder):
    def decoder(self, task, *, batch, train, num_threads, device="cpu"):
        inner = build_task_decoder(Folder(path=self.path), task, batch=batch, train=train, num_threads=num_threads, device=device)

        def decode(media, rngs):
            if any(one.read().endswith(b"slow") for one in media):
                time.sleep(2.5)
            return inner(media, rngs)

        return decode

config = replace(config, tasks={"p": replace(config.tasks["p"], train=Slow(path="data/train"))})
"""


@pytest.mark.parametrize("way", ["time", "file"])
def test_after_a_decoder_that_hangs_each_way_that_the_message_names_goes_on(here, stop_at, capsys, way):
    with open("mine.py", "a") as file:
        file.write(HANGING)
    hanging = Path("data/train/dog/5.jpg")
    good = hanging.read_bytes()
    stop_at(2)
    train(code=75)
    stop_at(0)
    hanging.write_bytes(good + b"slow")
    train("--changed-files", "allow", "--decode-timeout-seconds", "0.7", "--prefetch", "1", code=65)
    said = capsys.readouterr().err
    assert "Start the same command again with a longer --decode-timeout-seconds; or once you have replaced the file by a good one" in said
    if way == "file":
        hanging.write_bytes(good)
    train(*(["--decode-timeout-seconds", "60"] if way == "time" else ["--changed-files", "allow"]))
    assert read_state("run")["step"] == 10


def test_after_a_loss_that_is_not_finite_another_folder_with_a_lower_rate_trains(here, capsys):
    flags = ("--nonfinite-patience", "2", "--log-every-steps", "1", "--optim.warmup-steps", "0")
    train(*flags, "--optim.lr", "1e30", code=70)
    assert "Lower optim.lr" in capsys.readouterr().err
    train(*flags, "--optim.lr", "1e-3", code=2)
    assert "optim.lr: 1e+30 -> 0.001. Choose another --out, or set these fields back" in capsys.readouterr().err
    train(*flags, "--optim.lr", "1e-3", out="other")


def test_after_a_full_disk_the_same_command_goes_on(here, stop_at, capsys):
    stop_at(5)
    train(code=75)
    stop_at(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a checkpoint's weights take more
    try:
        train(code=74)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Make room there, and start the same command again: it goes on from the newest one" in capsys.readouterr().err
    train()
    assert "resumed from step 5 of 10" in capsys.readouterr().out


REFUSED = {
    "configuration": (["--seed", "3"], "seed: 0 -> 3. Choose another --out, or set these fields back to resume"),
    "resume": (["--no-resume"], "holds a run already (step 10) and resume is off; choose another --out or move it away"),
    "classes": ([], "class 1 was 'dog' and is 'emu' now. Put them back to resume, or choose another --out"),
    "checkpoint": ([], "not a single whole one; move it away, or choose another --out"),
}


@pytest.mark.parametrize("case", mark_long(REFUSED, ["configuration", "classes"]))
def test_each_way_that_a_refusal_names_works(here, capsys, case):
    flags, words = REFUSED[case]
    train()
    if case == "classes":
        for split in ("train", "val"):
            os.rename(f"data/{split}/dog", f"data/{split}/emu")
    if case == "checkpoint":
        (Path("run/checkpoints/step_00000010/model.safetensors")).write_bytes(b"flipped")
    train(*flags, code=2)
    assert words in capsys.readouterr().err
    train(*flags, out="other")  # choose another --out
    if case == "classes":
        for split in ("train", "val"):
            os.rename(f"data/{split}/emu", f"data/{split}/dog")
    elif case != "configuration":
        os.rename("run", "away")
    train(*(flags if case == "resume" else []))
