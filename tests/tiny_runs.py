"""Small tasks and runs for tests: training one takes a second."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from polyvit_fast.config import LogOptions, Modality, Model, Optim, Task, Train
from polyvit_fast.data.sources.synthetic import Synthetic


@dataclass(frozen=True, kw_only=True)
class Tile(Modality):
    """A small grid that only `Synthetic` can fill."""

    name: ClassVar[str] = "tile"
    size: int = 16
    views: int = 1

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return (1, self.size, self.size, 3)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    @property
    def eval_views(self) -> int:
        return self.views


def tile_task(**changes) -> Task:
    values = {"modality": Tile(), "train": Synthetic(num_samples=50), "val": Synthetic(num_samples=30, seed=1), "num_classes": 3}
    return Task(**(values | {"steps": 10, "batch": 8} | changes))


def tiny_config(**changes) -> Train:
    """Two tasks on synthetic tiles and a two-block model: takes a second to train."""
    tasks = {"a": tile_task(steps=12), "b": tile_task(steps=8, num_classes=4, loss="sigmoid", multi_label=True)}
    model = Model(dim=32, depth=2, num_heads=2, mlp_dim=64)
    config = Train(
        tasks=tasks, model=model, optim=Optim(name="adamw", lr=3e-3), log=LogOptions(log_every_steps=5), device="cpu", precision="fp32"
    )
    return change(config, **changes)


def change(config: Train, **values) -> Train:
    """`config` with other values in its fields or in those of its groups, each by its own name as on the command line."""
    for group in ("data", "compute", "log", "distributed"):
        options = getattr(config, group)
        names = {field.name for field in fields(options)} & values.keys()
        values[group] = replace(values.get(group, options), **{name: values.pop(name) for name in names})
    return replace(config, **values)
