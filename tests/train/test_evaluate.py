from dataclasses import replace

import pytest
import torch
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast.data.stream import Loader
from polyvit_fast.data.synthetic import Synthetic
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.randomness import generator
from polyvit_fast.train import checkpoint
from polyvit_fast.train.evaluate import evaluate, evaluate_run, find_checkpoint, view_logits
from polyvit_fast.train.loop import train


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
    torch.testing.assert_close(view_logits(model, "a", grid, "fp32"), by_hand)


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
    right = view_logits(model, "a", whole.grid, "fp32").argmax(1) == whole.labels
    assert row["top1"] == pytest.approx(right.float().mean().item())
    assert row["num_examples"] == 30


def test_evaluation_leaves_the_model_in_its_mode(config):
    model = untrained(config).train()
    evaluate(model, config, {"a": Loader("a", config, train=False)}, quiet)
    assert model.training


def test_a_runs_checkpoints_are_found_by_newest_best_and_step(tmp_path, config):
    config = replace(config, out=str(tmp_path), eval_every_steps=5, save_every_steps=5, keep=4)
    outcome = train(config, "test", ["test"])
    newest = checkpoint.newest(tmp_path)
    assert newest
    assert find_checkpoint(tmp_path, "newest").step == 20
    assert find_checkpoint(tmp_path, "best").step == newest.state["best_step"]
    assert find_checkpoint(tmp_path, "10").step == 10
    again = evaluate_run(tmp_path, config, "newest", ("b",), quiet)
    assert again.keys() == {"b"}
    assert again["b"]["mAP"] == outcome.metrics["b"]["mAP"]
    with pytest.raises(ValueError, match=r"no checkpoint '11'; there are newest, best and the steps 5, 10, 15, 20"):
        find_checkpoint(tmp_path, "11")
    with pytest.raises(ValueError, match="has no task c; it has a, b"):
        evaluate_run(tmp_path, config, "newest", ("c",), quiet)


def test_a_folder_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint yet"):
        find_checkpoint(tmp_path, "newest")
