"""Where the time of a ViT-B training step goes, by families of kernels: ours, and timm's, from torch's profiler, both run eagerly.

python benchmarks/step_profile.py --out FILE           on a GPU; the file has the kernels below each family too
python benchmarks/step_profile.py --out FILE --small   a small model on the CPU's path, to see that it works
"""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import machine
import torch
from bench_step import vit
from harness import TIME_STEPS, format_error
from ported import timm_vit
from steps import Trainer, fastest_backend, our_trainer, peer_trainer
from torch.profiler import ProfilerActivity, profile

from polyvit_fast.model.polyvit import PolyViT
from polyvit_kernels.aot import commands

STEPS = 5
KERNELS_SHOWN = 4
KERNEL = "    "  # how the line of a kernel begins, below its family's
OTHER = "other"
# The first that is found in a kernel's name, or on a CPU in an operator's, names its family.
FAMILIES = {
    "casts and copies": r"memcpy|memset|copy_kernel|direct_copy|catarray|fillfunctor|aten::(copy_|_to_copy|fill_|zero_|cat|clone)$",
    "loss": r"log_?softmax|nll_loss|binary_cross_entropy|log_sigmoid",
    "attention backward": r"(attention|flash|fmha|sdpa|softmax).*(bwd|bprop|backward)|dot_do_o|fmha_cutlassb",
    "attention forward": r"attention|flash|fmha|sdpa|softmax",
    "update": r"adam|sgd_|multi_tensor_apply|normtwoops|linalg_vector_norm",
    "norms": r"layer_?norm|gammabeta",
    "linear_gelu": r"linear_gelu",
    "linear_add": r"linear_add",
    "dgelu": r"dgelu",
    "GELU by itself": r"gelu",
    "patches": r"patch_embed|conv|im2col|fprop|dgrad|wgrad",
    "cuBLAS": r"gemm|nvjet|cutlass|xmma|splitk|gemv|addmm|aten::(mm|bmm)$",
    "sums": r"reduce_kernel|aten::sum$",
}


def find_family(name: str) -> str:
    """Which part of a step a kernel belongs to, by its name."""
    return next((key for key, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


@dataclass
class FamilyTime:
    """What a family takes in a step: microseconds, launches, and microseconds of each kernel."""

    us: float = 0.0
    launches: float = 0.0
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def sum_families(events: Iterable[tuple[str, float, int]], steps: int) -> dict[str, FamilyTime]:
    """Of (kernel, microseconds, launches) in so many steps, the largest first."""
    found: dict[str, FamilyTime] = defaultdict(FamilyTime)
    for name, us, launches in events:
        time = found[find_family(name)]
        time.us += us / steps
        time.launches += launches / steps
        time.kernels[name] += us / steps
    return dict(sorted(found.items(), key=lambda item: -item[1].us))


def format_families(title: str, found: dict[str, FamilyTime], seconds: float) -> list[str]:
    """A line for each family, and under it the kernels that take most. `seconds` is a step by the clock, without the profiler."""
    total = sum(time.us for time in found.values())
    lines = [f"{title}: {seconds * 1e3:.2f} ms a step; its kernels take {total / 1e3:.2f} ms"]
    for name, time in found.items():
        lines.append(f"  {name:18} {time.us / 1e3:9.3f} ms {time.us / max(total, 1e-9):6.1%} {time.launches:7.0f} launches")
        most = sorted(time.kernels.items(), key=lambda item: -item[1])[:KERNELS_SHOWN]
        lines += [f"{KERNEL}{us / 1e3:9.3f} ms  {kernel[:100]}" for kernel, us in most]
    return lines


def profile_steps(trainer: Trainer) -> list[tuple[str, float, int]]:
    """(kernel, microseconds, launches) of `STEPS` steps; on a CPU of operators."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if machine.HAS_GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            trainer.step()
        if machine.HAS_GPU:
            torch.cuda.synchronize()
    rows = profiler.key_averages()
    if not machine.HAS_GPU:
        return [(row.key, row.self_cpu_time_total, row.count) for row in rows]
    # A range that somebody marked holds the kernels in it once more.
    on_gpu = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA and not getattr(row, "is_user_annotation", False)]
    return [(row.key, row.self_device_time_total, row.count) for row in on_gpu]


def report(title: str, build: Callable[[], Trainer]) -> list[str]:
    """The table of one trainer, or why there is none."""
    try:
        trainer = build()
        TIME_STEPS(trainer.step, 3)
        seconds = median(TIME_STEPS(trainer.step, STEPS))
        return format_families(title, sum_families(profile_steps(trainer), STEPS), seconds)
    except Exception as error:
        return [f"{title}: {format_error(error)}"]


def main() -> int:
    """The command; gives its status."""
    parser = commands.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file for the tables")
    parser.add_argument("--small", action="store_true", help="a small model")
    args = parser.parse_args()
    case = vit("Ti", 1) if args.small else vit("B", 256)
    case = replace(case, model=replace(case.model, depth=1)) if args.small else case
    narrow = replace(case, residual="bf16")
    model, narrow_model = (PolyViT.from_config(each.config).to(machine.DEVICE) for each in (case, narrow))
    backend = fastest_backend(case.model, case.task)
    tables = [
        f"{machine.find_name()}, {'ViT-Ti of one block' if args.small else 'ViT-B/16'}, batch {case.task.batch}, 224 × 224",
        *report("ours, eager", partial(our_trainer, case.config, model, captured=False)),
        *report("ours, eager, bf16 residual", partial(our_trainer, narrow.config, narrow_model, captured=False)),
        *report("timm, eager", partial(peer_trainer, case, timm_vit, model, backend=backend)),
    ]
    args.out.write_text("\n".join(tables) + "\n")
    print("\n".join(line for line in tables if not line.startswith(KERNEL)))
    print(f"profile of a step written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
