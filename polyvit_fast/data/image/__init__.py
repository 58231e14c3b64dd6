"""Pictures: the record, decoding on the CPU and on the GPU, and what a file must be to be decoded."""
