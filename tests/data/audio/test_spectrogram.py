import math

import numpy as np
import pytest
import torch
from long_forms import mark_long, pairs

from polyvit_fast.data.audio.spectrogram import log_mel, num_frames, num_samples
from polyvit_fast.data.dali import new_pipeline

RATE = 16_000
FRAMES = 12
TIME = np.arange(num_samples(FRAMES, RATE)) / RATE
RANDOM = np.random.default_rng(0)
SIGNALS = {
    "noise": RANDOM.normal(0, 0.1, len(TIME)),
    "loud": RANDOM.normal(0, 3000, len(TIME)),
    "drift": RANDOM.normal(0, 0.05, len(TIME)) + 0.8 * np.sin(2 * np.pi * 0.5 * TIME) + 0.1,
    "tones": 0.5 * np.sin(2 * np.pi * 440 * TIME) + 0.3 * np.sin(2 * np.pi * 3000 * TIME),
    "click": np.eye(1, len(TIME), 700)[0],
    "silence": 0 * TIME,
}
# Nepers. Bands 100 dB below a pure tone hold little but the rounding of float32.
LARGEST, MEAN = {"tones": 6e-3} | dict.fromkeys(SIGNALS.keys() - {"tones"}, 1e-3), 3e-4


def spectrogram(wave, form, rate=RATE, bins=128):
    wave = torch.from_numpy(np.asarray(wave, np.float32))
    return log_mel(wave[None], form=form, sample_rate_hz=rate, num_mel_bins=bins)[0].numpy()


def assert_close(ours, truth, signal):
    difference = np.abs(ours - truth)
    assert ours.shape == truth.shape
    assert difference.max() < LARGEST[signal]
    assert difference.mean() < MEAN


