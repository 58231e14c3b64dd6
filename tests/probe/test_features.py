from dataclasses import replace

import pytest
import torch
from tiny_runs import Tile, tile_task, tiny_config

from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.data.stream import Loader
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.probe.features import FeatureReader

REPORTS: list[str] = []


def reader(folder, config=None, seed=0) -> FeatureReader:
    REPORTS.clear()
    config = config or tiny_config()
    return FeatureReader(PolyViT.from_config(replace(config, seed=seed)), config, folder, REPORTS.append, lambda *_: None)


@pytest.mark.parametrize(("split", "count"), [("train", 50), ("val", 30)])
def test_features_are_what_heads_read_of_every_file(split, count, tmp_path):
    config = tiny_config()
    reading = reader(tmp_path, config)
    found = reading.read("b", split, tokens=True)
    task = config.tasks["b"]
    loader = Loader("b", replace(config, tasks={"b": replace(task, val=getattr(task, split))}), train=False)
    grids = torch.cat([loader.load_validation(start).grid for start in range(0, count, loader.size)])[:, 0]
    labels = torch.cat([loader.load_validation(start).labels for start in range(0, count, loader.size)])
    with torch.no_grad():
        tokens = reading.model.features(grids, "tile", task="b")
    torch.testing.assert_close(found.pooled, tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.tokens.float(), tokens, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.labels, labels)
    assert found.labels.shape == (count, 4)


def test_views_of_a_file_are_averaged_and_all_their_tokens_kept(tmp_path):
    config = tiny_config(tasks={"a": tile_task(modality=Tile(views=3))})
    found = reader(tmp_path, config).read("a", "val", tokens=True)
    assert found.pooled.shape == (30, 32)
    assert found.tokens.shape == (30, 3 * 5, 32)
    torch.testing.assert_close(found.pooled, found.tokens.float()[:, [0, 5, 10]].mean(1), rtol=1e-2, atol=1e-2)


def test_features_are_computed_once(tmp_path, monkeypatch):
    first = reader(tmp_path).read("a", "train", tokens=True)
    again = reader(tmp_path)
    monkeypatch.setattr(again, "_compute", None)
    second = again.read("a", "train", tokens=True)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("pooled", "tokens", "labels"))


@pytest.mark.parametrize("change", ["weights", "files", "modality", "tokens", "split"])
def test_they_are_computed_again_where_anything_is_other(change, tmp_path, monkeypatch):
    config = tiny_config()
    reader(tmp_path, config).read("a", "train", tokens=True)
    task = config.tasks["a"]
    if change == "files":
        config = tiny_config(tasks={"a": replace(task, train=Synthetic(num_samples=49))})
    elif change == "modality":
        config = tiny_config(tasks={"a": replace(task, modality=Tile(views=2))})
    again = reader(tmp_path, config, seed=int(change == "weights"))
    computed, compute = [], again._compute
    monkeypatch.setattr(again, "_compute", lambda *arguments: computed.append(1) or compute(*arguments))
    again.read("a", "val" if change == "split" else "train", tokens=change != "tokens")
    assert computed
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_file_of_features_is_replaced(tmp_path):
    first = reader(tmp_path).read("a", "val", tokens=False)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(reader(tmp_path).read("a", "val", tokens=False).pooled, first.pooled)
    assert [f"{path} is broken, its features are computed again"] == REPORTS


def test_tokens_beyond_all_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("polyvit_fast.probe.features.LARGEST_TOKENS_BYTES", 1000)
    with pytest.raises(ValueError, match=r"task a: the tokens of all its files need .*leave the attentive head out"):
        reader(tmp_path).read("a", "val", tokens=True)
