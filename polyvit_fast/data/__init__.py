"""From files on disk to batches of grids: the three modalities, the sources of samples, the stream of batches."""
