"""ViViT-B/16x4 (all patches of all frames in one encoder) on Kinetics-400: the single-task baseline of polyvit_b16.

Command: polyvit-fast train vivit_b16_kinetics400 --device cuda
ViViT's usual evaluation, 4 clips with 3 crops each: --tasks.kinetics400.modality.eval-clips 4 --tasks.kinetics400.modality.eval-crops 3

Files: data/kinetics400/train.csv and data/kinetics400/val.csv with the columns path and label, or the files that
--tasks.kinetics400.train.path and --tasks.kinetics400.val.path name. A label is a class number from 0 to 399; paths are relative to the
CSV's folder. The released code uses 214,834 and 17,637 clips.

Cost (computed, not measured): 88,929,424 parameters, 100,680 steps (30 epochs), 6.48 EFLOP.

Result: not run yet. For comparison: ViViT-B/16x2, whose tubelets are half as long, reaches 79.9 % top-1 with 4 x 3 views (README of ViViT
in google-research/scenic). It starts from a ViT-B/16 pretrained on ImageNet-21K. This experiment starts from random weights, because this
version cannot read those, while its learning rates are meant for fine-tuning.
"""

from dataclasses import replace

from polyvit_fast.experiments import polyvit_b16

config = replace(
    polyvit_b16.config,
    tasks={"kinetics400": polyvit_b16.config.tasks["kinetics400"]},
    optim=replace(polyvit_b16.config.optim, warmup_steps=polyvit_b16.WARMUP_STEPS["kinetics400"]),
)
