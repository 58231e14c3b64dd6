import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from fine_tuning import make_config, write_pictures
from long_forms import mark_long
from PIL import Image as Pillow
from safetensors.torch import load_file
from tiny_runs import change, tile_task, tiny_config

from polyvit_fast import experiments
from polyvit_fast.config import Decoder, Optim, Task, Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.fingerprint import fingerprint_names
from polyvit_fast.data.sources.manifest import Folder
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import DataError
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.evaluate import evaluate, evaluate_run
from polyvit_fast.train.loop import train
from polyvit_fast.train.output.log import Log, print_evaluation, print_results
from polyvit_fast.train.output.plot import plot_run
from polyvit_fast.train.run import NonFiniteError
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.schedule import LearningRates, make_step_plan
from polyvit_fast.train.step import Step


def run(config: Train, folder: Path, **changes):
    return train(change(config, out=str(folder), **changes), "test", ["test"])


@contextmanager
def signal_at(step: int, number: int) -> Iterator[None]:
    """Inside, this process receives a real signal while the given step ends, as from Ctrl-C or a cluster's scheduler."""
    tick = Log.tick

    def tick_and_signal(log: Log, done: int, task: str) -> None:
        tick(log, done, task)
        if done == step:
            os.kill(os.getpid(), number)

    Log.tick = tick_and_signal
    try:
        yield
    finally:
        Log.tick = tick


def run_until(config: Train, folder: Path, step: int, number: int = signal.SIGTERM):
    with signal_at(step, number):
        return run(config, folder)


def tensors(folder: Path):
    newest = checkpoint.find_newest(folder)
    assert newest
    return {name: load_file(newest.path / f"{name}.safetensors") for name in ("model", "optimizer")}


def assert_equal_weights(a: Path, b: Path):
    for kind, ours in tensors(a).items():
        theirs = tensors(b)[kind]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(folder: Path):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], task, row["loss"]) for line in lines for task, row in line.get("tasks", {}).items() if "loss" in row]


@pytest.mark.parametrize("changes", mark_long([{}, {"precision": "bf16", "residual": "bf16"}], [{}]), ids=["fp32", "bf16-residual"])
def test_smoke_loses_more_than_thirty_percent_of_its_loss(tmp_path, changes):
    run(experiments.load("smoke"), tmp_path / "run", log_every_steps=10, **changes)
    rows = losses(tmp_path / "run")
    for task in ("pictures", "clips", "sounds"):
        curve = [loss for _, name, loss in rows if name == task]
        assert curve[-1] < 0.7 * curve[0], (task, curve)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"schedule": "accumulating"},
        pytest.param({"schedule": "task-by-task", "optim_changes": {"name": "sgd", "lr": 0.01, "ema_decay": 0.9}}, marks=pytest.mark.long),
        {"model_changes": {"dropout": 0.2, "num_adaptor_layers": 1}, "task_changes": {"drop_path_rate": 0.3, "mixup": 0.3}},
    ],
    ids=["weighted", "accumulating", "sgd-ema", "dropout-adaptors-mixup"],
)
def test_twice_resumed_is_bitwise_the_straight_run(tmp_path, changes):
    config = tiny_config()
    changes = dict(changes)
    config = replace(config, model=replace(config.model, **changes.pop("model_changes", {})))
    config = replace(config, optim=replace(config.optim, **changes.pop("optim_changes", {})))
    a = replace(config.tasks["a"], **changes.pop("task_changes", {}))
    config = replace(config, tasks=config.tasks | {"a": a}, **changes)
    total = len(make_step_plan(config))
    straight = run(config, tmp_path / "straight")
    assert run_until(config, tmp_path / "resumed", total // 3).step == total // 3  # 50 and 30 samples a task: amid an epoch
    assert run_until(config, tmp_path / "resumed", total // 3 + 2, signal.SIGINT).step == total // 3 + 2
    resumed = run(config, tmp_path / "resumed")
    assert_equal_weights(tmp_path / "straight", tmp_path / "resumed")
    for task, row in straight.metrics.items():
        for name in ("loss", config.tasks[task].metric):
            assert row[name] == resumed.metrics[task][name]
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")


def test_a_finished_run_is_left_as_it_is(tmp_path, config):
    first = run(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    second = run(config, tmp_path)
    assert (second.step, second.metrics) == (first.step, first.metrics)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_another_configuration_is_refused_by_its_fields(tmp_path, config):
    run(config, tmp_path)
    other = replace(config, seed=5, tasks=config.tasks | {"a": replace(config.tasks["a"], batch=4)})
    with pytest.raises(ValueError, match=r"tasks.a.batch: 8 -> 4; .*seed: 0 -> 5|seed: 0 -> 5; .*tasks.a.batch: 8 -> 4"):
        run(other, tmp_path)
    with pytest.raises(ValueError, match="resume is off"):
        run(config, tmp_path, resume=False)


def test_a_run_without_a_whole_checkpoint_does_not_start_over(tmp_path, config):
    run_until(config, tmp_path, 7)
    [path] = (tmp_path / "checkpoints").iterdir()
    (path / "model.safetensors").write_bytes(b"flipped")
    with pytest.raises(ValueError, match="holds checkpoints, but not a single whole one; move it away"):
        run(config, tmp_path)
    assert path.exists()


def test_fields_that_change_no_number_may_differ(tmp_path, config):
    run_until(config, tmp_path, 7)
    assert run(config, tmp_path, log_every_steps=3, prefetch=1, num_threads=1).step == len(make_step_plan(config))


@dataclass(frozen=True, kw_only=True)
class Poisoned(Synthetic):
    """Synthetic samples of which some have no finite pixel."""

    bad_ratio: float = 1.0

    def decoder(self, task: Task, *, batch: int, train: bool, num_threads: int, device: str = "cpu") -> Decoder:
        inner = super().decoder(task, batch=batch, train=train, num_threads=num_threads)

        def decode(media, rngs):
            numbers = [int("".join(c for c in m.name if c.isdigit())) for m in media]
            grid = inner(media, rngs).float()
            bad = torch.tensor([number < self.bad_ratio * self.num_samples for number in numbers])
            return torch.where(bad.view(-1, 1, 1, 1, 1, 1), float("nan"), grid)

        return decode


def test_endless_non_finite_losses_stop_with_task_step_and_files(tmp_path):
    config = tiny_config(tasks={"a": tile_task(steps=40, train=Poisoned(num_samples=50)), "b": tile_task(steps=4)}, nonfinite_patience=5)
    with pytest.raises(NonFiniteError, match=r"task a: the loss or gradient was not finite in \d+ of its steps in a row.*synthetic"):
        run(config, tmp_path)


def diverging_config(**changes) -> Train:
    """Task a has nothing but poisoned samples, task b good ones."""
    tasks = {"a": tile_task(steps=40, train=Poisoned(num_samples=50)), "b": tile_task(steps=40)}
    return tiny_config(tasks=tasks, **({"nonfinite_patience": 3, "log_every_steps": 1000, "save_every_steps": 1000} | changes))


def third_step_of_a(config: Train) -> int:
    return [step for step, names in enumerate(make_step_plan(config)) if names == ("a",)][2]


@pytest.mark.parametrize("changes", [{}, {"save_every_steps": 1}, {"eval_every_steps": 1}], ids=["train", "save", "evaluate"])
def test_patience_ends_with_its_last_step_not_at_the_next_log_line(tmp_path, changes):
    config = diverging_config(**changes)
    last = third_step_of_a(config)
    with pytest.raises(NonFiniteError, match=rf"task a: .* not finite in 3 of its steps in a row, the last one step {last} on 8 files"):
        run(config, tmp_path)
    newest = checkpoint.find_newest(tmp_path)
    assert newest
    assert newest.step == last + 1
    assert newest.state["counters"][0][3:6] == [3.0, 3.0, last]
    assert all(tensor.isfinite().all() for tensor in newest.load_tensors("model").values())


def test_patience_ends_with_the_last_step_of_a_run_too(tmp_path):
    config = tiny_config(tasks={"a": tile_task(steps=3, train=Poisoned(num_samples=50))}, nonfinite_patience=3, log_every_steps=1000)
    with pytest.raises(NonFiniteError, match="not finite in 3 of its steps in a row, the last one step 2"):
        run(config, tmp_path)
    newest = checkpoint.find_newest(tmp_path)
    assert newest
    assert newest.step == 3


def test_resumed_with_more_patience_it_goes_on_and_with_the_same_it_stops_at_the_next_such_step(tmp_path):
    config = diverging_config()
    for patience, index in ((3, 2), (5, 4), (5, 5)):
        with pytest.raises(NonFiniteError, match=f"not finite in {index + 1} of its steps in a row"):
            run(config, tmp_path, nonfinite_patience=patience)
        newest = checkpoint.find_newest(tmp_path)
        assert newest
        assert newest.step - 1 == [step for step, names in enumerate(make_step_plan(config)) if names == ("a",)][index]


def test_a_row_has_each_task_s_own_rate_and_the_norm_of_its_gradient(tmp_path):
    tasks = {"a": tile_task(steps=12, lr_scale=0.5), "b": tile_task(steps=8, lr_schedule="constant")}
    config = tiny_config(tasks=tasks, optim=Optim(name="sgd", lr=0.1, clip_norm=0.5))
    plan = make_step_plan(config)
    rates = list(LearningRates(config, plan))
    run(config, tmp_path)
    lines = [line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line in lines:
        for name, row in line["tasks"].items():
            last = max(step for step in range(line["step"]) if name in plan[step])
            assert row["lr"] == rates[last]
            assert row["grad_norm"] > 0
            assert 0 <= row["clipped_ratio"] <= 1
    assert {row["lr"] for line in lines for name, row in line["tasks"].items() if name == "b"} == {0.1}
    run(replace(config, optim=Optim(name="sgd", lr=0.1, clip_norm=0.0)), tmp_path / "unclipped")
    assert "clipped" not in (tmp_path / "unclipped" / "metrics.jsonl").read_text()


def test_single_non_finite_steps_are_skipped_and_the_run_goes_on(tmp_path):
    config = tiny_config(tasks={"a": tile_task(steps=30, batch=2, train=Poisoned(num_samples=50, bad_ratio=0.1))})
    outcome = run(config, tmp_path)
    assert outcome.step == 30
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    skipped = max(line["tasks"]["a"].get("skipped", 0) for line in last)
    assert 3 <= skipped <= 10
    assert all(t.isfinite().all() for t in tensors(tmp_path)["model"].values())


@pytest.mark.parametrize("eval_every_steps", mark_long([0, 10], [10]))
def test_a_signal_in_the_last_evaluation_loses_no_step(tmp_path, config, monkeypatch, eval_every_steps):
    config = change(config, eval_every_steps=eval_every_steps, save_every_steps=1000)
    straight = run(config, tmp_path / "straight")
    show = Log.show_evaluation

    def signal_and_show(log: Log, *progress) -> None:
        show(log, *progress)
        if log.progress.tasks[log.run_bar].completed == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "show_evaluation", signal_and_show)
    assert run(config, tmp_path / "stopped").signal == signal.SIGTERM
    newest = checkpoint.find_newest(tmp_path / "stopped")
    assert newest
    assert newest.step == 20
    monkeypatch.setattr(Log, "show_evaluation", show)
    resumed = run(config, tmp_path / "stopped")
    for task, row in straight.metrics.items():
        assert resumed.metrics[task]["loss"] == row["loss"]
    assert_equal_weights(tmp_path / "straight", tmp_path / "stopped")


@dataclass(frozen=True, kw_only=True)
class Unlabelled(Synthetic):
    """Synthetic samples that have no class, so that there is no average precision."""

    def samples(self, task: Task):
        return [replace(sample, labels=()) for sample in super().samples(task)]


def test_a_signal_between_two_tasks_of_an_update_counts_no_minibatch_twice(tmp_path, monkeypatch):
    config = tiny_config(schedule="accumulating", log_every_steps=5)
    run(config, tmp_path / "straight")
    forward_backward, calls = Step.forward_backward, []

    def signal_in_the_fourth_update(step, name, *arguments, **options):
        forward_backward(step, name, *arguments, **options)
        calls.append(name)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Step, "forward_backward", signal_in_the_fourth_update)
    assert run(config, tmp_path / "stopped").signal == signal.SIGTERM
    monkeypatch.setattr(Step, "forward_backward", forward_backward)
    run(config, tmp_path / "stopped")
    assert_equal_weights(tmp_path / "straight", tmp_path / "stopped")
    straight, stopped = (
        [
            {name: (row["steps"], row["loss"]) for name, row in line["tasks"].items()}
            for line in map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
            if line["kind"] == "train"
        ]
        for folder in ("straight", "stopped")
    )
    assert stopped == straight
    assert [row["a"][0] for row in straight] == [5, 5]


def json_values(folder: Path) -> Iterator[tuple[Path, object]]:
    """What every JSON file below a folder holds, by the letter of RFC 8259."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for path in sorted(folder.rglob("*.json*")):
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        yield from ((path, json.loads(text, parse_constant=refuse)) for text in texts)


def write_as_before(folder: Path) -> Path:
    """Put NaN back into the newest checkpoint's state.json, as versions up to 0.4 wrote it; gives that checkpoint's folder."""
    newest = checkpoint.find_newest(folder)
    assert newest
    path = newest.path / "state.json"
    content = path.read_text()
    assert '"mAP": null' in content
    path.write_text(content.replace('"mAP": null', '"mAP": NaN'))
    manifest = json.loads((newest.path / checkpoint.MANIFEST).read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"]["state.json"] = {"bytes": path.stat().st_size, "sha256": digest}
    (newest.path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    return newest.path


@pytest.mark.parametrize("earlier_version", mark_long([False, True], [True]), ids=["now", "0.4"])
def test_a_metric_that_does_not_exist_is_null_in_files_and_nan_again_when_read(tmp_path, config, earlier_version):
    tasks = config.tasks | {"b": replace(config.tasks["b"], val=Unlabelled(num_samples=30, seed=1))}
    config = change(config, tasks=tasks, eval_every_steps=10, save_every_steps=10, out=str(tmp_path))
    first = run_until(config, tmp_path, 12)
    assert math.isnan(first.metrics["b"]["mAP"])
    files = {path.name for path, _ in json_values(tmp_path)}
    assert {"state.json", "MANIFEST.json", "config.json", "metrics.jsonl"} <= files
    old = write_as_before(tmp_path) if earlier_version else None
    outcome = run(config, tmp_path)
    again = run(config, tmp_path)  # a finished one, whose numbers come from its checkpoint
    for found in (outcome, again):
        assert math.isnan(found.metrics["b"]["mAP"])
        [value] = [result.value for result in found.results if result.task == "b"]
        assert math.isnan(value)
    print_results(again.results)
    newest = checkpoint.find_newest(tmp_path)
    assert newest
    assert newest.state["metrics"]["b"]["mAP"] is None
    assert newest.state["best_score"] == pytest.approx(max(best_scores(tmp_path)))
    evaluation = evaluate_run(tmp_path, config, "best", (), lambda *done: None)
    print_evaluation(config, evaluation.rows)
    evaluation.append_to(tmp_path / "evaluations.jsonl")
    plot_run(tmp_path, tmp_path / "curves.png")
    if old:
        shutil.rmtree(old)
    assert "evaluations.jsonl" in {path.name for path, _ in json_values(tmp_path)}


def best_scores(folder: Path) -> list[float]:
    """The mean over the tasks of what there is, at every evaluation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["tasks"]["a"]["top1"] / 2 for line in lines if line["kind"] == "eval"]


def test_best_checkpoint_stays(tmp_path, config):
    run(config, tmp_path, eval_every_steps=4, save_every_steps=4, keep=1)
    newest = checkpoint.find_newest(tmp_path)
    assert newest
    steps = {int(path.name.split("_")[1]) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {20, newest.state["best_step"]}


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ({"save_every_steps": 5}, "step 5: .* the next try is in 5 steps, after step 10"),
        ({"save_every_steps": 8, "eval_every_steps": 5}, "step 5: .* the next try is in 3 steps, after step 8"),
        ({"save_every_steps": 12, "eval_every_steps": 15}, "step 12: .* the next try is in 3 steps, after step 15"),
        ({"save_every_steps": 13}, "step 13: .* the next try is in 7 steps, at the end"),
    ],
    ids=["save", "after an evaluation", "before an evaluation", "end"],
)
def test_full_disk_does_not_stop_training(tmp_path, config, monkeypatch, intervals, said):
    # Only `statvfs` lies: the saving code itself meets a disk with no room, then a disk with room.
    calls = []
    real = os.statvfs

    def full_at_first(path):
        calls.append(path)
        status = real(path)
        return status if len(calls) > 1 else os.statvfs_result((*status[:3], 0, 0, *status[5:]))

    monkeypatch.setattr(os, "statvfs", full_at_first)
    outcome = run(config, tmp_path, **intervals)
    assert outcome.step == 20
    [line] = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "Training goes on" in line]
    assert re.search(said, line)
    assert checkpoint.find_newest(tmp_path)


def test_unwritable_run_folder_is_refused(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the run folder .*file/run cannot be made: Not a directory; choose another with --out"):
        run(config, tmp_path / "file" / "run")


@pytest.mark.long
def test_sigterm_to_a_real_process_saves_and_resumes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "polyvit_fast",
        "train",
        "smoke",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        "--tasks.pictures.steps",
        "2000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    for line in process.stdout:
        if "step" in line and "loss" in line:
            process.send_signal(signal.SIGTERM)
            break
    output, _ = process.communicate()
    assert process.returncode == 75, output
    watchdog.cancel()
    newest = checkpoint.find_newest(tmp_path / "run")
    assert newest
    assert 0 < newest.step < 2024
    assert "stopped by SIGTERM" in output


def test_other_training_files_are_refused_on_resume(tmp_path, config):
    run_until(config, tmp_path, 7)
    with fewer_samples(config, 49), pytest.raises(ValueError, match="task a: its training files are not those of"):
        run(config, tmp_path)


@pytest.fixture
def pictures(tmp_path):
    """A run on twelve pictures in two classes."""
    for label in ("blue", "red"):
        (tmp_path / "files" / label).mkdir(parents=True)
        for number in range(6):
            Pillow.new("RGB", (30, 30), label).save(tmp_path / "files" / label / f"{number}.bmp")
    source = Folder(path=str(tmp_path / "files"))
    task = Task(modality=Image(size=32), train=source, val=source, num_classes=2, steps=9, batch=4)
    return tiny_config(tasks={"p": task}, save_every_steps=4)


def test_replaced_training_files_are_refused_on_resume_by_name(tmp_path, pictures, capsys):
    run_until(pictures, tmp_path / "run", 7)
    changed = tmp_path / "files" / "red" / "3.bmp"
    good, status = changed.read_bytes(), changed.stat()
    for content, word in ((good[:-3] + b"abc", "contents"), (good + b"x", "sizes")):
        changed.write_bytes(content)
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
        message = (
            rf"task p: its training files are not those of .* \({word} of {changed}\). Put them back to resume, allow the change with --"
        )
        with pytest.raises(ValueError, match=message):
            run(pictures, tmp_path / "run")
    Pillow.new("RGB", (31, 31), "red").save(changed)
    assert run(pictures, tmp_path / "run", changed_files="allow").results
    assert f"(sizes of {changed}); the run goes on with them as they are now" in capsys.readouterr().out.replace("\n", "")


def test_a_copy_of_the_training_files_resumes_bitwise_with_a_word(tmp_path, pictures, capsys):
    run(pictures, tmp_path / "straight")
    run_until(pictures, tmp_path / "run", 7)
    for file in (tmp_path / "files").rglob("*.bmp"):
        os.utime(file, (1, 1))
    capsys.readouterr()
    run(pictures, tmp_path / "run")
    printed = capsys.readouterr().out.replace("\n", "")
    assert "task p: some of its training files were written or copied since" in printed
    assert f"but have the sizes of then: {tmp_path / 'files' / 'blue' / '0.bmp'}" in printed
    assert "and 9 more" in printed
    assert_equal_weights(tmp_path / "straight", tmp_path / "run")


def test_changed_validation_files_are_reported_on_resume(tmp_path, pictures, capsys):
    shutil.copytree(tmp_path / "files", tmp_path / "val")
    task = replace(pictures.tasks["p"], val=Folder(path=str(tmp_path / "val")))
    config = replace(pictures, tasks={"p": task})
    run_until(config, tmp_path / "run", 7)
    changed = tmp_path / "val" / "red" / "3.bmp"
    Pillow.new("RGB", (30, 30), "green").save(changed)
    capsys.readouterr()
    assert run(config, tmp_path / "run").results
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"(contents of {changed}): its metrics are those of other files now" in printed


def test_a_checkpoint_that_knows_names_alone_resumes_with_a_word(tmp_path, pictures, capsys, monkeypatch):
    def save(folder, step, tensors, state, config, **more):  # as versions up to 0.4 did
        names = {"p": fingerprint_names(Folder(path=str(tmp_path / "files")).samples(pictures.tasks["p"]))}
        write(folder, step, tensors, state | {"samples": names}, config, **more)

    write = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        run_until(pictures, tmp_path / "run", 7)
    newest = checkpoint.find_newest(tmp_path / "run")
    assert newest
    assert newest.state["samples"]["p"].startswith("12 files, ")
    (tmp_path / "files" / "red" / "9.bmp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"names and labels: 12 files, \w+; now 13 files, \w+\)\. Put them back"):
        run(pictures, tmp_path / "run")
    (tmp_path / "files" / "red" / "9.bmp").unlink()
    capsys.readouterr()
    assert run(pictures, tmp_path / "run").results
    assert "is of an earlier version, which kept the names of training files but not their sizes" in capsys.readouterr().out


def test_other_class_names_are_refused_on_resume(tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("dog\ncat\nemu\n")
    config = tiny_config(tasks={"a": tile_task(val=NamedTiles(num_samples=9, classes=str(classes)))})
    run_until(config, tmp_path / "run", 5)
    newest = checkpoint.find_newest(tmp_path / "run")
    assert newest
    assert newest.state["classes"] == {"a": ["dog", "cat", "emu"]}
    classes.write_text("dog\nemu\ncat\n")
    with pytest.raises(
        ValueError, match=r"task a: its classes are not those of .*step_0*5: class 1 was 'cat' and is 'emu' now. Put them back"
    ):
        run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == {"a": ["dog", "cat", "emu"]}
    classes.write_text("dog\ncat\nemu\n")
    assert run(config, tmp_path / "run").signal == 0


@dataclass(frozen=True, kw_only=True)
class NamedTiles(Synthetic):
    """Synthetic samples whose classes a file names."""

    classes: str

    def class_names(self, task: Task) -> tuple[str, ...]:
        return tuple(Path(self.classes).read_text().split())


@contextmanager
def fewer_samples(config: Train, num_samples: int) -> Iterator[None]:
    """Inside, task a's source has lost files, as a folder does from which some were deleted."""
    samples = Synthetic.samples

    def fewer(self, task):
        return samples(self, task)[:num_samples] if self is config.tasks["a"].train else samples(self, task)

    Synthetic.samples = fewer
    try:
        yield
    finally:
        Synthetic.samples = samples


def test_too_many_broken_files_save_what_is_done(tmp_path):
    config = tiny_config(tasks={"a": tile_task(steps=40, train=Failing(num_samples=50))}, save_every_steps=1000, prefetch=1)
    with pytest.raises(DataError, match="more than max_bad_ratio"):
        run(config, tmp_path)
    newest = checkpoint.find_newest(tmp_path)
    assert newest
    assert newest.step > 0


@dataclass(frozen=True, kw_only=True)
class Failing(Synthetic):
    """Synthetic samples of which the first three cannot be decoded."""

    def decoder(self, task: Task, *, batch: int, train: bool, num_threads: int, device: str = "cpu") -> Decoder:
        inner = super().decoder(task, batch=batch, train=train, num_threads=num_threads)

        def decode(media, rngs):
            if any(one.path in ("synthetic:0", "synthetic:1", "synthetic:2") for one in media):
                raise ValueError("damaged")
            return inner(media, rngs)

        return decode


@pytest.fixture
def worsening(monkeypatch) -> list[int]:
    """Evaluations give task a the metrics of a run that gets worse after its second one; the list has the steps of all evaluations."""
    steps, values = [], iter([0.3, 0.5, 0.5, 0.4, 0.45, 0.4, 0.6, 0.1])

    def evaluate_and_replace(model, config, *arguments):
        rows = evaluate(model, config, *arguments)
        value = next(values, 0.1)
        return {name: row | {config.tasks[name].metric: value} for name, row in rows.items()}

    monkeypatch.setattr("polyvit_fast.train.loop.evaluate", evaluate_and_replace)
    log_evaluation = Log.log_evaluation
    monkeypatch.setattr(Log, "log_evaluation", lambda log, step, rows: (steps.append(step), log_evaluation(log, step, rows))[1])
    return steps


def test_a_run_that_does_not_improve_stops_and_says_how_to_go_on(tmp_path, config, worsening):
    config = change(config, eval_every_steps=2, early_stop_evaluations=3, keep=1)
    straight = run(config, tmp_path)
    assert (straight.step, straight.signal, worsening) == (10, 0, [2, 4, 6, 8, 10])  # as good as the best is no better
    said = (tmp_path / "log.txt").read_text()
    assert "stopped early after step 10 of 20: the mean metric was 0.5000 after step 4, and not above that in the 3 evaluations" in said
    assert f"polyvit-fast eval {tmp_path} --checkpoint best" in said
    assert "The learning rate was still 58% of its peak" in said
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000004", "step_00000010"}
    before = tensors(tmp_path)["model"]
    again = run(config, tmp_path)  # the same command does not train on
    assert (again.step, worsening[5:]) == (10, [])
    assert again.metrics == straight.metrics
    assert "this run has stopped early before, after step 10 of 20" in (tmp_path / "log.txt").read_text()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(tmp_path)["model"].items())


@pytest.mark.parametrize(("changes", "end"), [({"early_stop_evaluations": 0}, 20), ({"early_stop_evaluations": 4}, 12)])
def test_it_goes_on_where_more_or_no_limit_is_asked_for_as_if_it_had_not_stopped(tmp_path, config, worsening, changes, end):
    config = change(config, eval_every_steps=2, early_stop_evaluations=3)
    run(config, tmp_path / "stopped")
    outcome = run(change(config, **changes), tmp_path / "stopped")
    assert (outcome.step, worsening[5]) == (end, 12)
    straight = change(config, eval_every_steps=0, early_stop_evaluations=0)
    with signal_at(end, signal.SIGTERM):
        run(straight, tmp_path / "straight")
    assert_equal_weights(tmp_path / "straight", tmp_path / "stopped")


def test_evaluations_that_did_not_improve_are_counted_across_a_resumption(tmp_path, config, worsening):
    config = change(config, eval_every_steps=2, early_stop_evaluations=3)
    assert run_until(config, tmp_path, 7).step == 7
    assert run(config, tmp_path).step == 10
    assert worsening == [2, 4, 6, 8, 10]


def test_a_run_that_ends_has_not_stopped_early(tmp_path, config, worsening):
    outcome = run(config, tmp_path, eval_every_steps=4, early_stop_evaluations=3)
    assert (outcome.step, worsening) == (20, [4, 8, 12, 16, 20])
    assert "early" not in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("schedule", ["weighted", "accumulating"])
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.long)])
def test_fine_tuning_resumed_is_bitwise_the_straight_run(tmp_path, schedule, optimizer):
    write_pictures(tmp_path / "pictures")
    config = make_config(tmp_path / "pictures", schedule)
    config = replace(config, optim=replace(config.optim, name=optimizer))
    total = len(make_step_plan(config))
    straight = run(config, tmp_path / "straight")
    assert run_until(config, tmp_path / "resumed", total // 2).step == total // 2
    resumed = run(config, tmp_path / "resumed")
    assert_equal_weights(tmp_path / "straight", tmp_path / "resumed")
    assert {name: row["loss"] for name, row in straight.metrics.items()} == {name: row["loss"] for name, row in resumed.metrics.items()}
    newest = checkpoint.find_newest(tmp_path / "straight")
    assert newest
    start, average = PolyViT.from_config(config).state_dict(), newest.load_tensors("ema")
    frozen = {name for name in start if any(fnmatchcase(name, pattern) for pattern in config.optim.freeze)}
    assert len(frozen) == 12 + 4
    for tensors in (newest.load_tensors("model"), average):
        assert {name for name, tensor in tensors.items() if torch.equal(tensor, start[name])} == frozen
    assert not [name for name in newest.load_tensors("optimizer") if name.partition(".")[2] in frozen]
    evaluated = evaluate_run(tmp_path / "straight", config, "newest", (), lambda *done: None).rows
    assert {name: row["loss"] for name, row in evaluated.items()} == {name: row["loss"] for name, row in straight.metrics.items()}
