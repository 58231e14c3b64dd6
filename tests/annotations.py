"""How annotations are checked in tests: as type checkers read them, a whole number will do where a float is wanted."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
