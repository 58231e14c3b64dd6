"""A trained run in a few lines of Python: load, predict, features, train."""
