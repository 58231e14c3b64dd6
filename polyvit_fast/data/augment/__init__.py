"""Random colours and RandAugment, on the CPU and on the GPU."""
