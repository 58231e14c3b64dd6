"""Videos: the record, decoding on the CPU and on the GPU, and which frame is frame k."""
