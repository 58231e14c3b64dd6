"""AST-B/16 on the balanced set of AudioSet: the single-task baseline of polyvit_b16.

Command: polyvit-fast train ast_b16_audioset --device cuda

Files: data/audioset/train.csv and data/audioset/val.csv with the columns path and labels, or the files that --tasks.audioset.train.path and
--tasks.audioset.val.path name. Labels are class numbers from 0 to 526, separated by semicolons; paths are relative to the CSV's folder. The
released code uses 20,361 and 18,589 clips.

Cost (computed, not measured): 86,360,591 parameters, 15,900 steps (50 epochs), 0.209 EFLOP.

Result: not run yet. For comparison, on the same training set: 0.309 mAP for MBT-B with audio alone, the most similar model (README of MBT
in google-research/scenic), and 0.347 mAP for AST, whose patches overlap (README of YuanGongND/ast). Both start from ImageNet weights. This
experiment starts from random weights, because this version cannot read theirs, while its learning rates are meant for fine-tuning.
"""

from dataclasses import replace

from polyvit_fast.experiments import polyvit_b16

config = replace(
    polyvit_b16.config,
    tasks={"audioset": polyvit_b16.config.tasks["audioset"]},
    optim=replace(polyvit_b16.config.optim, warmup_steps=polyvit_b16.WARMUP_STEPS["audioset"]),
)
