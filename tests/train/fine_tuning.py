"""A small run that has every option of fine-tuning, on real JPEG files and on tiles."""

from pathlib import Path

from PIL import Image as Pillow
from tiny_runs import tile_task, tiny_config

from polyvit_fast.config import Model, Optim, Task, Train
from polyvit_fast.data.image.modality import Image
from polyvit_fast.data.sources.manifest import Folder

FROZEN = ("blocks.0.*", "tokenizers.tile.*")


def write_pictures(folder: Path) -> None:
    """JPEGs of three colours, ten each."""
    for label, colour in enumerate(("red", "green", "blue")):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(10):
            Pillow.new("RGB", (40 + number, 48), colour).save(folder / f"class{label}" / f"{number}.jpg")


def make_config(pictures: Path, schedule: str = "weighted", **changes) -> Train:
    """Twenty steps, fewer if accumulating."""
    source = Folder(path=str(pictures))
    image = Image(size=32, patch=16, random_erasing_prob=0.5)
    tasks = {
        "colours": Task(modality=image, train=source, val=source, num_classes=3, steps=12, batch=8, cutmix=1.0, mixup=0.4, loss_weight=0.5),
        "tiles": tile_task(steps=8, cutmix=0.8, micro_batches=2, lr_schedule="cosine", warmup_steps=3),
    }
    optim = Optim(name="sgd", lr=0.05, warmup_steps=2, freeze=FROZEN, layer_decay=0.8, ema_decay=0.9, weight_decay=0.01)
    model = Model(dim=32, depth=3, num_heads=2, mlp_dim=64)
    options = {"eval_every_steps": 5, "early_stop_evaluations": 9, "compute_threads": 1}
    return tiny_config(**({"tasks": tasks, "optim": optim, "model": model, "schedule": schedule} | options | changes))
