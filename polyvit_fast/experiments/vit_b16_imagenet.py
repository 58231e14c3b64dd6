"""ViT-B/16 at 384 pixels on ImageNet: the single-task baseline of polyvit_b16.

Command: polyvit-fast train vit_b16_imagenet --device cuda

Files: data/imagenet/train/ and data/imagenet/val/ with a folder per class, or the folders that --tasks.imagenet.train.path and
--tasks.imagenet.val.path name. The released code trains on 99 % of ILSVRC 2012's training images and validates on the other 1 %.

Cost (computed, not measured): 86,859,496 parameters, 20,000 steps, 3.13 EFLOP.

Result: not run yet. For comparison: a ViT-B/16 pretrained on ImageNet-21K and fine-tuned at 384 pixels reaches 84.53 % top-1 (README of
google-research/vision_transformer). This experiment starts from random weights, because this version cannot read those, while its learning
rates are meant for fine-tuning. The loss is sigmoid cross-entropy as in PolyViT; ViT's fine-tuning uses softmax cross-entropy
(--tasks.imagenet.loss softmax).
"""

from dataclasses import replace

from polyvit_fast.experiments import polyvit_b16

config = replace(
    polyvit_b16.config,
    tasks={"imagenet": polyvit_b16.config.tasks["imagenet"]},
    optim=replace(polyvit_b16.config.optim, warmup_steps=polyvit_b16.WARMUP_STEPS["images"]),
)
