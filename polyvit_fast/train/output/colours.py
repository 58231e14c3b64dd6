"""One colour for each task, the same on the terminal and in every picture: by the task's position in the configuration."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#5A4FA2", "#8C8C00", "#7F7F7F", "#222222")
"""Distinct with the common forms of colour blindness: Okabe and Ito's set, with darker hues for its yellow, then greys."""


def task_colour(index: int) -> str:
    """The colour of the task at this position in the configuration, as #RRGGBB; with more tasks than colours they repeat."""
    return COLOURS[index % len(COLOURS)]
