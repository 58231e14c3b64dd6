"""The paper's question in small: eight tasks of real pictures, clips and sounds, for a comparison of the five schedules.

Files: python -m polyvit_fast.experiments.schedules_data
Command: polyvit-fast train schedules
Cost: about 5 minutes on one CPU core, next to another run. A picture has 37 tokens, a clip and a sound have 33, so that all schedules cost
    nearly the same.
Result: docs/schedules.md has those of all five schedules and of a model for each task, over several seeds.
"""

from polyvit_fast.config import LogOptions, Modality, Model, Optim, Task, Train
from polyvit_fast.data import Audio, Image, Manifest, Video

PICTURE = Image(size=48, patch=8, crop="resize_crop", eval_crop="centre", crop_ratio=0.85)
CLIP = Video(size=32, patch=8, frames=8, stride=1, tubelet_frames=4, short_side=36, flip=False)
SOUND = Audio(clip_seconds=1.28, num_mel_bins=64, sample_rate_hz=8000, channels=1)


def task(name: str, modality: Modality, num_classes: int, steps: int, several: bool = False) -> Task:
    """A task on one of the datasets of `schedules_data`."""
    folder = f"schedules-data/{name}"
    train, val, test = (Manifest(path=f"{folder}/{split}.csv", classes=f"{folder}/classes.txt") for split in ("train", "val", "test"))
    return Task(
        modality=modality,
        train=train,
        val=val,
        test=test,
        num_classes=num_classes,
        batch=16,
        steps=steps,
        loss="sigmoid" if several else "softmax",
        multi_label=several,
    )


config = Train(
    tasks={
        "digits": task("digits", PICTURE, 10, steps=400),
        "stamps": task("stamps", PICTURE, 9, steps=200),
        "topics": task("topics", PICTURE, 26, steps=600),
        "camera": task("camera", CLIP, 7, steps=600),
        "games": task("games", CLIP, 56, steps=200),
        "speed": task("speed", CLIP, 3, steps=400),
        "language": task("language", SOUND, 5, steps=400),
        "voices": task("voices", SOUND, 9, steps=400, several=True),
    },
    model=Model(dim=96, depth=4, num_heads=3, mlp_dim=192),
    optim=Optim(name="adamw", lr=1e-3, warmup_steps=200, weight_decay=0.05),
    log=LogOptions(log_every_steps=100),
)
