import torch

from polyvit_fast.inference.results import Features, Prediction, Predictions, Skipped

CAT = Prediction("photos/a/1.jpg", ("cat", "dog"), (0.75, 0.25))
DOG = Prediction("photos/b/2.jpg", ("dog", "cat"), (0.9, 0.1))


def test_predictions_print_as_a_table():
    text = str(Predictions("species", [CAT, DOG], [Skipped("photos/x.jpg", "the file is empty")]))
    assert "in photos" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["input", "species", "then"] in lines
    assert ["a/1.jpg", "cat", "75.0%", "dog", "25.0%"] in lines
    assert ["b/2.jpg", "dog", "90.0%", "cat", "10.0%"] in lines
    assert "skipped photos/x.jpg: the file is empty" in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_names_are_shown_whole_and_as_they_are():
    odd = Prediction("[red]\n.jpg", ("[bold]cat", "[/]"), (1.0, 0.0))
    text = str(Predictions("species", [odd]))
    assert "[red]\\n.jpg" in text
    assert "[bold]cat" in text
    assert "[/] 0.0%" in text
    only = str(Predictions("species", [Prediction("input", ("cat",), (1.0,))]))
    assert "then" not in only
    assert str(Predictions("species", [])) == "no inputs"


def test_predictions_are_a_sequence_of_rows():
    found = Predictions("species", [CAT, DOG])
    assert (len(found), found[0], found[-1], found[:1], list(found)) == (2, CAT, DOG, [CAT], [CAT, DOG])
    names, classes, probabilities = found[0].name, found[0].classes, found[0].probabilities
    assert (names, classes, probabilities) == ("photos/a/1.jpg", ("cat", "dog"), (0.75, 0.25))


def test_features_name_their_rows():
    features = Features(torch.zeros(2, 8), ["a", "b"])
    assert features.skipped == []
