import json
import math
import shutil
import time
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image as Pillow
from processes import run_processes, run_together
from tiny_runs import Tile, change, tile_task, tiny_config

from polyvit_fast.config import Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.manifest import Folder
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import DataError, Loader, label_tensor
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.randomness import generator
from polyvit_fast.train.distributed.process_group import World
from polyvit_fast.train.evaluate import Evaluation, average_logits, evaluate, evaluate_run, find_checkpoint
from polyvit_fast.train.loop import train
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.checkpoint import Checkpoint


def untrained(config):
    """A model with heads that do not answer alike everywhere."""
    model = PolyViT.from_config(config)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    return model


def quiet(task, done, total):
    pass


def test_logits_are_averaged_over_views():
    config = tiny_config(tasks={"a": tile_task(modality=Tile(views=3))})
    model = untrained(config)
    grid = torch.randn(5, 3, 1, 16, 16, 3)
    by_hand = torch.stack([model(grid[:, view], "a") for view in range(3)]).mean(0)
    torch.testing.assert_close(average_logits(model, "a", grid, "fp32"), by_hand)


@pytest.mark.parametrize(("batch", "views"), [(8, 1), (7, 1), (64, 1), (8, 3)])
def test_every_sample_counts_once_whatever_the_batch(batch, views):
    config = tiny_config(tasks={"a": tile_task(batch=batch, modality=Tile(views=views), val=Synthetic(num_samples=30, seed=1))})
    model = untrained(config)
    loader = Loader("a", config, train=False)
    row = evaluate(model, config, {"a": loader}, quiet)["a"]
    media = [sample.media for sample in loader.samples][: loader.size]
    grids = loader.decoder(media, [generator(i) for i in range(len(media))])
    assert grids.shape[:2] == (min(loader.size, 30), views)
    whole = Loader("a", replace(config, tasks={"a": replace(config.tasks["a"], batch=30 * views)}), train=False).load_validation(0)
    right = average_logits(model, "a", whole.grid, "fp32").argmax(1) == whole.labels
    assert row["top1"] == pytest.approx(right.float().mean().item())
    assert row["num_examples"] == 30


@dataclass(frozen=True, kw_only=True)
class Slow(Synthetic):
    """Samples whose decoder takes its time, above all for its first batch."""

    first_seconds: float
    seconds: float = 0.05

    def decoder(self, task, **options):
        decode, left = super().decoder(task, **options), [self.first_seconds]

        def decode_late(media, rngs):
            time.sleep(left.pop() if left else self.seconds)
            return decode(media, rngs)

        return decode_late


def test_the_rate_is_that_of_the_batches_after_the_first():
    config = tiny_config(tasks={"a": tile_task(val=Slow(num_samples=30, seed=1, first_seconds=2.0))})
    rate = evaluate(untrained(config), config, {"a": Loader("a", config, train=False)}, quiet)["a"]["examples_per_second"]
    assert 30 / 2.0 < rate < (30 - 8) / (3 * 0.05)


def test_the_rate_of_a_single_batch_is_that_of_the_model():
    config = tiny_config(tasks={"a": tile_task(batch=64, val=Slow(num_samples=30, seed=1, first_seconds=2.0))})
    row = evaluate(untrained(config), config, {"a": Loader("a", config, train=False)}, quiet)["a"]
    assert row["num_examples"] == 30
    assert row["examples_per_second"] > 30 / 2.0


def test_evaluation_leaves_the_model_in_its_mode(config):
    model = untrained(config).train()
    evaluate(model, config, {"a": Loader("a", config, train=False)}, quiet)
    assert model.training


def test_a_runs_checkpoints_are_found_by_newest_best_and_step(tmp_path, config):
    config = change(config, out=str(tmp_path), eval_every_steps=5, save_every_steps=5, keep=4)
    outcome = train(config, "test", ["test"])
    newest = checkpoint.find_newest(tmp_path)
    assert newest
    assert find_checkpoint(tmp_path, "newest").step == 20
    assert find_checkpoint(tmp_path, "best").step == newest.state["best_step"]
    assert find_checkpoint(tmp_path, "10").step == 10
    again = evaluate_run(tmp_path, config, "newest", ("b",), quiet).rows
    assert again.keys() == {"b"}
    assert again["b"]["mAP"] == outcome.metrics["b"]["mAP"]
    with pytest.raises(ValueError, match=r"no checkpoint '11'; there are newest, best and the steps 5, 10, 15, 20"):
        find_checkpoint(tmp_path, "11")
    with pytest.raises(ValueError, match="has no task c; it has a, b"):
        evaluate_run(tmp_path, config, "newest", ("c",), quiet)


