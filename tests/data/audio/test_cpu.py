from contextlib import suppress

import numpy as np
import pytest
import torch
from generators import rngs
from hypothesis import given, settings
from hypothesis import strategies as st
from sound_files import RATE, SMALL, encode, noise, tone, write

from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.data.audio.spectrogram import log_mel, num_samples
from polyvit_fast.data.decoders import build_decoder
from polyvit_fast.media import Media, MediaError

CLIP = num_samples(32, RATE)


def decode(audio, *paths, train=False, num_threads=2, seed=0):
    decoder = build_decoder(audio, batch=max(1, len(paths)), train=train, num_threads=num_threads)
    return decoder([Media(str(path)) for path in paths], rngs(len(paths), seed))


def picture(wave, audio):
    """The spectrogram of one clip, [rows, columns]."""
    wave = torch.from_numpy(np.asarray(wave, np.float32))
    return log_mel(wave[None], form=audio.spectrogram, sample_rate_hz=audio.sample_rate_hz, num_mel_bins=audio.num_mel_bins)[0]


def ramp(seconds):
    """A tone whose loudness doubles every second, so that a spectrogram tells from where it is."""
    wave = tone(1000, seconds, RATE, 1.0)
    return wave * 2.0 ** (np.arange(len(wave)) / RATE - seconds).astype(np.float32)


def starts(pictures, last_second):
    """The seconds at which clips of `ramp` begin, given that the loudest possible begins at `last_second`."""
    loudness = pictures.double().amax(-1).mean(-1)
    reference = picture(ramp(last_second + 0.335)[-CLIP:], Audio(**SMALL)).double().amax(-1).mean()
    return last_second + (loudness - reference) / (2 * np.log(2))


