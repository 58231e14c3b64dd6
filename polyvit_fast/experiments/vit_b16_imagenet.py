"""ViT-B/16 at 384 pixels on ImageNet: the single-task baseline of polyvit_b16.

Command: polyvit-fast train vit_b16_imagenet --device cuda

Files: data/imagenet/train/ and data/imagenet/val/, a folder per class, or where --tasks.imagenet.train.path and
--tasks.imagenet.val.path say. The released code takes 99 % of ILSVRC 2012's training pictures and the other 1 %.

Cost, computed and not measured: 86,859,496 parameters, 20,000 steps, 3.13 EFLOP.

Result: none; we have not run it. For scale: a ViT-B/16 of ImageNet-21K, fine-tuned at 384 pixels, has 84.53 % top-1 (README of
google-research/vision_transformer). Here weights are random, because this version cannot read those; the rates are for fine-tuning.
Its loss is sigmoid cross-entropy, as in PolyViT; ViT's own fine-tuning has softmax (--tasks.imagenet.loss softmax).
"""

from dataclasses import replace

from polyvit_fast.experiments import polyvit_b16

config = replace(
    polyvit_b16.config,
    tasks={"imagenet": polyvit_b16.config.tasks["imagenet"]},
    optim=replace(polyvit_b16.config.optim, warmup_steps=polyvit_b16.WARMUP_STEPS["images"]),
)
