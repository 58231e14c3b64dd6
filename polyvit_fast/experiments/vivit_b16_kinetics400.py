"""ViViT-B/16x4 (all patches of all frames in one encoder) on Kinetics-400: the single-task baseline of polyvit_b16.

Command: polyvit-fast train vivit_b16_kinetics400 --device cuda
ViViT's usual test, 4 clips in 3 crops each: --tasks.kinetics400.modality.eval-clips 4 --tasks.kinetics400.modality.eval-crops 3

Files: data/kinetics400/train.csv and data/kinetics400/val.csv, with the columns path and label (0 to 399; paths start beside the CSV),
or where --tasks.kinetics400.train.path and --tasks.kinetics400.val.path say. The released code takes 214,834 and 17,637 clips.

Cost, computed and not measured: 88,929,424 parameters, 100,680 steps (30 epochs), 6.48 EFLOP.

Result: none; we have not run it. For scale: ViViT-B/16x2, whose tubelets are half as long, has 79.9 % top-1 in 4 x 3 views (README of
ViViT in google-research/scenic). It starts from a ViT-B/16 of ImageNet-21K; here weights are random, because this version cannot read
those; the rates are for fine-tuning.
"""

from dataclasses import replace

from polyvit_fast.experiments import polyvit_b16

config = replace(
    polyvit_b16.config,
    tasks={"kinetics400": polyvit_b16.config.tasks["kinetics400"]},
    optim=replace(polyvit_b16.config.optim, warmup_steps=polyvit_b16.WARMUP_STEPS["kinetics400"]),
)
