"""What lies in a run folder: the configuration, checkpoints, the lock."""
