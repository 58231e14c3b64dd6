"""Several processes: their group, sums of gradients on their way, FSDP2."""
