"""A waveform in memory becomes the grid of a lossless file that holds it."""

import io

import numpy as np
import pytest
import soundfile
import torch
from generators import rngs
from sound_files import SMALL

from polyvit_fast.data.arrays import read_value
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.media import MediaError, MemoryMedia

AUDIO = Audio(**SMALL, eval_clips=3)
RATE = 22_050


def waves(channels=1, seconds=0.9):
    time = np.arange(round(RATE * seconds)) / RATE
    tones = [0.4 * np.sin(2 * np.pi * (300 + 170 * channel) * time * (1 + time)) for channel in range(channels)]
    return np.stack(tones).astype(np.float32)


def decode(media):
    return build_decoder(AUDIO, batch=1, train=False, num_threads=1)([media], rngs(1, 0))


def decode_file(wave, subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="WAV", subtype=subtype)
    return decode(MemoryMedia("file", content=file.getvalue()))


STEREO = waves(2)
FORMS = {
    "mono": (waves()[0], waves()[0]),
    "mono, one channel": (waves(), waves()[0]),
    "torchaudio's": (STEREO, STEREO.T),
    "soundfile's": (STEREO.T, STEREO.T),
    "tensor": (torch.from_numpy(STEREO), STEREO.T),
    "doubles": (STEREO.astype(np.float64), STEREO.T),
    "reversed twice, so not contiguous": (STEREO[:, ::-1].copy()[:, ::-1], STEREO.T),
    "louder than full scale": (3 * STEREO, 3 * STEREO.T),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [RATE, float(RATE), np.int64(RATE)], ids=["int", "float", "numpy"])
def test_a_waveform_in_any_form_is_that_of_a_file(form, rate):
    value, content = FORMS[form]
    [media] = read_value(AUDIO, (value, rate), "mine")
    assert media.name == "mine"
    torch.testing.assert_close(decode(media), decode_file(content), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "subtype", "scale"), [(np.int16, "PCM_16", 1 << 15), (np.int32, "PCM_32", 1 << 31)])
def test_whole_numbers(dtype, subtype, scale):
    wave = (waves()[0] * scale).astype(dtype)
    [media] = read_value(AUDIO, (wave, RATE), "mine")
    torch.testing.assert_close(decode(media), decode_file(wave, subtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (waves()[0], r"mine: an input of type ndarray does not say its sample rate; wanted is a pair \(waveform, rate\)"),
        ((waves()[0],), "an input of type tuple does not say its sample rate"),
        (([0.0, 0.1], RATE), "a waveform of type list cannot be read"),
        ((waves()[0], 0), "the sample rate 0 is no whole number of samples per second"),
        ((waves()[0], 16_000.5), "the sample rate 16000.5 is no whole number"),
        ((waves()[0], "16k"), "the sample rate '16k' is no whole number"),
        ((waves()[0] * 30_000, RATE), r"its samples reach 12,000, which is no full scale of 1"),
        ((waves()[0].astype(np.int64), RATE), "a waveform of int64 does not say its full scale"),
        ((waves(2, 0.9)[None], RATE), r"an array of shape \[1, 2, 19845\] is no waveform"),
        ((np.zeros(0, np.float32), RATE), r"an array of shape \[0\] is no waveform"),
        ((np.zeros((65, 700), np.float32), RATE), r"shape \[65, 700\] does not say which axis is that of channels"),
        ((np.zeros((2, 2), np.float32), RATE), "does not say which axis is that of channels"),
    ],
)
def test_what_is_no_waveform_is_refused_with_what_is_wanted(value, reason):
    with pytest.raises(ValueError, match=reason):
        read_value(AUDIO, value, "mine")


@pytest.mark.parametrize(
    ("wave", "rate", "reason"),
    [
        (np.full(9000, np.nan, np.float32), RATE, "some of its samples are infinite, not a number"),
        (waves()[0], 100, "its sample rate is 100 Hz"),
        (np.zeros(1 << 20, np.float32), 1000, "it lasts more than max_seconds = 900"),
    ],
)
def test_what_a_file_may_not_hold_either(wave, rate, reason):
    [media] = read_value(AUDIO, (wave, rate), "mine")
    with pytest.raises(MediaError, match=reason):
        decode(media)
