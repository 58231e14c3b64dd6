"""The portable kernels: Triton, for every GPU."""
