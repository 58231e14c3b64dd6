import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import change, tile_task, tiny_config

from polyvit_fast.config import Optim
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.probe.probing import RANDOM, ProbePlan, probe
from polyvit_fast.train.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(change(tiny_config(optim=Optim(name="adamw", lr=3e-3)), out=str(folder)), "test", ["test"])
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Fits of a few steps, and a few resamples: how well they do is the matter of other tests."""
    monkeypatch.setattr("polyvit_fast.probe.heads.STEPS", (60, 60))
    monkeypatch.setattr("polyvit_fast.probe.intervals.NUM_RESAMPLES", 20)


def new_tasks():
    task = tile_task(num_classes=4, train=Synthetic(num_samples=80, seed=5), val=Synthetic(num_samples=40, seed=6))
    many = replace(task, loss="sigmoid", multi_label=True)
    return tiny_config(tasks={"new": task, "many": many})


def run(source, folder, **options):
    reports: list[str] = []
    values = {"source": str(source), "config": new_tasks(), "folder": folder, "shots": (1, 5), **options}
    return probe(ProbePlan(**values), reports.append, lambda *_: None), reports


def test_all_heads_on_all_tasks_of_trained_and_random_weights(trained, tmp_path):
    results, reports = run(trained, tmp_path, compares_random=True)
    heads = [(row.weights, row.task, row.head, row.metric) for row in results]
    of_one = [("new", head, "top1") for head in ("linear", "attentive", "1-shot", "5-shot")]
    of_one += [("many", head, "mAP") for head in ("linear", "attentive")]
    assert heads == [(weights, *one) for weights in (str(trained), RANDOM) for one in of_one]
    assert all(0 <= row.estimate.low <= row.estimate.value <= row.estimate.high <= 1.0001 for row in results if row.head != "1-shot")
    assert {(row.num_train, row.num_val) for row in results} == {(80, 40)}
    assert reports[0].startswith(f"{trained} (run, step 20): ")
    assert reports.count("task many: few-shot heads need one class for each example; it has several") == 2
    linear = next(row for row in results if row.head == "linear" and row.task == "new" and row.weights == str(trained))
    assert linear.estimate.value > 0.8  # patterns that differ
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["source"] == str(trained)
    assert [row["head"] for row in written["results"]] == [row.head for row in results]
    assert written["results"][0]["estimate"] == results[0].estimate._asdict()


def test_a_probe_repeats_whether_its_features_are_kept_or_not(trained, tmp_path):
    first, _ = run(trained, tmp_path / "a", tasks=("new",))
    kept, _ = run(trained, tmp_path / "a", tasks=("new",))
    anew, _ = run(trained, tmp_path / "b", tasks=("new",))
    assert first == kept == anew


def test_the_trunk_stays_as_it_is_and_the_sizes_are_the_sources(trained, tmp_path):
    config = new_tasks()
    wide = replace(config, model=replace(config.model, dim=64, num_heads=8), init="nowhere")
    results, _ = run(trained, tmp_path, config=wide, tasks=("new",), heads=("linear",))
    same, _ = run(trained, tmp_path, tasks=("new",), heads=("linear",))
    assert results == same


def test_parts_of_the_model_come_from_their_sources_and_the_rest_is_random(trained, tmp_path):
    modality = new_tasks().tasks["new"].modality.name
    sources = {"whole": str(trained), "named": f"trunk={trained},{modality}={trained}", "trunk": f"trunk={trained}"}
    features = {}
    for name, source in sources.items():
        _, reports = run(source, tmp_path / name, tasks=("new",), heads=("linear",))
        assert len(reports) == 1
        (kept,) = (tmp_path / name / "features").glob("new-train-*.safetensors")
        features[name] = load_file(kept)["pooled"]
    assert torch.equal(features["named"], features["whole"])
    assert not torch.allclose(features["trunk"], features["whole"])
    for source in ("", f"new={trained}"):
        with pytest.raises(ValueError, match="names no trunk to probe"):
            run(source, tmp_path / "none", tasks=("new",))
    with pytest.raises(ValueError, match="init names the part 'smell'"):
        run(f"trunk={trained},smell={trained}", tmp_path / "other", tasks=("new",))


def test_what_is_not_there_is_named(trained, tmp_path):
    with pytest.raises(ValueError, match="the experiment has no task old; it has new, many"):
        run(trained, tmp_path, tasks=("old",))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        run(tmp_path / "nothing", tmp_path)
