"""What flows through the last block of a trained model, forward and backward, written to activations.safetensors next to this file.

polyvit-fast train demo && python tests/files/record_activations.py runs/demo
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from polyvit_fast import experiments
from polyvit_fast.data.stream import Loader
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.run_folder import checkpoint

TASKS = ("shapes", "tones")
EXAMPLES = 2


def record(folder: Path) -> dict[str, Tensor]:
    """`<task>.<what>` and `<task>.<what>.grad`: inputs of norms and MLP, packed projection, attention's and the block's output."""
    config = experiments.load("demo")
    model = PolyViT.from_config(config)
    newest = checkpoint.find_newest(folder)
    assert newest, f"{folder} holds no checkpoint"
    model.load_state_dict(newest.load_tensors("model"))
    block, found = model.blocks[-1], {}

    def keep(name: str, tensor: Tensor) -> None:
        tensor.retain_grad()
        found[name] = tensor

    for task in TASKS:
        hooks = [
            block.norm1.register_forward_pre_hook(lambda _, inputs, task=task: keep(f"{task}.norm1", inputs[0])),
            block.attn.qkv.register_forward_hook(lambda _, __, output, task=task: keep(f"{task}.qkv", output)),
            block.attn.proj.register_forward_pre_hook(lambda _, inputs, task=task: keep(f"{task}.attention", inputs[0])),
            block.norm2.register_forward_pre_hook(lambda _, inputs, task=task: keep(f"{task}.norm2", inputs[0])),
            block.mlp.register_forward_pre_hook(lambda _, inputs, task=task: keep(f"{task}.mlp", inputs[0])),
            block.register_forward_hook(lambda _, __, output, task=task: keep(f"{task}.block", output)),
        ]
        batch = Loader(task, config, train=True).load(0)
        logits = model(batch.grid[:EXAMPLES], task)
        LOSSES[config.tasks[task].loss](logits, batch.labels[:EXAMPLES], 0.0).backward()
        for hook in hooks:
            hook.remove()
    weights = {f"weight.{name}": parameter for name, parameter in block.named_parameters()}
    gradients = {f"{name}.grad": tensor.grad for name, tensor in found.items()}
    return {name: tensor.detach().clone() for name, tensor in (found | gradients | weights).items()}


if __name__ == "__main__":
    save_file(record(Path(sys.argv[1])), Path(__file__).with_name("activations.safetensors"))
