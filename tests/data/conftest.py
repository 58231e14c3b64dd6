"""Files that several tests of data use."""

import pytest
from video_files import write_gradients
from video_kinds import KINDS, Kind, encode


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """The path of a file of a kind, made once."""
    folder, made = tmp_path_factory.mktemp("videos"), {}

    def make(name, **changes):
        kind = Kind(**(vars(KINDS[name]) | changes))
        key = name, repr(changes)
        if key not in made:
            made[key] = encode(folder / f"{len(made)}-{name}", kind)
        return made[key]

    return make


@pytest.fixture(scope="session")
def gradients(tmp_path_factory):
    """A video from whose pixels one can read which frame and which square a clip shows."""
    return write_gradients(tmp_path_factory.mktemp("gradients") / "wide.mp4")
