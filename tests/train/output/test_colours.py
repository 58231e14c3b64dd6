"""Each task has one colour."""

from polyvit_fast.train.output.colours import COLOURS, task_colour


def test_tasks_have_distinct_colours_that_repeat_after_the_last():
    colours = [task_colour(index) for index in range(2 * len(COLOURS))]
    assert len(set(colours[: len(COLOURS)])) == len(COLOURS)
    assert colours[len(COLOURS) :] == colours[: len(COLOURS)]
