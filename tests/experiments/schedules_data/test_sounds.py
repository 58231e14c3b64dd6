import io
import wave
from collections import Counter, defaultdict

import numpy as np
import pytest
import sound_files

from polyvit_fast.experiments.schedules_data.dataset import BrokenMediaError
from polyvit_fast.experiments.schedules_data.packages import PackageError
from polyvit_fast.experiments.schedules_data.sounds import (
    ASTERISK,
    DRUM_TEST,
    LANGUAGES,
    LETTER_TEST,
    MIXTURES,
    VOICES,
    list_drums,
    list_languages,
    list_letters,
    list_other_speakers,
    list_voices,
)

RATE = 8_000


def write_tone(path, hertz=440.0, seconds=0.3, rate=RATE, amplitude=0.5):
    path.parent.mkdir(parents=True, exist_ok=True)
    return sound_files.write(path, sound_files.tone(hertz, seconds, rate, amplitude), rate)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def sound_of(example):
    with wave.open(io.BytesIO(example.content())) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767


def prompt(folder, language, name):
    return folder / f"asterisk-core-sounds-{language}-wav" / "usr" / "share" / "asterisk" / "sounds" / f"{language}_voice" / name


@pytest.fixture
def prompts(tmp_path):
    for language in LANGUAGES:
        for number in range(20):
            touch(prompt(tmp_path, language, f"digits/{number}.wav"))
        for name in ("silence/1.wav", "beep.wav", "tt-monkeys.wav", "dictate/play.wav"):
            touch(prompt(tmp_path, language, name))
        for word in ("eye", "mouth"):
            touch(tmp_path / "ktuberling-data" / "usr" / "share" / "ktuberling" / "sounds" / language / f"{word}.ogg")
    touch(tmp_path / "ktuberling-data" / "usr" / "share" / "ktuberling" / "sounds" / "de" / "eye.ogg")
    return {name: tmp_path / name for name in (*ASTERISK, "ktuberling-data")}


def test_a_prompt_has_one_split_in_all_languages(prompts):
    splits, counts = defaultdict(set), Counter()
    for example in list_languages(prompts):
        language, _, name = example.name.partition("-")
        assert example.labels == (language,)
        counts[language] += 1
        splits[name].add(example.split)
    assert counts == dict.fromkeys(LANGUAGES, 22)
    assert set(splits) == {*(f"asterisk-digits-{number}.wav" for number in range(20)), "ktuberling-eye.wav", "ktuberling-mouth.wav"}
    assert Counter(split for (split,) in splits.values()) == {"train": 13, "val": 3, "test": 6}


def test_a_sound_is_converted_to_eight_kilohertz(tmp_path):
    packages = {name: tmp_path / name for name in (*ASTERISK, "ktuberling-data")}
    write_tone(prompt(tmp_path, "en", "hello.wav"), 1000, 1.0, rate=44_100, amplitude=0.4)
    (example,) = list_languages(packages)
    sound = sound_of(example)
    assert len(sound) == RATE
    assert sound_files.amplitude(sound, 1000, RATE) == pytest.approx(0.4, abs=0.01)
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(0.4 / 2**0.5, abs=0.01)  # and nothing else is in it


def test_long_sounds_are_cut_and_silent_short_and_broken_ones_left_out(tmp_path):
    packages = {name: tmp_path / name for name in (*ASTERISK, "ktuberling-data")}
    write_tone(prompt(tmp_path, "en", "a-long.wav"), seconds=9)
    write_tone(prompt(tmp_path, "en", "b-silent.wav"), amplitude=0)
    write_tone(prompt(tmp_path, "en", "c-short.wav"), seconds=0.04)
    touch(prompt(tmp_path, "en", "d-empty.wav"))
    long, *broken = list_languages(packages)
    assert len(sound_of(long)) == 8 * RATE
    reasons = "silent, or shorter than a twentieth of a second", "silent, or shorter", "not a sound that can be read"
    for example, reason in zip(broken, reasons, strict=True):
        with pytest.raises(BrokenMediaError, match=reason):
            example.content()


def test_other_speakers_are_all_for_testing(tmp_path):
    root = tmp_path / "usr" / "share" / "klettres"
    for language in (*LANGUAGES, "cs"):
        for name in ("alpha/U0061.ogg", "syllab/ba.ogg"):
            touch(root / language / name)
    examples = list(list_other_speakers({"klettres-data": tmp_path}))
    assert {(example.split, *example.labels, example.name) for example in examples} == {
        ("test", language, f"{language}-{name}.wav") for language in LANGUAGES for name in ("alpha-U0061", "syllab-ba")
    }


