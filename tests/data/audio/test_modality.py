import numpy as np
import pytest
import soundfile
import torch
from sound_files import SMALL

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.media import Media
from polyvit_fast.randomness import generator


def test_shape_of_the_tokens():
    audio = Audio()
    assert (audio.grid, audio.tubelet, audio.num_tokens, audio.eval_views) == ((1, 800, 128, 3), (1, 16, 16), 401, 1)
    assert audio.normalisation == ((-4.2677393,) * 3, (9.1379948,) * 3)
    assert Audio(eval_clips=4).eval_views == 4
    assert Audio(**SMALL).num_tokens == 5
    with pytest.raises(ValueError, match="rows = 1001 does not divide by the tubelet's 16"):
        Audio(clip_seconds=10.01).check_grid()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 0}, "patch = 0 must be at least 1"),
        ({"channels": 0}, "channels = 0 must be at least 1"),
        ({"eval_clips": 0}, "eval_clips = 0 must be at least 1"),
        ({"num_mel_bins": -1}, "num_mel_bins = -1 must be at least 1"),
        ({"clip_seconds": 0.0}, r"clip_seconds = 0\.0 must be positive"),
        ({"clip_seconds": 1.005}, r"clip_seconds = 1\.005 must be a whole number of hundredths"),
        ({"sample_rate_hz": 22_050}, "sample_rate_hz = 22050 must be a multiple of 100, from 1,000 to 1,000,000"),
        ({"sample_rate_hz": 500}, "sample_rate_hz = 500 must be a multiple of 100, from 1,000 to 1,000,000"),
        ({"freq_masks": -1}, "freq_masks = -1 must not be negative"),
        ({"freq_masks": 1, "freq_mask_bins": 129}, "freq_mask_bins = 129 must lie between 1 and 128"),
        ({"time_masks": 1, "time_mask_frames": 801}, "time_mask_frames = 801 must lie between 1 and 800"),
        ({"max_seconds": 0.0}, "max_seconds = 0.0 must be positive"),
        ({"std": 0.0}, "std = 0.0 must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Audio(**fields)


def test_other_views():
    assert Audio().with_views(4) == Audio(eval_clips=4)
    with pytest.raises(ValueError, match="audio: views are clips, such as 4, and not 4x3"):
        Audio().with_views(4, 3)


def test_asts_feature_extractor_makes_the_spectrogram_of_an_evaluation(tmp_path):
    """With the settings that it is given, of a sound that is shorter than a clip, and of one as long."""
    from transformers import ASTFeatureExtractor

    audio = Audio(clip_seconds=1.0, num_mel_bins=64, channels=1)
    found = audio.preprocessing
    settings = {key: value for key, value in found.hugging_face.items() if key != "feature_extractor_type"}
    extractor = ASTFeatureExtractor(**settings, mean=0.0, std=0.5)  # it divides by twice its std
    decoder = build_decoder(audio, batch=1, train=False, num_threads=1)
    for name, seconds in (("short", 0.7), ("whole", 1.015)):  # a clip of 100 rows ends with its last window
        samples = round(seconds * 16_000)
        wave = (np.random.default_rng(0).standard_normal(samples) * 3000).astype(np.int16)
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000)
        ours = decoder([Media(str(tmp_path / f"{name}.wav"))], [generator(0, "x")])[0, 0, 0, :, :, 0]
        theirs = torch.as_tensor(extractor(wave / 32768, sampling_rate=16_000, return_tensors="pt")["input_values"])[0]
        torch.testing.assert_close(ours, theirs.to(ours), rtol=0, atol=2e-3)
    assert (found.input_name, found.is_mono) == ("spectrogram", True)


@pytest.mark.parametrize("fields", [{"spectrogram": "mbt"}, {"sample_rate_hz": 8000}, {"padding": "waveform"}], ids=str)
def test_no_extractor_is_named_for_another_spectrogram(fields):
    found = Audio(**fields).preprocessing
    assert found.hugging_face == {}
    assert found.differences == ("No feature extractor of the library makes this spectrogram.",)
