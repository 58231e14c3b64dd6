"""The datasets of sounds: spoken languages, voices at once, spoken letters, drums; as WAV files of 8 kHz."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from polyvit_fast.experiments.schedules_data.dataset import BrokenMediaError, Dataset, Example, list_files, split_groups
from polyvit_fast.experiments.schedules_data.packages import PackageError
from polyvit_fast.media import Media, MediaError
from polyvit_fast.randomness import generator

RATE_HZ = 8_000
MOST_SECONDS = 8.0
"""Of a recording; the rest of it is left out."""
LANGUAGES = ("en", "es", "fr", "it", "ru")
VOICES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
MIXTURES = {"train": 2400, "val": 300, "test": 600}
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
LETTER_TEST = ("en_GB", "fr", "it", "nb")
"""Whose letters are for testing: speakers of no other split."""
DRUMS = {  # what names of files begin with
    "kick": r"kick|bd|bass-?drum|ee_kick|hardhse_k|hard_hse_k",
    "snare": r"snare|sd|sn\d*_|ee_snare|snr",
    "hihat": r"hihat|hh|hhat|ho_|hc_|hat|ee_hat|pedalhihat|.*_hh_|.*_ohh",
    "tom": r"tom|tm\d*_|t\d_|floortom|lowtom|hitom",
    "cymbal": r"crash|ride|rd\d*_|cc_|cra|china|splash|rc_|cr_",
    "hand": r"clap|conga|bongo|cajon|djembe|tambourine|handclap|fingersnap|cowbell|cb\d*_|agogo|maraca|clave|woodblock|ee_clap",
}
DRUM_TEST = ("ForzeeStereo", "Millo_MultiLayered3", "ElectricEmpireKit", "Gimme A Hand 1.0", "HardElectro1")
"""Kits for testing: no other split has a sound of them."""
NO_SPEECH = re.compile(r"silence/|beep|tone|tt-monkeys|jingle|ascending|descending|spy-|screech|dictate/")


def list_languages(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Prompts of Asterisk, one speaker a language, and words of KTuberling, by others. A prompt has the same split in all languages."""
    found: list[tuple[str, str, Path]] = []
    for language in LANGUAGES:
        root = packages[f"asterisk-core-sounds-{language}-wav"] / "usr" / "share" / "asterisk" / "sounds"
        for file in list_files(root, ".wav"):
            name = "/".join(file.relative_to(root).parts[1:])
            if not NO_SPEECH.search(name):
                found.append((language, f"asterisk-{Path(name).with_suffix('').as_posix()}", file))
        words = packages["ktuberling-data"] / "usr" / "share" / "ktuberling" / "sounds" / language
        found += [(language, f"ktuberling-{file.stem}", file) for file in list_files(words, ".ogg", ".wav", ".opus")]
    splits = split_groups((prompt for _, prompt, _ in found), "language")
    for language, prompt, file in found:
        yield Example(splits[prompt], f"{language}-{prompt.replace('/', '-')}.wav", (language,), _convert(file))


