"""One colour for each task, the same on the terminal and in every picture: by the task's position in the configuration."""

COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A80024", "#0048C0", "#783C60", "#6CC06C"),
    *("#0090FC", "#901884", "#306C3C", "#F0909C", "#E47848", "#D83054", "#B43000", "#00C0CC", "#54A8FC", "#306CCC"),
)
"""The first six are Okabe and Ito's; each further one is as far as can be from those before it, for readers who lack red or green cones
too. All stand out from white and from black."""


def task_colour(index: int) -> str:
    """The colour of the task at this position in the configuration, as #RRGGBB; with more tasks than colours they repeat."""
    return COLOURS[index % len(COLOURS)]


def to_rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, from 0 to 255, of #RRGGBB."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue
