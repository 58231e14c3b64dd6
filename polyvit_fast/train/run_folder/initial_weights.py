"""The weights that a new run starts from: those of an earlier run, or of a model that another library has trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyvit_fast.config import Modality, Model, Task, Train
from polyvit_fast.data.sources.classes import class_list
from polyvit_fast.model import pretrained
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.model.pretrained.apply import LoadReport, Target, load_into
from polyvit_fast.model.pretrained.weights import HeadWeights, Pretrained, TokenizerWeights, describe_tokens, select, select_trunk
from polyvit_fast.train.run_folder.checkpoint import Checkpoint, find_checkpoint
from polyvit_fast.train.run_folder.earlier_versions import upgrade


def load_initial_weights(model: PolyViT, config: Train) -> list[LoadReport]:
    """Load what `config.init` names into the model, and report of each source what was done with it.

    Raises ValueError that names the source when it cannot be read or does not fit.
    """
    parts_of = list_parts(config)
    sources = {source: read_source(source) for source in parts_of}
    target = Target(
        polyvit=model,
        model=config.model,
        modalities=config.modalities,
        tasks=config.tasks,
        classes={name: _list_classes(name, task) for name, task in config.tasks.items()} if any(s.heads for s in sources.values()) else {},
        interpolation=config.init_positions,
        inflation=config.init_tubelets,
    )
    return [load_into(target, sources[source], parts) for source, parts in parts_of.items()]


def _list_classes(name: str, task: Task) -> tuple[str, ...] | None:
    try:
        return class_list(task)
    except (ValueError, OSError) as error:
        raise ValueError(f"task {name}: {error}") from error


def list_parts(config: Train) -> dict[str, list[str] | None]:
    """The parts of the model that each source of `config.init` is for; None: all that it has."""
    init = config.init_parts
    if "" in init:
        return {init[""]: None}
    first = next((name for name in init if name in config.modalities), None)
    if first and "trunk" not in init:
        init = {"trunk": init[first], **init}
    return {source: [part for part, other in init.items() if other == source] for source in dict.fromkeys(init.values())}


def read_source(source: str) -> Pretrained:
    """A source of `Train.init`: a run folder, alone or with @best, @newest or @STEP, or what `pretrained.read` knows."""
    if Path(source).parent.name == "checkpoints":
        run, step = Path(source).parent.parent, Path(source).name.removeprefix("step_").lstrip("0")
        raise ValueError(f"{source} is a checkpoint; name its run and its step: {run}@{step}")
    folder, _, which = source.partition("@")
    if (Path(folder) / "checkpoints").is_dir():
        return read_checkpoint(find_checkpoint(Path(folder), which or "newest"), source)
    return pretrained.read(source)


def read_checkpoint(found: Checkpoint, source: str) -> Pretrained:
    """The weights of a run's checkpoint: its moving average where it has one."""
    tensors = found.load_tensors("ema" if "ema" in found.names else "model")
    stored = upgrade(found.config)
    model = Model(**{name: value for name, value in stored["model"].items() if name != "type"})
    tasks, classes = stored["tasks"], found.state.get("classes", {})
    there = {name.split(".")[1] for name in tensors if name.startswith("tokenizers.")}
    # Versions before 0.7 did not store which tokenizer a task has; their classes of modalities are called like the modalities.
    modality_of = found.state.get("modality_of") or {name: str(task["modality"]["type"]).lower() for name, task in tasks.items()}
    # In the order of the run's tasks, of which the first is that of a model's first modality: the file has them by the alphabet.
    names = [*(name for name in dict.fromkeys(modality_of.values()) if name in there), *sorted(there - set(modality_of.values()))]
    heads = {
        name: HeadWeights(
            modality=modality_of[name] if modality_of[name] in names else names[0],
            tensors=select(tensors, f"heads.{name}."),
            class_names=tuple(classes[name]) if classes.get(name) else None,
        )
        for name in tasks
    }
    trunk = select_trunk(tensors, model.num_adaptor_layers)
    # Of versions before 0.7 nothing is described: their tokens do not overlap, and there is one class token.
    described = found.state.get("tokenizers", {})
    tokenizers = {name: TokenizerWeights.from_json(select(tensors, f"tokenizers.{name}."), described.get(name, {})) for name in names}
    return Pretrained(source=source, kind=f"run, step {found.step}", model=model, tokenizers=tokenizers, trunk=trunk, heads=heads)


def describe_tokenizers(modalities: Mapping[str, Modality]) -> dict[str, dict[str, Any]]:
    """What a checkpoint has to say of its tokenizers, so that their weights serve without the run's configuration."""
    return {name: describe_tokens(modality) for name, modality in modalities.items()}