def list_other_speakers(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Letters and syllables of KLettres in the languages of `language`, all for testing."""
    for language in LANGUAGES:
        root = packages["klettres-data"] / "usr" / "share" / "klettres" / language
        for file in list_files(root, ".ogg"):
            name = file.relative_to(root).with_suffix("").as_posix().replace("/", "-")
            yield Example("test", f"{language}-{name}.wav", (language,), _convert(file))


def list_voices(packages: Mapping[str, Path]) -> Iterator[Example]:
    """One to three voices at once, of nine languages, in 1.6 seconds. What they say of a stamp is in one split in all languages."""
    root = packages["tuxpaint-stamps-default"] / "usr" / "share" / "tuxpaint" / "stamps"
    spoken: dict[str, list[Path]] = {}
    for file in list_files(root, ".ogg"):
        match = re.fullmatch(r"(.*)_desc_(\w+)", file.stem)
        if match and match[2] in VOICES:
            spoken.setdefault(file.with_name(match[1]).relative_to(root).as_posix(), []).append(file)
    splits = split_groups(spoken, "voices")
    for split, number in MIXTURES.items():
        by_voice: dict[str, list[Path]] = {voice: [] for voice in VOICES}
        for stamp, files in spoken.items():
            if splits[stamp] == split:
                for file in files:
                    by_voice[file.stem.rpartition("_")[2]].append(file)
        if silent := [voice for voice, files in by_voice.items() if not files]:
            raise PackageError(f"tuxpaint-stamps-default: no voice of {', '.join(silent)} for {split}; another version may have them")
        for index in range(number):
            rng = generator("schedules_data", "voices", split, index)
            present = sorted(rng.permutation(len(VOICES))[: rng.integers(1, 4)].tolist())
            voices = [VOICES[one] for one in present]
            chosen = [by_voice[voice][rng.integers(len(by_voice[voice]))] for voice in voices]
            yield Example(split, f"{index:04d}.wav", tuple(voices), _mix(chosen, split, index))


def list_letters(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Names of the letters from a to z, by the speaker of each language."""
    root = packages["klettres-data"] / "usr" / "share" / "klettres"
    for language in sorted(path.parent.name for path in root.glob("*/alpha")):
        files = list(list_files(root / language / "alpha", ".ogg"))
        numbered = {match[1] for file in files if (match := re.fullmatch(r"a-(\d+)", file.stem))}
        for file in files:
            letter = _find_letter(file.stem, len(numbered))
            if letter:
                split = "test" if language in LETTER_TEST else "train" if language not in ("es", "hu") else "val"
                yield Example(split, f"{language}-{file.stem}.wav", (letter,), _convert(file))


def _find_letter(stem: str, num_numbered: int) -> str | None:
    """The letter of a file: its name, its code point, or its number in an alphabet of 26."""
    if stem.lower() in LETTERS:
        return stem.lower()
    if re.fullmatch(r"U00[0-9A-F]{2}", stem) and chr(int(stem[1:], 16)) in LETTERS:
        return chr(int(stem[1:], 16))
    if num_numbered == len(LETTERS) and (match := re.fullmatch(r"a-(\d+)", stem)) and int(match[1]) < len(LETTERS):
        return LETTERS[int(match[1])]
    return None


def list_drums(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Single hits, by what the name of their file begins with."""
    root = packages["hydrogen-drumkits"] / "usr" / "share" / "hydrogen" / "data" / "drumkits"
    numbers = count()
    for file in list_files(root, ".wav", ".flac", ".aiff"):
        stem = re.sub(r"^\d+__\w+?__", "", file.stem.lower())
        kind = next((kind for kind, pattern in DRUMS.items() if re.match(pattern, stem)), None)
        if kind:
            kit, number = file.relative_to(root).parts[0], next(numbers)
            split = "test" if kit in DRUM_TEST else "val" if number % 6 == 0 else "train"
            yield Example(split, f"{number:03d}-{re.sub(r'[^A-Za-z0-9]+', '-', f'{kit} {file.stem}')}.wav", (kind,), _convert(file))


def _convert(file: Path) -> Callable[[], bytes]:
    return lambda: _to_wav(_read(file))


def _mix(files: list[Path], split: str, index: int) -> Callable[[], bytes]:
    """Voices that begin at random within the first half second, each as loud as the others up to a factor of two."""

    def content() -> bytes:
        rng = generator("schedules_data", "voices", split, index, "mix")
        mixed = np.zeros(round(1.6 * RATE_HZ), np.float32)
        for file in files:
            voice = _trim(_read(file))
            start = int(rng.integers(0, RATE_HZ // 2))
            voice = voice[: len(mixed) - start]
            power = float(np.sqrt(np.mean(np.square(voice)))) if len(voice) else 0.0
            mixed[start : start + len(voice)] += voice * np.float32(rng.uniform(0.5, 1.0) / max(power, 1e-4))
        return _to_wav(mixed / max(float(np.abs(mixed).max()), 1e-4) * np.float32(0.9))

    return content


def _trim(sound: Float32[np.ndarray, " samples"]) -> Float32[np.ndarray, " rest"]:
    """A sound without the silence before it."""
    loud = np.flatnonzero(np.abs(sound) > 0.1 * np.abs(sound).max())
    return sound[loud[0] :] if len(loud) else sound


@lru_cache(maxsize=8192)
def _read(file: Path) -> Float32[np.ndarray, " samples"]:
    from polyvit_fast.data.audio.waves import decode, resample

    try:
        rate, sound = decode(Media(str(file)), 900.0)
    except MediaError as error:
        raise BrokenMediaError("not a sound that can be read") from error
    sound = resample(sound, rate, RATE_HZ)[: round(MOST_SECONDS * RATE_HZ)]
    if len(sound) < RATE_HZ // 20 or np.abs(sound).max() < 1e-3:
        raise BrokenMediaError("silent, or shorter than a twentieth of a second")
    return sound


def _to_wav(sound: Float32[np.ndarray, " samples"]) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(RATE_HZ)
        wav.writeframes((sound.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


ASTERISK = tuple(f"asterisk-core-sounds-{language}-wav" for language in LANGUAGES)
DATASETS = (
    Dataset(
        name="language",
        question="Which language is spoken? No prompt is in two splits; speakers are, except in `speakers`.",
        classes=LANGUAGES,
        packages=(*ASTERISK, "ktuberling-data"),
        list_examples=list_languages,
    ),
    Dataset(
        name="speakers",
        question="Which language is spoken, by speakers that `language` does not have?",
        classes=LANGUAGES,
        packages=("klettres-data",),
        list_examples=list_other_speakers,
    ),
    Dataset(
        name="voices",
        question="Which of nine voices, one a language, speak at once (one to three)? No description of a stamp is in two splits.",
        classes=VOICES,
        packages=("tuxpaint-stamps-default",),
        list_examples=list_voices,
    ),
    Dataset(
        name="letters",
        question="Which letter is it? No speaker is in two splits.",
        classes=LETTERS,
        packages=("klettres-data",),
        list_examples=list_letters,
    ),
    Dataset(
        name="drums",
        question="Which drum is it? The kits of the test are in no other split.",
        classes=tuple(DRUMS),
        packages=("hydrogen-drumkits",),
        list_examples=list_drums,
    ),
)