def trained_on_colours(tmp_path):
    """A run on pictures of three colours, whose training files are gone: the machine that evaluates need not have them."""
    for split in ("train", "val"):
        for label, colour in enumerate(("red", "green", "blue")):
            (tmp_path / split / colour).mkdir(parents=True)
            for i in range(4):
                Pillow.new("RGB", (32 + i, 32), (200 * (label == 0), 200 * (label == 1), 200 * (label == 2))).save(
                    tmp_path / split / colour / f"{i}.png"
                )
    sources = {split: Folder(path=str(tmp_path / split)) for split in ("train", "val")}
    task = tile_task(modality=Image(size=16, patch=8), **sources, steps=30)
    config = tiny_config(tasks={"colours": task}, out=str(tmp_path / "run"))
    assert train(config, "test", ["test"]).metrics["colours"]["top1"] > 0.9
    shutil.rmtree(tmp_path / "train")
    return config


def test_a_checkpoint_that_stored_no_classes_takes_the_validation_folders(tmp_path, capsys, monkeypatch):
    config = trained_on_colours(tmp_path)
    load = Checkpoint.load_tensors

    def forget(self, name):  # as in a run of 0.4
        self.state.pop("classes", None)
        return load(self, name)

    monkeypatch.setattr(Checkpoint, "load_tensors", forget)
    assert evaluate_run(tmp_path / "run", config, "newest", (), quiet).rows["colours"]["top1"] > 0.9
    assert "the order of its classes is that of the validation files" in capsys.readouterr().out


