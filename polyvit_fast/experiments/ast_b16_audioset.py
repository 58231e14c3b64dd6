"""AST-B/16 on the balanced set of AudioSet: the single-task baseline of polyvit_b16.

Command: polyvit-fast train ast_b16_audioset --device cuda

Files: data/audioset/train.csv and data/audioset/val.csv, with the columns path and labels (0 to 526, separated by ;; paths start beside the
CSV), or where --tasks.audioset.train.path and --tasks.audioset.val.path say. The released code takes 20,361 and 18,589 clips.

Cost, computed and not measured: 86,360,591 parameters, 15,900 steps (50 epochs), 0.209 EFLOP.

Result: none; we have not run it. For scale, on the same training set: 0.309 mAP of MBT-B with audio alone, which is nearest to this (README
of MBT in google-research/scenic); 0.347 mAP of AST (README of YuanGongND/ast), whose patches overlap. Both start from ImageNet; here
weights are random, because this version cannot read theirs; the rates are for fine-tuning.
"""

from dataclasses import replace

from polyvit_fast.experiments import polyvit_b16

config = replace(
    polyvit_b16.config,
    tasks={"audioset": polyvit_b16.config.tasks["audioset"]},
    optim=replace(polyvit_b16.config.optim, warmup_steps=polyvit_b16.WARMUP_STEPS["audioset"]),
)
