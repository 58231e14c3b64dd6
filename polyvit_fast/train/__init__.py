"""What happens in a run: the schedule, the step, the loop, evaluation, checkpoints, logs."""
