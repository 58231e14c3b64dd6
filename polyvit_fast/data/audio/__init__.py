"""Sounds: the record, decoding, spectrograms, and what the headers of sound files say."""
