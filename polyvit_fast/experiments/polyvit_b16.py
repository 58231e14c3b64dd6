"""PolyViT-B/16 on nine datasets of images, videos and audio, with the settings of the paper's released code.

Command: polyvit-fast train polyvit_b16 --device cuda
Adaptors: --model.num-adaptor-layers 6

Files, under data/ or at the paths given by --tasks.NAME.train.path and --tasks.NAME.val.path. A folder holds a folder per class. A CSV has
the columns path and label, or path and labels (several, separated by semicolons); a label is a class number, and paths are relative to the
CSV's folder. `polyvit-fast check polyvit_b16` decodes all files.

| task | training and validation data | classes | the released code uses |
|---|---|---|---|
| imagenet | imagenet/train/, imagenet/val/ | 1000 | ILSVRC 2012: 99 % and 1 % of its training images |
| cifar100 | cifar100/train/, cifar100/val/ | 100 | 98 % and 2 % of its training images |
| cifar10 | cifar10/train/, cifar10/val/ | 10 | the same |
| pets | pets/train/, pets/val/ | 37 | Oxford-IIIT Pet: 90 % and 10 % of its training images |
| resisc45 | resisc45/train/, resisc45/val/ | 45 | 60 % and 20 % of all images; the rest are for testing |
| kinetics400 | kinetics400/train.csv, kinetics400/val.csv | 400 | 214,834 and 17,637 clips |
| moments | moments/train.csv, moments/val.csv | 339 | Moments in Time: 791,297 and 33,900 clips |
| audioset | audioset/train.csv, audioset/val.csv | 527 | the balanced set: 20,361 and 18,589 clips |
| vggsound | vggsound/train.csv, vggsound/val.csv | 309 | 172,427 and 14,448 clips |

Cost (computed, not measured): 92,683,471 parameters (177,737,935 with 6 adaptor layers), 417,920 steps, 23.1 EFLOP. The micro-batches
below are for a GPU with 24 GiB. `polyvit-fast plan polyvit_b16` prints the details, also for other sizes.

Result: not run yet. According to the paper's abstract, one such model has 8.3 times fewer parameters than nine single-task models and is
better than a single-task baseline on two of the nine datasets. The authors released no weights. For results on single datasets see
vit_b16_imagenet, vivit_b16_kinetics400 and ast_b16_audioset.

Differences from the paper's code:
- Weights are random. The paper starts from a ViT-B/16 pretrained on ImageNet-21K, which this version cannot read; its learning rates are
  meant for fine-tuning.
- Gradients of all tasks are clipped after the mean over the batch, or with --optim.clip process before the mean over processes. The paper's
  code does the first for images and the second for videos and sounds.
- The learning rate does not jump back to its peak in the last step, and momentum is kept in fp32 instead of bf16.
- Images are resampled with antialiasing. A clip's brightness is multiplied by 0.6 to 1.4 instead of shifted by up to 32 of 255.
- Spectrograms are AST's, with AST's mean and std of AudioSet. The code that made the paper's spectrograms was not released;
  its settings do not normalise them.
"""

from polyvit_fast.config import MODELS, LogOptions, Optim, Task, Train
from polyvit_fast.data import Audio, Folder, Image, Manifest, Video

WARMUP_STEPS = {"images": 500, "kinetics400": 8_390, "moments": 30_910, "audioset": 795, "vggsound": 6_735}
"""Warm-up of each task trained alone, and of the five image tasks together. This experiment warms up for their sum."""
CLIP = Video(
    size=224,
    frames=32,
    stride=2,
    tubelet_frames=4,
    scale_jitter=(0.9, 1.33),
    colour_jitter=0.4,
    hue_jitter_degrees=72.0,
    colour_jitter_prob=0.8,
    grey_prob=0.1,
)
# The released settings have time masks too, but with a maximum ratio of 0, which switches them off.
SOUND = Audio(clip_seconds=8.0, num_mel_bins=128, channels=3, spectrogram="kaldi", freq_masks=1, freq_mask_bins=48)


def pictures(folder: str, num_classes: int, steps: int, lr_scale: float = 0.03) -> Task:
    """A task on images, with the settings that all five have in common."""
    return Task(
        modality=Image(size=384),
        train=Folder(path=f"data/{folder}/train"),
        val=Folder(path=f"data/{folder}/val"),
        num_classes=num_classes,
        steps=steps,
        batch=512,
        micro_batches=16,
        loss="sigmoid",
        lr_scale=lr_scale,
    )


config = Train(
    tasks={
        "imagenet": pictures("imagenet", 1000, 20_000),
        "cifar100": pictures("cifar100", 100, 10_000),
        "cifar10": pictures("cifar10", 10, 10_000),
        "pets": pictures("pets", 37, 500),
        "resisc45": pictures("resisc45", 45, 2_500, lr_scale=0.1),
        "kinetics400": Task(
            modality=CLIP,
            train=Manifest(path="data/kinetics400/train.csv"),
            val=Manifest(path="data/kinetics400/val.csv"),
            num_classes=400,
            zero_head=True,
            steps=3356 * 30,  # in an epoch, epochs
            batch=64,
            micro_batches=4,
            lr_scale=0.1,
        ),
        "moments": Task(
            modality=CLIP,
            train=Manifest(path="data/moments/train.csv"),
            val=Manifest(path="data/moments/val.csv"),
            num_classes=339,
            zero_head=True,
            steps=12364 * 10,
            batch=64,
            micro_batches=4,
            lr_scale=0.25,
        ),
        "audioset": Task(
            modality=SOUND,
            train=Manifest(path="data/audioset/train.csv"),
            val=Manifest(path="data/audioset/val.csv"),
            num_classes=527,
            zero_head=True,
            steps=318 * 50,
            batch=64,
            loss="sigmoid",
            multi_label=True,
            lr_scale=0.5,
            mixup=0.3,
            drop_path_rate=0.3,
        ),
        "vggsound": Task(
            modality=SOUND,
            train=Manifest(path="data/vggsound/train.csv"),
            val=Manifest(path="data/vggsound/val.csv"),
            num_classes=309,
            zero_head=True,
            steps=2694 * 50,
            batch=64,
            lr_scale=0.5,
            mixup=0.3,
            drop_path_rate=0.3,
        ),
    },
    model=MODELS["B"],
    optim=Optim(name="sgd", lr=1.0, momentum=0.9, warmup_steps=sum(WARMUP_STEPS.values()), clip_norm=1.0),
    schedule="weighted",
    seed=42,
    log=LogOptions(log_every_steps=100, eval_every_steps=5_000, save_every_steps=5_000),
)
