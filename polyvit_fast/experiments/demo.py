"""Five tasks on real JPEG, H.264, FLAC and WAV files that it makes itself, co-trained by one small PolyViT on two CPU cores.

Command: polyvit-fast train demo
Cost: about 4 minutes on two CPU cores, and 20 MB of files in demo-files/, made once.
Result: top-1 (of chords: mAP) above 90 % on held-out files of every task.
"""

from polyvit_fast.config import Model, Optim, Task, Train
from polyvit_fast.data.audio import Audio
from polyvit_fast.data.demo_files import DemoFiles, Kind
from polyvit_fast.data.image import Image
from polyvit_fast.data.video import Video

PICTURE = Image(size=64, patch=8, crop="resize_crop", eval_crop="centre", crop_ratio=0.9, flip=False)
CLIP = Video(size=32, patch=8, frames=8, stride=1, tubelet_frames=4, short_side=36, flip=False)
SOUND = Audio(clip_seconds=0.96, num_mel_bins=64, patch=16)


def files(kind: Kind) -> dict[str, DemoFiles]:
    """The two splits of a kind, as arguments of a task."""
    return {"train": DemoFiles(kind=kind, num_samples=1500), "val": DemoFiles(kind=kind, split="val", num_samples=300)}


config = Train(
    tasks={
        "shapes": Task(modality=PICTURE, **files("shapes"), num_classes=6, batch=32, steps=900),
        "textures": Task(modality=PICTURE, **files("textures"), num_classes=6, batch=32, steps=400),
        "motion": Task(modality=CLIP, **files("motion"), num_classes=6, batch=32, steps=250),
        "tones": Task(modality=SOUND, **files("tones"), num_classes=6, batch=32, steps=300),
        "chords": Task(modality=SOUND, **files("chords"), num_classes=6, batch=32, steps=200, loss="sigmoid", multi_label=True),
    },
    model=Model(dim=96, depth=4, num_heads=3, mlp_dim=384),
    optim=Optim(name="adamw", lr=2e-3, warmup_steps=50, weight_decay=0.05),
    log_every_steps=50,
    eval_every_steps=500,
)
