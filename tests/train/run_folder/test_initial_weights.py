"""Runs that start from the weights of other runs and of other libraries' files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import Tile, change, tile_task, tiny_config
from torchvision_without_extension import declare_operators

from polyvit_fast.config import Model, Optim, Train
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.loop import train
from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.initial_weights import (
    describe_tokenizers,
    list_parts,
    load_initial_weights,
    read_checkpoint,
    read_source,
)

declare_operators()  # timm imports torchvision


def run(config: Train, folder: Path, **changes):
    return train(change(config, out=str(folder), **changes), "test", ["test"])


def newest(folder: Path):
    found = checkpoint.find_newest(folder)
    assert found
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of the tasks a and b, with a moving average of its weights."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    run(tiny_config(optim=Optim(name="adamw", lr=3e-3, ema_decay=0.9), keep=9, save_every_steps=10), folder)
    return folder


def start(config: Train, source) -> tuple[PolyViT, list]:
    model = PolyViT.from_config(config)
    return model, load_initial_weights(model, replace(config, init=source))


def test_a_run_gives_its_moving_average_and_its_heads(trained):
    model, [report] = start(tiny_config(), str(trained))
    average = newest(trained).load_tensors("ema")
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
    assert report.summarise() == f"{trained} (run, step 20): {len(average)} tensors copied"


@pytest.mark.parametrize(("which", "step"), [("@10", 10), ("@best", 20), ("@newest", 20)])
def test_any_checkpoint_of_a_run_may_be_named(trained, which, step):
    assert read_source(f"{trained}{which}").kind == f"run, step {step}"


def test_a_checkpoint_that_is_not_there_is_named(trained):
    with pytest.raises(ValueError, match="holds no checkpoint '7'; there are newest, best and the steps 10, 20"):
        read_source(f"{trained}@7")


def test_tasks_may_be_added_dropped_and_given_other_classes(trained):
    tasks = {"b": tile_task(num_classes=7), "new": tile_task()}
    model, [report] = start(tiny_config(tasks=tasks), str(trained))
    average, drawn = newest(trained).load_tensors("ema"), PolyViT.from_config(tiny_config(tasks=tasks)).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, drawn[name] if name.startswith("heads.") else average[name])
    assert "; 4 new (heads.b, heads.new)" in report.summarise()


def test_the_last_steps_weights_are_no_part_of_a_new_run(trained, tmp_path):
    """What a run starts from is its weights alone: its step is 0, and its optimizer has no moments."""
    outcome = run(tiny_config(), tmp_path / "second", init=str(trained))
    assert outcome.step == 20
    found = newest(tmp_path / "second")
    assert found.load_tensors("optimizer")["count"].item() == 20


def test_a_new_run_trains_on_from_the_source_and_says_so(trained, tmp_path, capsys):
    run(tiny_config(), tmp_path / "second", init=str(trained), log_every_steps=1)
    first = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    scratch = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    [name] = first["tasks"]
    assert first["tasks"][name]["loss"] < 0.5 * scratch["tasks"][name]["loss"]
    assert f"initial weights: {trained} (run, step 20): " in capsys.readouterr().out
    written = (tmp_path / "second" / "init.txt").read_text()
    assert written.startswith(f"{trained} (run, step 20)\n  ")
    assert written.count("\n") == 1 + len(newest(trained).load_tensors("model"))


def test_a_resumed_run_does_not_read_its_source_again(tmp_path):
    save_file(read_vit(), tmp_path / "vit.safetensors")
    config = tiny_config(init=str(tmp_path / "vit.safetensors"), model=Model(dim=64, depth=2, num_heads=1, mlp_dim=96))
    run(config, tmp_path / "run")
    (tmp_path / "vit.safetensors").unlink()
    assert run(config, tmp_path / "run").step == 20
    with pytest.raises(ValueError, match=r"it differs in: init: .*vit.safetensors. -> "):
        run(replace(config, init=""), tmp_path / "run")


def read_vit() -> dict[str, torch.Tensor]:
    """The tensors of a timm ViT with patches as `Tile` has them."""
    from foreign_models import timm_vit

    vit, _ = timm_vit(img_size=32, patch_size=8, num_heads=1, mlp_ratio=1.5)
    return {name: tensor.contiguous() for name, tensor in vit.state_dict().items()}


def test_another_librarys_weights_start_a_run(tmp_path):
    tensors = read_vit()
    save_file(tensors, tmp_path / "vit.safetensors")
    config = tiny_config(model=Model(dim=64, depth=2, num_heads=1, mlp_dim=96, gelu="erf"))
    model, [report] = start(config, str(tmp_path / "vit.safetensors"))
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], tensors["blocks.1.attn.qkv.weight"])
    kernel = tensors["patch_embed.proj.weight"].permute(0, 2, 3, 1)[:, None]
    assert torch.equal(model.state_dict()["tokenizers.tile.weight"], kernel)
    assert "tokenizers.tile.pos_embed resized from 4 × 4 to 2 × 2 (bilinear)" in report.summarise()


def test_parts_may_come_from_different_sources(trained, tmp_path):
    save_file(read_vit(), tmp_path / "vit.safetensors")
    config = tiny_config(model=Model(dim=64, depth=2, num_heads=1, mlp_dim=96))
    with pytest.raises(ValueError, match=r"first \(run, step 20\) has dim = 32, the model 64; num_heads = 2, the model 1; mlp_dim = 64"):
        start(config, {"tile": str(tmp_path / "vit.safetensors"), "a": str(trained)})
    model, reports = start(tiny_config(), {"tile": f"{trained}@10", "b": f"{trained}@20"})
    early, late = (found.load_tensors("ema") for found in sorted(checkpoint.iterate(trained), key=lambda one: one.step))
    drawn = PolyViT.from_config(tiny_config()).state_dict()
    for name, tensor in model.state_dict().items():
        expected = late if name.startswith("heads.b") else drawn if name.startswith("heads.a") else early
        assert torch.equal(tensor, expected[name]), name
    assert [report.kind for report in reports] == ["run, step 10", "run, step 20"]


@pytest.mark.parametrize(
    ("init", "parts"),
    [
        ("", {}),
        ("x", {"x": None}),
        ("tile=x", {"x": ["trunk", "tile"]}),
        ("a=y,tile=x", {"x": ["trunk", "tile"], "y": ["a"]}),
        ("trunk=y,tile=x,b=x", {"y": ["trunk"], "x": ["tile", "b"]}),
        ("a=x", {"x": ["a"]}),
    ],
)
def test_the_trunk_is_the_first_modalitys_unless_it_is_named(init, parts):
    assert list_parts(tiny_config(init=init)) == parts


def test_of_an_earlier_versions_checkpoint_the_grid_is_guessed(trained):
    found = newest(trained)
    assert found.state["tokenizers"] == json.loads(json.dumps(describe_tokenizers({"tile": Tile()})))
    for key in ("tokenizers", "modality_of"):
        found.state.pop(key)
    source = read_checkpoint(found, "old")
    assert source.tokenizers["tile"].tubelets is None
    assert {name: head.modality for name, head in source.heads.items()} == {"a": "tile", "b": "tile"}
