"""What a person sees: progress, metrics, plots, and what a run will cost."""
