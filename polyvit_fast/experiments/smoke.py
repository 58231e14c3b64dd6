"""Forty steps of a tiny PolyViT on synthetic images, videos and audio, to check that everything works.

Command: polyvit-fast train smoke
Cost: about 10 seconds on two CPU cores. No files are read; the samples are patterns with noise.
Result: the loss of every task falls by more than 30 % (tests/train/test_loop.py checks that).
"""

from polyvit_fast.config import LogOptions, Model, Optim, Task, Train
from polyvit_fast.data import Audio, Image, Synthetic, Video

config = Train(
    tasks={
        "pictures": Task(
            modality=Image(size=32, patch=8),
            train=Synthetic(num_samples=100),
            val=Synthetic(num_samples=40, seed=1),
            num_classes=5,
            batch=16,
            steps=16,
        ),
        "clips": Task(
            modality=Video(size=32, patch=16, frames=4, tubelet_frames=2),
            train=Synthetic(num_samples=60),
            val=Synthetic(num_samples=20, seed=1),
            num_classes=4,
            batch=8,
            steps=12,
        ),
        "sounds": Task(
            modality=Audio(clip_seconds=0.32, num_mel_bins=32, patch=16),
            train=Synthetic(num_samples=60),
            val=Synthetic(num_samples=20, seed=1),
            num_classes=6,
            batch=8,
            steps=12,
            loss="sigmoid",
            multi_label=True,
        ),
    },
    model=Model(dim=64, depth=2, num_heads=4, mlp_dim=128),
    optim=Optim(name="adamw", lr=2e-3, warmup_steps=2),
    log=LogOptions(log_every_steps=5, save_every_steps=20),
)
