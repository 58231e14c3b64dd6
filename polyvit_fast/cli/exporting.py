"""The command export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyvit_fast.cli.arguments import split_run
from polyvit_fast.cli.help import show_options
from polyvit_fast.signals import stop_on_signals


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write one task of a run as a plain Vision Transformer that another library loads, with a model card, and compare the logits.
    Or write all tasks for this package, without the optimizer.

    $ polyvit-fast export runs/demo --task shapes --to timm --out shapes-timm
    $ polyvit-fast export runs/demo --task motion --to onnx --out motion-onnx --checkpoint best
    $ polyvit-fast export runs/demo --to polyvit --out demo-weights
    """

    to: Literal["timm", "hf", "safetensors", "torch.export", "onnx", "polyvit"]
    """timm: pictures, for timm.create_model("local-dir:FOLDER", pretrained=True).
    hf: Hugging Face's ViT, DeiT, ViViT, VideoMAE or AST, whichever computes the same, for from_pretrained.
    safetensors: our own names, for --init and polyvit_fast.pretrained.load.
    torch.export: a .pt2 with the graph, for PyTorch alone.
    onnx: the graph for onnxruntime and others; needs pip install polyvit-fast[onnx].
    polyvit: all tasks, for load, predict, eval, features, probe and --init: a run folder with nothing but the weights."""
    out: str
    """Folder for the files, which must be empty or not there."""
    task: str = ""
    """Name of the task. Empty: the run's only one, and with --to polyvit all."""
    checkpoint: str = "newest"
    """newest, best, or the step of a checkpoint."""
    overwrite: bool = False
    """Replace the model that an earlier export wrote into the folder."""


def run_export(arguments: list[str]) -> int:
    """Take one task of a run away."""
    show_options(arguments, "export RUN --to FORM --out FOLDER [--option value ...]", ExportOptions.__doc__ or "", ExportOptions)
    folder, options = split_run(ExportOptions, arguments, "export")
    from polyvit_fast.inference.export.api import export

    choice = {"task": options.task or None, "checkpoint": options.checkpoint, "overwrite": options.overwrite}
    with stop_on_signals():
        exported = export(folder, options.to, options.out, **choice)
    print(exported)
    return 0
