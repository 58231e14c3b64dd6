import pytest
import torch
from generators import rngs
from sound_files import RATE, SMALL, noise, tone, write

from polyvit_fast.data.audio import gpu as module
from polyvit_fast.data.audio.cpu import AudioDecoder
from polyvit_fast.data.audio.gpu import GpuAudioDecoder
from polyvit_fast.data.audio.modality import Audio
from polyvit_fast.media import Media, MediaError

AUDIOS = [
    Audio(**SMALL),
    Audio(**SMALL, spectrogram="mbt", eval_clips=3, channels=1),
    Audio(**SMALL, freq_masks=2, freq_mask_bins=9, time_masks=2, time_mask_frames=8),
]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    sounds = [
        ("a.wav", noise(2, RATE)),
        ("b.flac", noise(1, 44_100, 2)),
        ("c.wav", tone(900, 0.1, RATE)),
        ("d.mp3", noise(1.5, RATE, seed=2)),
    ]
    rates = (RATE, 44_100, RATE, RATE)
    return [Media(str(write(folder / name, wave, rate))) for (name, wave), rate in zip(sounds, rates, strict=True)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("audio", AUDIOS)
def test_a_batch_equals_the_cpu_form_sample_by_sample(media, audio, train, monkeypatch):
    on_cpu = AudioDecoder(audio, 4, train, 2)
    decoder = GpuAudioDecoder(on_cpu, torch.device("cpu"))
    for rows in (1, 100, 1 << 15):
        monkeypatch.setattr(module, "CHUNK_ROWS", rows)
        grid, expected = decoder(media, rngs(4)), on_cpu(media, rngs(4))
        assert (grid.shape, grid.dtype, grid.stride()) == (expected.shape, torch.float32, expected.stride())
        assert (grid - expected).abs().max() < 2e-3
        assert torch.equal(grid == audio.mean, expected == audio.mean)
        assert torch.equal(grid == 0, expected == 0)
    assert train or not (grid == audio.mean).any()
    assert train or (grid[2, :, :, -1] == 0).all() == (audio.spectrogram == "kaldi")  # the short one's last row


def test_masks_are_there(media):
    audio = AUDIOS[2]
    grid = GpuAudioDecoder(AudioDecoder(audio, 4, True, 2), torch.device("cpu"))(media, rngs(4))
    masked = grid[:, 0, 0, ..., 0] == audio.mean
    assert masked.all(1).any()
    assert masked.all(2).any()
    assert not masked.all()


def test_a_broken_file_is_reported_and_the_next_call_works(media, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no sound at all" * 9)
    decoder = GpuAudioDecoder(AudioDecoder(AUDIOS[0], 4, True, 2), torch.device("cpu"))
    assert decoder.graphs[0].pipeline is None
    before = decoder(media, rngs(4))
    with pytest.raises(MediaError):
        decoder([media[0], Media(str(tmp_path / "bad.wav"))], rngs(2))
    assert torch.equal(decoder(media, rngs(4)), before)
    assert decoder.memory_bytes() == (4 * 4 * decoder.decoder.samples, 0)
    decoder.release()
    assert decoder.graphs[0].pipeline is None
    assert torch.equal(decoder(media, rngs(4)), before)
