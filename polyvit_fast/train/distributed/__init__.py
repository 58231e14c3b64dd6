"""Several processes: their process group, the all-reduce of gradients, FSDP2."""