NUM_STAMPS = 12
PITCHES = {(voice, stamp): 400 + 30 * (stamp * len(VOICES) + index) for index, voice in enumerate(VOICES) for stamp in range(NUM_STAMPS)}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Stamps whose descriptions are tones: which voice speaks of which stamp can be heard."""
    folder = tmp_path_factory.mktemp("spoken")
    root = folder / "usr" / "share" / "tuxpaint" / "stamps" / "animals"
    for (voice, stamp), hertz in PITCHES.items():
        write_tone(root / f"stamp{stamp}_desc_{voice}.ogg", hertz, 2.0)
    for name in ("stamp1_desc_zh.ogg", "stamp1_desc.ogg", "stamp1.ogg"):  # a language that few stamps have, English, and a noise
        touch(root / name)
    return {"tuxpaint-stamps-default": folder}


def heard_in(sound):
    """(voice, stamp) of each tone."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    hertz = np.fft.rfftfreq(len(sound), 1 / RATE)
    loudness = {key: spectrum[abs(hertz - pitch) < 2].max() for key, pitch in PITCHES.items()}
    return {key for key, value in loudness.items() if value > 0.15 * max(loudness.values())}


def test_the_voices_of_a_mixture_are_its_labels_and_descriptions_have_one_split(spoken):
    by_split, numbers = defaultdict(list), Counter()
    for example in list_voices(spoken):
        by_split[example.split].append(example)
        numbers[len(example.labels)] += 1
    assert {split: len(examples) for split, examples in by_split.items()} == MIXTURES
    assert set(numbers) == {1, 2, 3}
    assert min(numbers.values()) > 900
    stamps = defaultdict(set)
    for split, examples in by_split.items():
        for example in examples[:20]:
            sound = sound_of(example)
            assert len(sound) == 1.6 * RATE
            assert np.abs(sound).max() == pytest.approx(0.9, abs=0.001)
            heard = heard_in(sound)
            assert tuple(sorted(voice for voice, _ in heard)) == example.labels
            stamps[split] |= {stamp for _, stamp in heard}
    assert {split: len(found) for split, found in stamps.items()} == {"train": 7, "val": 2, "test": 3}
    assert len(set.union(*stamps.values())) == NUM_STAMPS


def test_mixtures_are_equal_each_time(spoken):
    first, second = ([example.content() for example, _ in zip(list_voices(spoken), range(5), strict=False)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 5


def test_a_voice_that_a_split_lacks_is_named(tmp_path):
    for number in range(NUM_STAMPS):
        for voice in VOICES:
            if voice != "el":
                touch(tmp_path / "usr" / "share" / "tuxpaint" / "stamps" / f"stamp{number}_desc_{voice}.ogg")
    with pytest.raises(PackageError, match=r"tuxpaint-stamps-default: no voice of el for train"):
        list(list_voices({"tuxpaint-stamps-default": tmp_path}))


def test_letters_are_named_by_letter_code_point_or_number(tmp_path):
    root = tmp_path / "usr" / "share" / "klettres"
    names = {
        "de": ("a", "U0062", "U00E4", "a-3"),  # one numbered file is no alphabet
        "fr": ("Q",),
        "hu": ("z",),
        "da": tuple(f"a-{number}" for number in range(26)),
        "nb": tuple(f"a-{number}" for number in range(29)),  # with letters that others do not have: which is which?
    }
    for language, files in names.items():
        for name in files:
            touch(root / language / "alpha" / f"{name}.ogg")
    touch(root / "en" / "syllab" / "ba.ogg")
    found = {example.name: (example.split, *example.labels) for example in list_letters({"klettres-data": tmp_path})}
    alphabet = {f"da-a-{number}.wav": ("train", "abcdefghijklmnopqrstuvwxyz"[number]) for number in range(26)}
    assert found == {
        "de-a.wav": ("train", "a"),
        "de-U0062.wav": ("train", "b"),
        "fr-Q.wav": ("test", "q"),
        "hu-z.wav": ("val", "z"),
        **alphabet,
    }
    assert "fr" in LETTER_TEST


def test_drums_are_named_by_their_files_and_test_kits_are_in_no_other_split(tmp_path):
    root = tmp_path / "usr" / "share" / "hydrogen" / "data" / "drumkits"
    files = {
        "Kick-1.wav": "kick",
        "sd2.flac": "snare",
        "123__someone__HiHat open.wav": "hihat",
        "floortom.wav": "tom",
        "Ride.wav": "cymbal",
        "cowbell.wav": "hand",
    }
    kits = ("HardElectro1", "VariBreaks", "Another Kit")
    for kit in kits:
        for name in (*files, "vinyl scratch.wav", "kick.txt"):
            touch(root / kit / name)
    examples = list(list_drums({"hydrogen-drumkits": tmp_path}))
    assert Counter(example.labels for example in examples) == {(kind,): 3 for kind in files.values()}
    splits = defaultdict(Counter)
    for example in examples:
        kit = next(kit for kit in kits if kit.replace(" ", "-") in example.name)
        splits[kit][example.split] += 1
    assert splits == {"HardElectro1": {"test": 6}, "VariBreaks": {"train": 5, "val": 1}, "Another Kit": {"train": 5, "val": 1}}
    assert "HardElectro1" in DRUM_TEST
    assert all(set(example.name) <= set("-.abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") for example in examples)
