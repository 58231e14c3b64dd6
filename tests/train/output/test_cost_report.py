import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from tiny_runs import Tile, change, tile_task, tiny_config

from polyvit_fast import cli, experiments
from polyvit_fast.config import MODELS, Model, Optim, Task
from polyvit_fast.data.sources.manifest import Folder
from polyvit_fast.data.sources.synthetic import Synthetic
from polyvit_fast.media import Sample
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.output.cost_report import estimate_cost, print_cost, write_notes
from polyvit_fast.train.step import Step

GIB = 2**30


def printed(config, capsys, monkeypatch, width=100):
    monkeypatch.setenv("COLUMNS", str(width))
    print_cost(config)
    return capsys.readouterr().out


def cells(text, title, task):
    """The words of a task's line in the table under a title."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return next(line.split() for line in lines[start:] if line.split()[:1] == [task])


def large_config(**changes):
    """ViT-L on pictures of 384 pixels, which no machine of ours could train."""
    tasks = {name: tile_task(modality=Tile(size=192), batch=batch) for name, batch in (("small", 8), ("big", 720), ("bigger", 720))}
    return tiny_config(**({"tasks": tasks, "model": MODELS["L"]} | changes))


@pytest.mark.parametrize("width", [80, 200])
def test_no_word_and_no_number_is_broken(capsys, monkeypatch, width):
    names = [f"moments-in-time_of_three_seconds_each_number_{j}" for j in range(14)]
    text = printed(tiny_config(tasks={name: tile_task(steps=123_456) for name in names}), capsys, monkeypatch, width)
    lines = text[: text.index("\n- ")].splitlines()
    assert all(len(line.rstrip()) <= width for line in lines[1:])
    words = {word for line in lines for word in re.findall(r"[\w.,×]+", line.replace("_", " "))}
    assert {"moments", "in", "time", "three", "seconds", "each", "number", "activations", "modality", "1×16×16×3", "123,456"} <= words
    assert not {"num", "steps_", "examples_per_second"} & words
    assert not {word for word in words if re.fullmatch(r"secon|seco|activ|modal|tions|ity", word)}


def test_parameters_by_component_are_those_of_the_real_model():
    config = tiny_config(model=Model(dim=32, depth=3, num_heads=2, mlp_dim=64, num_adaptor_layers=1))
    counts = estimate_cost(config).parameters
    names = [name for name, parameter in PolyViT.from_config(config).named_parameters() for _ in range(parameter.numel())]
    roots = {
        "trunk, shared by all tasks": ("blocks.", "norm."),
        "tokenizer, tile": ("tokenizers.tile.weight", "tokenizers.tile.bias", "tokenizers.tile.cls_token", "tokenizers.tile.pos_embed"),
        "adaptors, tile": ("tokenizers.tile.blocks.",),
        "heads, one per task": ("heads.",),
    }
    assert counts == {component: sum(name.startswith(root) for name in names) for component, root in roots.items()}
    assert estimate_cost(config).num_parameters == len(names)


@pytest.mark.parametrize(
    ("schedule", "num_steps", "steps"),
    [("weighted", 20, (12, 8)), ("uniform", 20, (10, 10)), ("accumulating", 10, (10, 10)), (lambda config: [("a",)] * 3, 3, (3, 0))],
)
def test_steps_and_training_flops_are_those_of_the_schedule(schedule, num_steps, steps):
    report = estimate_cost(tiny_config(schedule=schedule))
    assert report.num_steps == num_steps
    # 5 tokens of width 32 through a block, one through the last with two heads, 4 tubelets of 8 x 8 x 3, a head: multiplications in one
    # view, by hand.
    matrices = 32 * 96 + 32 * 32 + 2 * 32 * 64
    blocks = 5 * matrices + 2 * 5 * 5 * 32 + matrices + 2 * 5 * 2 * 32
    forward = [2 * (blocks + 4 * 192 * 32 + 32 * num_classes) for num_classes in (3, 4)]
    assert [row.forward_flops for row in report.tasks] == forward
    assert [row.num_steps for row in report.tasks] == list(steps)
    assert report.training_flops == sum(3 * 8 * count * flops for count, flops in zip(steps, forward, strict=True))


def test_tables_hold_the_numbers(capsys, monkeypatch):
    text = printed(tiny_config(tasks={"a": tile_task(steps=75, micro_batches=2, modality=Tile(views=4))}), capsys, monkeypatch)
    assert "75 steps (weighted schedule)" in text
    assert cells(text, "FLOPs", "a")[1:4] == ["tile", "1×16×16×3", "5"]
    assert cells(text, "Memory", "a")[1:3] == ["8", "2"]
    # 75 steps of 8 examples are 12 passes over 50 samples.
    assert cells(text, "Steps and data", "a") == ["a", "75", "8", "50", "12.0", "30", "4"]


def test_evaluation_counts_every_view_and_time():
    report = estimate_cost(tiny_config(tasks={"a": tile_task(steps=75, modality=Tile(views=4))}, eval_every_steps=20))
    # 4 evaluations of 30 samples in 4 views against 75 steps of 8 examples, each three forward passes: 480 of 1800.
    assert any("Evaluation, 4 times, adds 26.7%" in note for note in write_notes(report))


@pytest.mark.parametrize(
    ("name", "words"),
    # Total FLOPs by hand: 3 x batch x steps x twice the GMACs of one view, summed; 1e14 of them a second.
    [("vit_b16_imagenet", "3.13 EFLOP are 8.69 hours at"), ("polyvit_b16", "23.1 EFLOP are 2.68 days at"), ("smoke", "")],
)
def test_time_of_long_runs(name, words):
    [note] = [note for note in write_notes(estimate_cost(experiments.load(name))) if note.startswith("FLOPs")]
    assert words in note
    assert ("sustained 100 TFLOP/s" in note) == bool(words)


FROZEN = ("blocks.*", "norm.*", "tokenizers.*")


def test_what_is_frozen_is_counted_as_such(capsys, monkeypatch):
    text = printed(tiny_config(optim=Optim(name="adamw", freeze=FROZEN)), capsys, monkeypatch)
    heads = 32 * (3 + 4) + 3 + 4
    assert f"({heads:,} trained)" in text
    assert cells(text, "Parameters", "heads,")[-1] == f"{heads}"
    assert cells(text, "Parameters", "trunk,")[-1] == "0"
    assert "Frozen parameters need no gradient" in text
    report, whole = (estimate_cost(tiny_config(optim=Optim(name="adamw", freeze=freeze))) for freeze in (FROZEN, ()))
    assert report.state_bytes == 4 * (report.num_parameters + 3 * heads)
    # A head's backward multiplies once, for its weight, and nothing before it multiplies at all.
    for row, num_classes in zip(report.tasks, (3, 4), strict=True):
        assert row.training_flops == 8 * row.num_steps * (row.forward_flops + 2 * 32 * num_classes)
    assert report.training_flops < whole.training_flops / 2.9
    assert "trained" not in printed(tiny_config(), capsys, monkeypatch).partition("Memory")[0].replace("is trained", "")


@pytest.mark.parametrize(
    "optim",
    [Optim(name="sgd"), Optim(name="adamw", ema_decay=0.99), Optim(name="adamw", freeze=("blocks.*",))],
    ids=["sgd", "adamw", "frozen"],
)
def test_state_is_what_a_run_allocates(optim):
    config = tiny_config(optim=optim)
    step = Step(PolyViT.from_config(config), config)
    held = [step.parameters.values, step.parameters.grads]
    held += [flat for flats in (*step.optimizer.moments.values(), step.optimizer.ema or ()) for flat in flats]
    # The flat buffers pad each tensor to 64 elements.
    assert estimate_cost(config).state_bytes == pytest.approx(sum(buffer.nbytes for buffer in held), rel=0.05)


def test_a_model_of_forty_terabytes_is_planned():
    report = estimate_cost(tiny_config(model=Model(dim=65536, depth=200, num_heads=512, mlp_dim=262144)))
    assert report.num_parameters > 10**13
    assert report.state_bytes == 16 * report.num_parameters


def test_missing_data_leaves_the_rest(tmp_path, capsys, monkeypatch):
    missing = tile_task(train=Folder(path=str(tmp_path / "no[w]here")))
    text = printed(replace(tiny_config(), tasks={"gone": missing, "there": tile_task()}), capsys, monkeypatch, 300)
    assert cells(text, "Steps and data", "gone") == ["gone", "10", "8", "-", "-", "30", "1"]
    assert cells(text, "Steps and data", "there") == ["there", "10", "8", "50", "1.60", "30", "1"]
    assert cells(text, "FLOPs", "gone")[1:] == cells(text, "FLOPs", "there")[1:]
    [line] = [line for line in text.splitlines() if "No samples" in line]
    assert line.strip() == f"- No samples of gone: folder {tmp_path}/no[w]here: No such file or directory."


def test_missing_validation_data_is_reported_too(tmp_path):
    report = estimate_cost(tiny_config(tasks={"a": tile_task(val=Folder(path=str(tmp_path / "none")))}))
    assert report.tasks[0].num_passes == 1.6
    notes = write_notes(report)
    assert any("No samples of a: folder" in note for note in notes)
    assert not any("Evaluation" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": {"a": tile_task(steps=2000)}}, "a goes 320 times over its training samples"),
        ({"tasks": {"a": tile_task(train=Synthetic(num_samples=1000))}}, "a sees only 8.00% of its training samples"),
        ({"optim": Optim(warmup_steps=20)}, "The warm-up of 20 steps does not end within the run"),
        ({"schedule": lambda config: [("a",)] * 3}, "No step in this schedule: b."),
        ({"optim": Optim(ema_decay=0.9)}, "parameters, gradients, optimizer, moving average"),
        ({"tasks": {"a": tile_task(micro_batches=8)}, "recompute": True}, "with single examples in fp32: a smaller model or grid lowers"),
        ({"recompute": True}, "training takes four times the forward pass"),
        ({"recompute": True}, "in fp32, each block's input and what one block keeps."),
    ],
)
def test_notes_say_what_may_need_a_change(changes, words):
    assert any(words in note for note in write_notes(estimate_cost(tiny_config(**changes))))
    assert not any(words in note for note in write_notes(estimate_cost(tiny_config())))


def test_single_examples_are_sent_to_bf16():
    config = tiny_config(tasks={"a": tile_task(modality=Tile(size=256), batch=1)})
    wide, narrow = estimate_cost(config), estimate_cost(replace(config, precision="bf16"))
    found = re.search("most memory, (.*), with single examples; --precision bf16 lowers that to (.*)[.]", write_notes(wide)[0])
    memory = [re.search("most memory, (.*), with single examples", write_notes(report)[0])[1] for report in (wide, narrow)]
    assert list(found.groups()) == memory
    assert narrow.peak_bytes(narrow.tasks[0]) < 0.85 * wide.peak_bytes(wide.tasks[0])


def test_single_examples_in_bf16_are_sent_to_recomputation():
    model = Model(dim=32, depth=6, num_heads=2, mlp_dim=64)
    config = tiny_config(tasks={"a": tile_task(modality=Tile(size=256), batch=1)}, precision="bf16", model=model)
    before, after = estimate_cost(config), estimate_cost(change(config, recompute=True))
    found = re.search("with single examples; --recompute lowers that to (.*)[.]", write_notes(before)[0])
    assert f"most memory, {found[1]}, with single examples" in write_notes(after)[0]
    assert after.peak_bytes(after.tasks[0]) < 0.5 * before.peak_bytes(before.tasks[0])
    assert after.training_flops * 3 == before.training_flops * 4


def test_a_residual_of_bf16_takes_less_memory():
    wide, narrow = (estimate_cost(tiny_config(precision="bf16", residual=residual)) for residual in ("fp32", "bf16"))
    assert narrow.peak_bytes(narrow.tasks[0]) < wide.peak_bytes(wide.tasks[0])


def test_gpus_get_the_least_micro_batches_that_fit(capsys, monkeypatch):
    config = large_config()
    report = estimate_cost(config)
    text = printed(config, capsys, monkeypatch)
    for row in report.tasks:
        for size, cell in zip((16, 24, 40, 80), cells(text, "Memory", row.name)[-4:], strict=True):
            divisors = [n for n in range(1, row.task.batch + 1) if row.task.batch % n == 0]
            peaks = {n: report.state_bytes + row.activation_bytes / n for n in divisors}
            assert cell == str(min(n for n, peak in peaks.items() if peak <= 0.8 * size * GIB))
    assert len({row.activation_bytes for row in report.tasks}) == 2
    assert any("big needs the most memory (like 1 more)" in note for note in write_notes(report))


def test_a_gpu_that_one_example_overfills_gets_a_dash(capsys, monkeypatch):
    tasks = {"huge": tile_task(modality=Tile(size=4096), batch=2)}
    text = printed(large_config(tasks=tasks), capsys, monkeypatch)
    assert cells(text, "Memory", "huge")[-4:] == ["-", "-", "-", "-"]


@pytest.mark.parametrize("optim", [Optim(name="adamw"), Optim(name="sgd", ema_decay=0.9, freeze=("blocks.*",))], ids=["whole", "frozen"])
def test_a_checkpoint_is_as_large_as_estimated(tmp_path, capsys, optim):
    from polyvit_fast.train.loop import train

    config = tiny_config(out=str(tmp_path), keep=1, model=Model(dim=128, depth=2, num_heads=2, mlp_dim=512), optim=optim)
    [note] = [note for note in write_notes(estimate_cost(config)) if "checkpoint" in note]
    mebibytes = float(re.search(r"takes ([\d.]+) MiB on disk; up to 2 stay", note)[1])
    train(config, "tiny", ["test"])
    [folder] = (tmp_path / "checkpoints").iterdir()
    assert mebibytes * 2**20 == pytest.approx(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), rel=0.02)


def test_the_advice_can_be_followed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = experiments.load("smoke")
    before = write_notes(estimate_cost(config))[0]
    found = re.search(r"needs the most memory, (.*?); (--tasks\.\S+ \d+) lowers that to (.*?),", before)
    assert cli.run(["plan", "smoke", *found[2].split()]) == 0
    name = re.search(r"--tasks\.(\S+)\.micro", found[2])[1]
    with_state = " ".join(cells(capsys.readouterr().out, "Memory", name)[-6:-4])
    assert with_state == found[3] != found[1]


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_off(width, capsys, monkeypatch):
    text = printed(experiments.load("polyvit_b16"), capsys, monkeypatch, width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for title in ("FLOPs", "Memory", "Steps and data"):
        assert cells(text, title, "kinetics400")


def test_a_wrong_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule = 'sometimes' is unknown"):
        estimate_cost(tiny_config(schedule="sometimes"))


@dataclass(frozen=True, kw_only=True)
class Remarked(Synthetic):
    """A source that has something to say, and cannot be listed when it has no sample."""

    def samples(self, task: Task) -> Sequence[Sample]:
        if self.seed:
            raise ValueError("it is gone")
        return super().samples(task)

    def remarks(self, task: Task) -> list[str]:
        return [f"of {self.num_samples} samples, two are equal"]


def test_remarks_on_the_data_come_once_with_their_task():
    same, other = Remarked(num_samples=9), Remarked(num_samples=8)
    tasks = {"a": tile_task(train=same, val=same), "b": tile_task(train=same, val=other), "c": tile_task(train=Remarked(seed=1))}
    notes = write_notes(estimate_cost(tiny_config(tasks=tasks)))
    equal = [note for note in notes if "are equal" in note]
    assert equal == [f"{name}: of {count} samples, two are equal." for name, count in (("a", 9), ("b", 9), ("b", 8))]
    assert "No samples of c: it is gone." in notes
