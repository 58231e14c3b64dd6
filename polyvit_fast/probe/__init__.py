"""Probing: what a frozen model knows of tasks that it was not trained on, by heads that are trained on its features alone."""