def power(frame, size):
    """Squared magnitudes of the discrete Fourier transform, from its definition."""
    turns = np.outer(np.arange(size // 2 + 1), np.arange(len(frame))) / size
    return np.abs(np.exp(-2j * np.pi * turns) @ frame) ** 2


def triangle(position, left, centre, right):
    if left < position <= centre:
        return (position - left) / (centre - left)
    return (right - position) / (right - centre) if centre < position < right else 0.0


def kaldi_reference(wave, rate, bins):
    """feat/feature-window.cc, feature-fbank.cc and mel-computations.cc of Kaldi, in float64."""
    window, shift = int(rate * 0.025), int(rate * 0.01)
    size = 2 ** math.ceil(math.log2(window))

    def mel(hertz):
        return 1127 * math.log(1 + hertz / 700)

    step = (mel(rate / 2) - mel(20)) / (bins + 1)
    rows = []
    for start in range(0, len(wave) - window + 1, shift):
        frame = wave[start : start + window] - wave[start : start + window].mean()
        emphasised = [frame[i] - 0.97 * frame[max(0, i - 1)] for i in range(window)]
        hann = [0.5 - 0.5 * math.cos(2 * math.pi * i / (window - 1)) for i in range(window)]
        energy = power(np.array(emphasised) * hann, size)
        bands = [[mel(20) + (b + side) * step for side in range(3)] for b in range(bins)]
        sums = [sum(triangle(mel(k * rate / size), *band) * energy[k] for k in range(size // 2)) for band in bands]
        rows.append([math.log(max(value, 1.1920928955078125e-07)) for value in sums])
    return np.array(rows)


def mbt_reference(wave, rate, bins):
    """Periodic Hamming window, HTK's mel scale (The HTK Book, 5.4), sides of the triangles straight in Hz, in float64."""
    window, shift = int(rate * 0.025), int(rate * 0.01)
    size = 2 ** math.ceil(math.log2(window))
    highest = 2595 * math.log10(1 + rate / 2 / 700)
    corners = [700 * (10 ** (highest * b / (bins + 1) / 2595) - 1) for b in range(bins + 2)]
    rows = []
    for start in range(0, len(wave) - window + 1, shift):
        hamming = [0.54 - 0.46 * math.cos(2 * math.pi * i / window) for i in range(window)]
        energy = power(wave[start : start + window] * hamming, size)
        sums = [sum(triangle(k * rate / size, *corners[b : b + 3]) * energy[k] for k in range(size // 2 + 1)) for b in range(bins)]
        rows.append([math.log(max(value, 1e-6)) for value in sums])
    return np.array(rows)


REFERENCES = {"kaldi": kaldi_reference, "mbt": mbt_reference}


@pytest.mark.parametrize(("signal", "form"), pairs(SIGNALS, REFERENCES))
def test_equals_the_definition(form, signal):
    wave = SIGNALS[signal].astype(np.float32)[: num_samples(4, RATE)]
    assert_close(spectrogram(wave, form), REFERENCES[form](wave.astype(float), RATE, 128), signal)


@pytest.mark.parametrize(
    ("rate", "bins"), mark_long([(8000, 40), (32_000, 64), (44_100, 128), (8000, 2), (1000, 128)], [(8000, 40), (1000, 128)])
)
@pytest.mark.parametrize("form", REFERENCES)
def test_other_rates_and_numbers_of_bands(form, rate, bins):
    wave = np.random.default_rng(1).normal(0, 0.1, num_samples(3, rate)).astype(np.float32)
    assert_close(spectrogram(wave, form, rate, bins), REFERENCES[form](wave.astype(float), rate, bins), "noise")


def plain_kaldi(wave):
    """The same steps as they are usually written in PyTorch."""
    from polyvit_fast.data.audio.spectrogram import _bands

    frames = wave.unfold(-1, 400, 160)
    frames = frames - frames.mean(-1, keepdim=True)
    frames = torch.cat([frames[..., :1] * 0.03, frames[..., 1:] - 0.97 * frames[..., :-1]], -1) * torch.hann_window(400, periodic=False)
    return (torch.fft.rfft(frames, 512).abs().square() @ _bands("kaldi", RATE, 128)).clamp_min(2.0**-23).log()


@pytest.mark.parametrize("signal", SIGNALS)
def test_error_is_at_most_twice_that_of_plain_pytorch(signal):
    wave = SIGNALS[signal].astype(np.float32)[: num_samples(4, RATE)]
    truth = kaldi_reference(wave.astype(float), RATE, 128)
    plain = np.abs(plain_kaldi(torch.from_numpy(wave)).numpy() - truth)
    ours = np.abs(spectrogram(wave, "kaldi") - truth)
    assert ours.mean() <= 2 * plain.mean() + 1e-5  # not the maximum, which comes from a band with next to no energy


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_kaldi_equals_the_feature_extractor_of_ast():
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor(do_normalize=False, max_length=FRAMES)
    for signal, wave in SIGNALS.items():
        wave = wave.astype(np.float32)
        theirs = extractor(wave, sampling_rate=RATE, return_tensors="np")["input_values"][0]
        assert_close(spectrogram(wave, "kaldi"), theirs, signal)


def test_mbt_equals_dalis_operators():
    pipeline, fn, types = new_pipeline(len(SIGNALS), 1)
    with pipeline:
        wave = fn.external_source(name="wave", dtype=types.FLOAT, ndim=1)
        window = torch.hamming_window(400).tolist()
        energy = fn.spectrogram(wave, nfft=512, window_length=400, window_step=160, window_fn=window, center_windows=False)
        bands = fn.mel_filter_bank(energy, sample_rate=RATE, nfilter=128, mel_formula="htk", normalize=False)
        pipeline.set_outputs(fn.to_decibels(bands, multiplier=math.log(10), reference=1.0, cutoff_db=math.log(1e-6)))
    pipeline.build()
    waves = [wave.astype(np.float32) for wave in SIGNALS.values()]
    [theirs] = pipeline.run(wave=waves)
    for i, (signal, wave) in enumerate(zip(SIGNALS, waves, strict=True)):
        assert_close(spectrogram(wave, "mbt"), theirs.at(i).T, signal)


@pytest.mark.parametrize("form", REFERENCES)
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_frames_are_as_many_as_asked_for(form, rate):
    for frames in (1, 2, 800):
        samples = num_samples(frames, rate)
        assert spectrogram(np.zeros(samples), form, rate).shape == (frames, 128)
        assert spectrogram(np.zeros(samples + rate // 100 - 1), form, rate).shape == (frames, 128)
        assert spectrogram(np.zeros(samples + rate // 100), form, rate).shape == (frames + 1, 128)
        assert [num_frames(samples + more, rate) for more in (-1, 0, rate // 100 - 1, rate // 100)] == [
            frames - 1,
            frames,
            frames,
            frames + 1,
        ]


def test_less_than_a_window_is_no_frame():
    assert [num_frames(samples, RATE) for samples in (0, 1, 79, 240, 399)] == [0] * 5


@pytest.mark.parametrize("form", REFERENCES)
def test_a_tone_falls_into_its_band(form):
    lowest = 20.0 if form == "kaldi" else 0.0
    lowest, highest = (1127 * math.log(1 + hertz / 700) for hertz in (lowest, 8000))
    for hertz in (500, 1000, 4000, 7000):
        expected = (1127 * math.log(1 + hertz / 700) - lowest) / (highest - lowest) * 129 - 1
        band = spectrogram(np.sin(2 * np.pi * hertz * TIME), form).mean(0).argmax()
        assert abs(band - expected) <= 1
