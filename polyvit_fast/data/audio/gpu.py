"""Audio on the GPU: spectrograms. DALI decodes no sound on a GPU, so the CPU decodes and resamples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from polyvit_fast.data.audio.cpu import AudioDecoder
from polyvit_fast.data.device import GpuDecoder, send, send_array
from polyvit_fast.media import Media

CHUNK_ROWS = 1 << 15  # spectrogram rows at a time: 64 MiB for each intermediate result at 16 kHz


class GpuAudioDecoder(GpuDecoder):
    """The grids of `decoder`, made on a GPU: the same clips and masks, and logarithms of energies that differ by less than 0.002.

    TF32, where the process allows it for matrix products, accounts for 0.001 of that. Bands that are weaker than the strongest one by
    more than float32 can represent (120 dB) are noise in either form.
    """

    def __init__(self, decoder: AudioDecoder, device: torch.device) -> None:
        super().__init__(None, device)
        self.decoder = decoder
        self.graphs = [decoder.reader.waves]

    def decode(self, media: Sequence[Media], rngs: Sequence[np.random.Generator]) -> Float32[Tensor, "sample view 1 rows columns channels"]:
        """Only the clips, not the whole sounds, go to the device."""
        decoder = self.decoder
        _, rows, columns, _ = decoder.audio.grid
        clips = np.empty((len(media), decoder.num_views, decoder.samples), np.float32)
        masked_rows, masked_columns = np.zeros((len(media), rows), bool), np.zeros((len(media), columns), bool)
        padded_rows = np.zeros((len(media), rows), bool)

        def cut(i: int, wave: Float32[np.ndarray, " samples"]) -> None:
            decoder.cut_clips(wave, rngs[i], clips[i])
            padded_rows[i, decoder.count_rows(len(wave)) :] = True
            if decoder.train:
                masked_rows[i], masked_columns[i] = decoder.draw_masks(rngs[i])

        decoder.reader.read(media, cut)
        self.count(clips.nbytes, 0)
        waves = send(torch.from_numpy(clips).flatten(0, 1), self.device)
        chunks = [decoder.make_spectrograms(chunk) for chunk in waves.split(max(1, CHUNK_ROWS // rows))]
        spectrograms = torch.cat(chunks).unflatten(0, clips.shape[:2])
        if padded_rows.any():
            spectrograms.masked_fill_(send_array(padded_rows, self.device)[:, None, :, None], 0)
        if decoder.train:
            masked = send_array(masked_rows, self.device)[:, None, :, None] | send_array(masked_columns, self.device)[:, None, None]
            spectrograms.masked_fill_(masked, decoder.audio.mean)
        return decoder.as_grid(spectrograms)
