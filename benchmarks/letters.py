"""A task that the demo's model never saw, for `polyvit-fast probe`: which of eight letters is written, anywhere and at any angle.

python benchmarks/letters.py    # draws 1,600 + 400 JPEG files into demo-files/letters
polyvit-fast probe runs/demo --experiment benchmarks/letters.py --random
"""

from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from polyvit_fast.config import Task, Train
from polyvit_fast.data import Folder
from polyvit_fast.experiments.demo import PICTURE
from polyvit_fast.randomness import generator

FOLDER = Path("demo-files") / "letters"
LETTERS = "AEHKRSXZ"
NUM_FILES = {"train": 200, "val": 50}

config = Train(
    tasks={
        "letters": Task(
            modality=PICTURE,
            train=Folder(path=str(FOLDER / "train")),
            val=Folder(path=str(FOLDER / "val")),
            num_classes=len(LETTERS),
            batch=128,
            steps=1,
        )
    }
)


def draw_letter(letter: str, rng: np.random.Generator) -> Pillow.Image:
    """A grey letter on a grey ground with noise, of 72 x 72 pixels."""
    dark, light = sorted(rng.integers(0, 256, 2).tolist())
    ground, ink = (dark, max(light, dark + 60)) if rng.random() < 0.5 else (max(light, dark + 60), dark)
    tile = Pillow.new("L", (72, 72), min(ground, 255))
    centre = tuple(rng.integers(24, 48, 2).tolist())
    ImageDraw.Draw(tile).text(centre, letter, fill=min(ink, 255), font=ImageFont.load_default(rng.uniform(26, 44)), anchor="mm")
    turned = np.asarray(tile.rotate(rng.uniform(-40, 40), fillcolor=min(ground, 255), resample=Pillow.Resampling.BILINEAR))
    noisy = turned + rng.normal(0, 12, (72, 72))
    return Pillow.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB")


def main() -> None:
    """Draw all files, the same on every machine with this Pillow."""
    for split, count in NUM_FILES.items():
        for letter in LETTERS:
            (FOLDER / split / letter).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture = draw_letter(letter, generator("letters", split, letter, number))
                picture.save(FOLDER / split / letter / f"{number:04}.jpg", quality=90)


if __name__ == "__main__":
    main()