def test_a_checkpoints_classes_rule_its_evaluation(tmp_path):
    config = trained_on_colours(tmp_path)
    shutil.rmtree(tmp_path / "val" / "blue")  # green and red alone would be numbers 0 and 1
    assert evaluate_run(tmp_path / "run", config, "newest", (), quiet).rows["colours"]["top1"] > 0.9
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "crimson")
    message = (
        r"task colours: .*val: 2 class folders \(crimson, green\), but 'crimson' is not in .*step_0*30: it was trained on 3 classes \(blue"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_run(tmp_path / "run", config, "newest", (), quiet)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint yet"):
        find_checkpoint(tmp_path, "newest")


@dataclass(frozen=True, kw_only=True)
class Broken(Synthetic):
    """Some of its samples cannot be read, in a batch or alone."""

    numbers: tuple[int, ...] = ()

    def decoder(self, task, **options):
        decode = super().decoder(task, **options)

        def decode_good(media, rngs):
            if any(int(one.path.partition(":")[2]) in self.numbers for one in media):
                raise ValueError("damaged")
            return decode(media, rngs)

        return decode_good


def uneven_config(**changes) -> Train:
    """No number of samples divides by the batch or the processes; batches 2 and 3 of task c hold nothing good."""
    mine = {"batch": 4, "num_classes": 7}
    tasks = {
        "a": tile_task(**mine, val=Broken(num_samples=30, seed=1, numbers=(0, 17))),
        "b": tile_task(**mine, val=Synthetic(num_samples=13, seed=1), loss="sigmoid", multi_label=True, modality=Tile(views=2)),
        "c": tile_task(**mine, val=Broken(num_samples=14, seed=1, numbers=tuple(range(8, 14)))),
    }
    return tiny_config(tasks=tasks, max_bad_ratio=0.9, **changes)


def evaluated(world: World) -> dict[str, object]:
    """Both evaluations of a run, of which the second knows the broken files, and the progress of the first."""
    config, progress = uneven_config(), []
    loaders = {name: Loader(name, config, train=False, rank=world.rank, world_size=world.size) for name in config.tasks}
    model = untrained(config)
    rows = evaluate(model, config, loaders, lambda *done: progress.append(done), world)
    again = evaluate(model, config, loaders, quiet, world)
    for row in (*rows.values(), *again.values()):
        assert row.pop("examples_per_second") > 0
    return {"rows": rows, "again": again, "progress": progress}


def test_processes_evaluate_as_one():
    alone = evaluated(World())
    assert {name: (row["num_examples"], row["num_broken"]) for name, row in alone["rows"].items()} == {
        "a": (28, 2),
        "b": (13, 0),
        "c": (8, 6),
    }
    assert 0 < alone["rows"]["b"]["mAP"] < 1
    for size in (2, 4):
        found = run_together(size, evaluated)
        assert all(one["rows"] == one["again"] == alone["rows"] for one in found)  # to the last digit
        assert all(one["progress"] == found[0]["progress"] for one in found)
        assert found[0]["progress"] == [
            (task, done, total)
            for task, done, total in alone["progress"]
            if done == total or done % (4 // (2 if task == "b" else 1) * size) == 0
        ]


def broken_on_one(world: World) -> str:
    task = tile_task(batch=4, val=Broken(num_samples=14, numbers=(8, 9)))  # both in the third batch, which is the first process's
    config = tiny_config(tasks={"c": task})
    try:
        evaluate(untrained(config), config, {"c": Loader("c", config, train=False)}, quiet, world)
    except DataError as error:
        return str(error)
    return "nothing"


def test_a_process_that_cannot_go_on_stops_all():
    first, second = run_together(2, broken_on_one)
    assert first.startswith("task c: 2 of 14 files are broken")
    assert second == f"process 0: {first}"


def test_a_run_is_evaluated_by_several_processes(tmp_path):
    config = uneven_config()
    checkpoint.save(tmp_path, 3, {"model": untrained(config).state_dict()}, {"best_step": None}, {}, keep=1)
    expected = evaluate_run(tmp_path, config, "newest", (), quiet).rows
    first, other = (evaluation.rows for evaluation in run_processes(2, evaluate_run, tmp_path, config, "newest", ("a", "c"), quiet))
    assert other == {}
    assert first.keys() == {"a", "c"}
    assert all(first[name][key] == expected[name][key] for name in first for key in ("top1", "top5", "loss", "num_examples", "num_broken"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_lines_are_added_to_a_file(tmp_path):
    path, started_at = tmp_path / "deep" / "evaluations.jsonl", time.time()
    one = Evaluation(7, "val", {"a": 3}, {"a": {"top1": 0.5, "top5": math.nan}})
    one.append_to(path)
    replace(one, split="test").append_to(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("time") >= started_at - 1 for line in lines)
    expected = {"step": 7, "split": "val", "views": {"a": 3}, "tasks": {"a": {"top1": 0.5, "top5": None}}}
    assert lines == [expected, expected | {"split": "test"}]


def test_nothing_that_can_be_read_is_an_error():
    config = uneven_config()
    task = replace(config.tasks["c"], val=Broken(num_samples=5, numbers=(0, 1, 2, 3, 4)))
    config = change(config, tasks={"c": task}, max_bad_ratio=1.0)
    with pytest.raises((ValueError, DataError), match="task c: "):
        evaluate(untrained(config), config, {"c": Loader("c", config, train=False)}, quiet)


def test_the_batch_of_an_evaluation_does_not_depend_on_the_processes():
    for batch, micro_batches, views, size in ((8, 1, 1, 8), (8, 2, 1, 4), (8, 1, 3, 2), (4096, 1, 1, 128), (4096, 1, 4, 32), (2, 1, 4, 1)):
        config = tiny_config(tasks={"a": tile_task(batch=batch, micro_batches=micro_batches, modality=Tile(views=views))})
        assert {Loader("a", config, train=False, rank=1, world_size=world_size).size for world_size in (2, 3, 512)} == {size}


def test_every_answer_is_kept_in_the_order_of_the_samples():
    config, kept = uneven_config(), []
    loaders = {name: Loader(name, config, train=False) for name in config.tasks}
    rows = evaluate(untrained(config), config, loaders, quiet, keep=lambda loader, *answers: kept.append((loader.name, *answers)))
    for name, loader in loaders.items():
        indices = [index for task, numbers, *_ in kept if task == name for index in numbers]
        broken = getattr(loader.source, "numbers", ())
        assert indices == [index for index in range(len(loader.samples)) if index not in broken]
        labels = torch.cat([labels for task, _, _, labels in kept if task == name])
        logits = torch.cat([logits for task, _, logits, _ in kept if task == name])
        assert torch.equal(labels, label_tensor(loader.task, [loader.samples[index] for index in indices]))
        if "top1" in rows[name]:
            assert (logits.argmax(1) == labels).double().mean().item() == pytest.approx(rows[name]["top1"])


def test_another_split_is_evaluated(tmp_path):
    config = tiny_config()
    config = replace(config, tasks=config.tasks | {"a": replace(config.tasks["a"], test=Synthetic(num_samples=11, seed=2))})
    checkpoint.save(tmp_path, 3, {"model": untrained(config).state_dict()}, {"best_step": None}, {}, keep=1)
    for split, counts in (("val", {"a": 30, "b": 30}), ("train", {"a": 50, "b": 50}), ("test", {"a": 11})):
        found = evaluate_run(tmp_path, config, "newest", (), quiet, split=split)
        assert {name: row["num_examples"] for name, row in found.rows.items()} == counts
        assert (found.step, found.split, found.views) == (3, split, dict.fromkeys(counts, 1))
    with pytest.raises(ValueError, match=r"task b has no test files: its Task in the experiment has no test=…, a source"):
        evaluate_run(tmp_path, config, "newest", ("a", "b"), quiet, split="test")
    with pytest.raises(ValueError, match="task a has no test files"):
        evaluate_run(tmp_path, tiny_config(), "newest", (), quiet, split="test")
