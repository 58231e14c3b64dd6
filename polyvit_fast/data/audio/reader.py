"""Sound files to mono waveforms of one sample rate. The kind of a file follows from its content, not from its name.

DALI decodes what libsndfile can, in batches: this is faster than PyAV, and gives libsndfile's samples, which FFmpeg does not always give
(it swaps the bytes of RIFX). PyAV (FFmpeg) decodes the rest: Ogg, MP3, AAC, WMA, videos. Channels are averaged either way. PyAV also
resamples, because DALI's resampler aliases: frequencies that the new rate cannot represent come back as others, at full strength.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from polyvit_fast.data.audio.header import SoundHeader, read_header
from polyvit_fast.data.audio.waves import Wave, check_size, decode, resample
from polyvit_fast.data.dali import Graph, new_pipeline, split_by_size
from polyvit_fast.data.threads import map_in_threads
from polyvit_fast.media import Media, MediaError

CHUNK_BYTES = 1 << 28  # files and waveforms at a time: whole songs of a batch would be gigabytes
LOUDEST = 1e12  # full scale is 1, in some files 2**31; the energy of this is still far below float32's maximum


class SoundReader:
    """Reads up to `batch` files at a time. The waveform of a file does not depend on the other files."""

    def __init__(self, *, batch: int, num_threads: int, sample_rate_hz: int, max_seconds: float) -> None:
        self.num_threads, self.sample_rate_hz, self.max_seconds = num_threads, sample_rate_hz, max_seconds
        self.waves = Graph(lambda: _decoding_pipeline(batch, num_threads))

    def read(self, media: Sequence[Media], use: Callable[[int, Wave], None]) -> None:
        """Call `use` with every file's index and waveform, from several threads, in no particular order. It must not keep the waveform.

        Raises MediaError when a file is no sound, is truncated or damaged, or lasts longer than `max_seconds`; the next call works.
        """
        headers = map_in_threads(self._read_header, media, self.num_threads)
        others = [i for i, header in enumerate(headers) if header is None]
        map_in_threads(lambda i: use(i, self._finish(*decode(media[i], self.max_seconds))), others, self.num_threads)
        known = [(i, header) for i, header in enumerate(headers) if header is not None]
        for chunk in split_by_size([header.num_bytes + 4 * header.samples for _, header in known], CHUNK_BYTES):
            self._read_with_dali({i: slice(header.tag_bytes, header.end) for i, header in known[chunk]}, media, use)

    def _read_header(self, media: Media) -> SoundHeader | None:
        header = read_header(media)
        if header is not None:
            check_size(header.samples, header.channels, header.sample_rate_hz, self.max_seconds)
        return header

    def _read_with_dali(self, parts: dict[int, slice], media: Sequence[Media], use: Callable[[int, Wave], None]) -> None:
        indices = list(parts)
        contents = map_in_threads(lambda i: np.frombuffer(media[i].read(), np.uint8)[parts[i]], indices, self.num_threads)
        failure = "truncated or damaged: its header is good, its samples cannot be decoded"
        waves, rates = self.waves.run(failure, content=contents)

        def finish(k: int) -> None:
            rate, wave = int(rates.at(k)), np.from_dlpack(waves[k])
            check_size(len(wave), 1, rate, self.max_seconds)  # some headers state less than libsndfile reads
            use(indices[k], self._finish(rate, wave))

        map_in_threads(finish, range(len(indices)), self.num_threads)

    def _finish(self, rate: int, wave: Wave) -> Float32[np.ndarray, " resampled"]:
        if not len(wave):
            raise MediaError("there are no samples in it")
        if not np.maximum(wave.max(), -wave.min()) <= LOUDEST:  # also true of NaN
            raise MediaError(f"some of its samples are infinite, not a number or beyond {LOUDEST:g}")
        return resample(wave, rate, self.sample_rate_hz)


def _decoding_pipeline(batch: int, num_threads: int) -> Any:
    """DALI graph from files to waveforms and their sample rates."""
    pipeline, fn, types = new_pipeline(batch, num_threads)
    with pipeline:
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(*fn.decoders.audio(content, downmix=True))
    pipeline.build()
    return pipeline
