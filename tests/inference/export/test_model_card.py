"""What a model card says."""

import polyvit_fast as pf
from polyvit_fast.train.run_folder.checkpoint import find_checkpoint


def test_it_says_where_the_model_comes_from(run, tmp_path):
    exported = pf.export(run.folder, "hf", tmp_path / "out", task="shapes")
    text, found = (tmp_path / "out" / "README.md").read_text(), find_checkpoint(run.folder, "newest")
    assert text.startswith("---\nlibrary_name: transformers\n")
    for title in ("Load it", "Classes", "Metrics", "Input", "What differs from the run", "Where it comes from"):
        assert text.count(f"\n## {title}\n") == 1
    row = found.state["metrics"]["shapes"]
    assert f"| top1 | {row['top1']:.6g} |" in text
    assert "examples_per_second" not in text
    assert found.state["samples"]["shapes"]["list"] in text
    assert (run.folder / "command.txt").read_text().splitlines()[0] in text
    assert f"torch {__import__('torch').__version__}" in text
    assert ", ".join(pf.load(run.folder).classes["shapes"]) in text
    assert "It was trained together with motion, tones, chords, which are not in these files." in text
    assert "The weights are the moving average of the training's." in text
    assert f"they differ by at most {exported.comparison}" in text


def test_what_no_processor_does_is_said(run, tmp_path):
    pf.export(run.folder, "hf", tmp_path / "out", task="tones")  # 8 kHz, which AST's feature extractor is not for
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- No feature extractor of the library makes this spectrogram." in text
    assert "- These files describe no preprocessing: the library has none that makes this input." in text
    assert "The 3 channels of the grid are copies of one, which the model takes; their weights are added up." in text
    assert "sigmoid" not in text
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


def test_an_input_that_the_model_normalises(run, tmp_path):
    pf.export(run.folder, "torch.export", tmp_path / "out", task="chords")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Then the mean -4.2677393 is subtracted, and the rest divided by the std 9.1379948. The model does this itself." in text
    assert "Its input is called spectrogram: float32 [batch, 96 rows, 64 columns], any batch." in text
    assert "sigmoid gives each class's own probability" in text