@pytest.mark.parametrize("form", ["kaldi", "mbt"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_a_file_of_just_a_clip(tmp_path, form, rate):
    audio = Audio(clip_seconds=0.5, num_mel_bins=64, spectrogram=form, sample_rate_hz=rate, channels=2)
    wave = noise(num_samples(50, rate) / rate, rate)
    write(tmp_path / "a.wav", wave, rate, "FLOAT")
    for train in (True, False):
        grid = decode(audio, tmp_path / "a.wav", train=train)
        assert (grid.shape, grid.dtype) == ((1, 1, 1, 50, 64, 2), torch.float32)
        assert torch.equal(grid[0, 0, 0, ..., 0], picture(wave[:, 0], audio))
        assert torch.equal(grid[..., 0], grid[..., 1])


def test_copies_for_the_channels_take_no_memory(tmp_path):
    grid = decode(Audio(), write(tmp_path / "a.wav", noise(1, RATE), RATE))
    assert grid.shape == (1, 1, 1, 800, 128, 3)
    assert grid.stride()[-1] == 0


def test_a_sound_at_another_rate(tmp_path):
    for rate in (8000, 44_100, 48_000):
        [[[bands]]] = decode(Audio(**SMALL), write(tmp_path / "a.flac", tone(1000, 1, rate), rate))[..., 0]
        [[[expected]]] = decode(Audio(**SMALL), write(tmp_path / "a.wav", tone(1000, 1, RATE), RATE))[..., 0]
        loud = expected > expected.max() - 7
        assert (bands - expected)[loud].abs().max() < 0.02


@pytest.mark.parametrize("seconds", [0.1, 0.3, 10 / RATE, 1 / RATE])
@pytest.mark.parametrize("audio", [Audio(**SMALL, padding="waveform"), Audio(**SMALL, spectrogram="mbt", eval_clips=3)])
def test_short_sounds_are_followed_by_silence(tmp_path, audio, seconds):
    wave = noise(seconds, RATE)
    write(tmp_path / "a.wav", wave, RATE, "FLOAT")
    padded = np.concatenate([wave[:, 0], np.zeros(CLIP - len(wave))])
    for train in (True, False):
        for view in decode(audio, tmp_path / "a.wav", train=train)[0]:
            assert torch.equal(view[0, ..., 0], picture(padded, audio))


@pytest.mark.parametrize(("samples", "rows"), [(1, 1), (399, 1), (400, 1), (559, 1), (560, 2), (3000, 17), (CLIP - 1, 31), (CLIP, 32)])
@pytest.mark.parametrize("audio", [Audio(**SMALL, eval_clips=3), Audio(**SMALL, spectrogram="mbt", padding="spectrogram")])
def test_the_spectrogram_of_a_short_sound_is_followed_by_zeros(tmp_path, audio, samples, rows):
    """In every view, at the end, and not in rows that the sound fills; of less than a window there is one row."""
    wave = noise(samples / RATE, RATE)
    write(tmp_path / "a.wav", wave, RATE, "FLOAT")
    padded = picture(np.concatenate([wave[:, 0], np.zeros(CLIP - len(wave))]), audio)
    for train in (True, False):
        for view in decode(audio, tmp_path / "a.wav", train=train)[0]:
            assert torch.equal(view[0, :rows, :, 0], padded[:rows])
            assert not view[0, rows:].any()


def test_of_a_longer_sound_nothing_is_padded(tmp_path):
    path = write(tmp_path / "a.wav", noise((CLIP + 1) / RATE, RATE), RATE, "FLOAT")
    for train in (True, False):
        grids = [decode(Audio(**SMALL, padding=padding), path, train=train) for padding in ("spectrogram", "waveform")]
        assert torch.equal(*grids)
        assert grids[0].all()


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.parametrize("seconds", [0.03, 0.4, 0.99, 1.0, 1.0125])
def test_a_short_sound_is_what_the_feature_extractor_of_ast_gives(tmp_path, seconds):
    from transformers import ASTFeatureExtractor

    audio = Audio(clip_seconds=1.0, channels=1)
    wave = noise(seconds, RATE)
    [theirs] = ASTFeatureExtractor(max_length=100)(wave[:, 0], sampling_rate=RATE, return_tensors="np")["input_values"]
    [[[ours]]] = decode(audio, write(tmp_path / "a.wav", wave, RATE, "FLOAT"))[..., 0]
    (mean,), (std,) = audio.normalisation
    assert np.abs((ours.numpy() - mean) / std - theirs).max() < 1e-3
    assert seconds > 1 or theirs[-1] == pytest.approx(0.467, abs=1e-3)


def test_masks_lie_over_the_padding_too(tmp_path):
    path = write(tmp_path / "a.wav", noise(0.1, RATE), RATE)
    audio = Audio(**SMALL, time_masks=1, time_mask_frames=32)
    rows = decode(audio, *[path] * 100, train=True)[:, 0, 0, :, 0, 0]
    assert set(rows[:, -1].tolist()) == {0.0, torch.tensor(audio.mean).item()}


@pytest.mark.parametrize(("form", "floor"), [("kaldi", 2.0**-23), ("mbt", 1e-6)])
def test_silence_is_the_floor_of_the_logarithm(tmp_path, form, floor):
    grid = decode(Audio(**SMALL, spectrogram=form), write(tmp_path / "a.flac", np.zeros((RATE, 6)), RATE))
    assert grid.numpy() == pytest.approx(np.log(floor), abs=1e-5)


def test_training_starts_anywhere_with_equal_probability(tmp_path):
    path = write(tmp_path / "a.wav", ramp(3), RATE, "FLOAT")
    last = 3 - CLIP / RATE
    begun = starts(decode(Audio(**SMALL), *[path] * 300, train=True)[:, 0, 0, ..., 0], last) / last
    assert begun.min() == pytest.approx(0, abs=0.02)
    assert begun.max() == pytest.approx(1, abs=0.02)
    assert begun.mean() == pytest.approx(0.5, abs=0.06)
    assert begun.std() == pytest.approx(12**-0.5, abs=0.03)


@pytest.mark.parametrize(("clips", "expected"), [(1, [0.5]), (2, [0, 1]), (4, [0, 1 / 3, 2 / 3, 1])])
def test_evaluation_clips_are_evenly_spaced(tmp_path, clips, expected):
    wave = ramp(3)
    audio = Audio(**SMALL, eval_clips=clips)
    grid = decode(audio, write(tmp_path / "a.wav", wave, RATE, "FLOAT"))
    assert grid.shape == (1, clips, 1, 32, 32, 3)
    for view, fraction in zip(grid[0, :, 0, ..., 0], expected, strict=True):
        start = round(fraction * (len(wave) - CLIP))
        assert (view - picture(wave[start : start + CLIP], audio)).abs().max() < 1e-3


MASKED = Audio(**SMALL, freq_masks=2, freq_mask_bins=8, time_masks=1, time_mask_frames=10)


def test_masks_have_the_wanted_sizes_and_the_mean(tmp_path):
    path = write(tmp_path / "a.wav", noise(1, RATE), RATE)
    one_of_each = Audio(**SMALL, freq_masks=1, freq_mask_bins=8, time_masks=1, time_mask_frames=10, mean=-3.0)
    masked = decode(one_of_each, *[path] * 300, train=True)[:, 0, 0, ..., 0] == -3
    columns, rows = masked.all(1), masked.all(2)
    assert torch.equal(masked, columns[:, None] | rows[..., None])
    for lines, widest in ((columns, 8), (rows, 10)):
        widths = lines.sum(1)
        edges = torch.nn.functional.pad(lines.int(), (1, 1)).diff().clamp_min(0).sum(1)
        assert edges.max() == 1
        assert sorted(widths.unique().tolist()) == list(range(widest + 1))
        assert widths.double().mean() == pytest.approx(widest / 2, abs=0.5)
        assert lines.any(0).all()
    assert not (decode(one_of_each, path) == -3).any()
    assert (decode(MASKED, *[path] * 50, train=True)[:, 0, 0, ..., 0] == MASKED.mean).all(1).sum(1).max() > 8


SECONDS = (1.0, 0.4, 0.6, 1.3, 2.0, 0.5, 0.8)


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """Files of both ways of decoding, of several rates and lengths."""
    folder = tmp_path_factory.mktemp("seven")
    kinds = ((".wav", 16_000), (".flac", 16_000), (".mp3", 44_100), (".flac", 44_100), (".m4a", 48_000), (".wav", 8000), (".ogg", 22_050))
    files = enumerate(zip(kinds, SECONDS, strict=True))
    return [write(folder / f"{i}{suffix}", noise(seconds, rate, 1 + i % 2, i), rate) for i, ((suffix, rate), seconds) in files]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("audio", [MASKED, Audio(clip_seconds=0.9, spectrogram="mbt", eval_clips=3)])
def test_a_sample_depends_on_its_own_generator_only(seven, audio, train):
    decoder = build_decoder(audio, batch=7, train=train, num_threads=2)
    media = [Media(str(path)) for path in seven]
    batch = decoder(media, rngs(7)).clone()
    assert torch.equal(decoder(media, rngs(7)), batch)
    assert torch.equal(decode(audio, *seven, train=train, num_threads=1), batch)
    singles = [decoder([one], [rng]) for one, rng in zip(media, rngs(7), strict=True)]
    assert torch.equal(torch.cat(singles), batch)
    assert torch.equal(decoder(media[::-1], rngs(7)[::-1]).flip(0), batch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(decoder(media, rngs(7)), batch)
    finally:
        torch.set_num_threads(threads)
    other = decoder(media, rngs(7, seed=1))
    differs = [not torch.equal(a, b) for a, b in zip(other, batch, strict=True)]
    assert differs == [train and seconds > audio.clip_seconds for seconds in SECONDS]


def test_a_batch_stays_as_it_is_when_later_ones_are_decoded(seven):
    decoder = build_decoder(Audio(**SMALL), batch=7, train=True, num_threads=2)
    media = [Media(str(path)) for path in seven]
    batch = decoder(media, rngs(7))
    before = batch.clone()
    for seed in range(1, 6):
        decoder(media, rngs(7, seed))
    assert torch.equal(batch, before)


@pytest.fixture(scope="module")
def decoders():
    return [build_decoder(Audio(**SMALL), batch=3, train=train, num_threads=2) for train in (True, False)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404 not found</html>" * 9, "not a sound that can be decoded: it is an HTML page, perhaps from a download that failed"),
        (encode(noise(1, RATE), RATE, ".flac")[:9000], "truncated or damaged"),
        (encode(noise(1, RATE) * np.nan, RATE, ".wav", "FLOAT"), "some of its samples are infinite, not a number or"),
        (encode(noise(901, 1000), 1000, ".wav"), "it lasts more than max_seconds = 900"),
    ],
)
def test_a_broken_file_raises_and_the_next_batch_works(tmp_path, decoders, content, reason):
    bad, good = tmp_path / "bad.wav", write(tmp_path / "good.wav", noise(0.2, RATE), RATE)
    bad.write_bytes(content)
    for decoder in decoders:
        before = decoder([Media(str(good))], rngs(1)).clone()
        with pytest.raises(MediaError, match=reason):
            decoder([Media(str(good)), Media(str(bad)), Media(str(good))], rngs(3))
        assert torch.equal(decoder([Media(str(good))], rngs(1)), before)


WHOLE = {suffix: encode(noise(0.2, RATE), RATE, suffix) for suffix in (".wav", ".flac", ".mp3", ".ogg", ".aiff")}
WHOLE[".m4a"] = encode(noise(0.2, 48_000), 48_000, ".m4a")


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=4)), max_size=4),
    st.one_of(st.none(), st.integers(1, 3000)),
)
def test_damaged_bytes_give_a_spectrogram_or_a_reason(decoders, tmp_path_factory, suffix, changes, cut):
    content = bytearray(WHOLE[suffix])
    for at, replacement in changes:
        content[at : at + len(replacement)] = replacement
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[:cut])
    for decoder in decoders:
        with suppress(MediaError):
            assert decoder([Media(str(path))], rngs(1)).isfinite().all()
