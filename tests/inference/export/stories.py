"""Models that other libraries made and saved, and the run that fine-tunes each on real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foreign_models import randomised

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 6}
MODEL = {"dim": 64, "depth": 2, "num_heads": 4, "mlp_dim": 128}


@dataclass(frozen=True)
class Story:
    kind: str
    """Of the demo's files."""
    save: Callable[[Path], None]
    modality: str
    model: dict
    to: str
    task: str = ""


def save_hugging_face(name: str, **changes) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        import transformers

        config = getattr(transformers, f"{name.partition('For')[0]}Config")(**SIZES, **changes)
        randomised(getattr(transformers, name)(config)).save_pretrained(folder)

    return save


def save_timm(folder: Path) -> None:
    from timm.models import save_for_hf
    from timm.models.vision_transformer import vit_tiny_patch16_224

    arguments = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 6}
    save_for_hf(randomised(vit_tiny_patch16_224(**arguments)), folder, model_args=arguments, safe_serialization=True)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"


PICTURE = 'Image(size=48, patch=8, eval_crop="{}", crop_ratio=0.9)'
CLIP = "Video(size=32, patch=8, frames=8, stride=1, tubelet_frames=2, short_side=36, flip=False)"
SOUND = 'Audio(clip_seconds=0.96, num_mel_bins=64, patch_stride=10, channels=1, num_class_tokens=2, pool="class_tokens")'
ERF = {"gelu": "erf"}
STORIES = {
    "Hugging Face ViT": Story(
        "shapes",
        save_hugging_face("ViTForImageClassification", image_size=48, patch_size=8),
        PICTURE.format("resize"),
        MODEL | ERF | {"norm_eps": 1e-12},
        "hf",
    ),
    "Hugging Face ViViT": Story(
        "motion",
        save_hugging_face("VivitForVideoClassification", image_size=32, num_frames=8, tubelet_size=[2, 8, 8]),
        CLIP,
        MODEL,
        "hf",
    ),
    "Hugging Face AST": Story(
        "tones",
        save_hugging_face("ASTForAudioClassification", max_length=96, num_mel_bins=64),
        SOUND,
        MODEL | ERF | {"norm_eps": 1e-12},
        "hf",
        "head_norm=True,",
    ),
    "timm ViT": Story("textures", save_timm, PICTURE.format("centre"), MODEL | ERF, "timm"),
}


def write_experiment(story: Story, folder: Path) -> Path:
    """The file of an experiment of ten steps with real files of the story's kind."""
    model = ", ".join(f"{name}={value!r}" for name, value in story.model.items())
    path = folder / "mine.py"
    path.write_text(f"""
from polyvit_fast.config import LogOptions, Model, Optim, Task, Train
from polyvit_fast.data import Audio, DemoFiles, Image, Video

task = Task(
    modality={story.modality},
    train=DemoFiles(kind="{story.kind}", num_samples=24, root="{folder / "files"}"),
    val=DemoFiles(kind="{story.kind}", split="val", num_samples=6, root="{folder / "files"}"),
    num_classes=6, batch=8, steps=10, {story.task}
)
config = Train(tasks={{"{story.kind}": task}}, model=Model({model}), optim=Optim(name="adamw", lr=1e-3, warmup_steps=0), device="cpu")
""")
    return path
