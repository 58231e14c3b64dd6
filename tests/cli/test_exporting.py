import pytest

from polyvit_fast import cli


def printed(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


def test_a_task_is_exported_and_compared(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(["export", str(trained), "--task", "motion", "--to", "hf", "--out", str(out), "--checkpoint", "best"]) == 0
    text, _ = printed(capsys)
    assert f"wrote README.md, config.json, model.safetensors and preprocessor_config.json in {out}" in text
    assert "the logits of transformers differ from the run's by at most" in text
    assert cli.run(["export", str(trained), "--task", "motion", "--to", "hf", "--out", str(out)]) == 2
    assert f"{out} is not empty; name another folder, or let its model be replaced with --overwrite" in printed(capsys)[1]
    assert cli.run(["export", str(trained), "--task", "motion", "--to", "safetensors", "--out", str(out), "--overwrite"]) == 0
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--to hf", "has several tasks: name one with"),
        ("--to hf --task shape", "has no task 'shape'; perhaps you meant 'shapes'"),
        (
            "--to timm --task motion",
            "task motion cannot be exported to timm: timm's VisionTransformer cannot hold this model: it takes",
        ),
        ("--to hf --task shapes --checkpoint 7", "holds no checkpoint '7'"),
    ],
)
def test_what_is_asked_wrongly_is_answered(trained, tmp_path, capsys, flags, message):
    assert cli.run(["export", str(trained), "--out", str(tmp_path / "out"), *flags.split()]) == 2
    assert message in printed(capsys)[1]


def test_help_shows_each_form(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.run(["export", "--help"])
    text, _ = printed(capsys)
    assert all(f"{name}:" in text for name in ("timm", "hf", "safetensors", "torch.export", "onnx"))
