"""The comparison of schedules: what is run, how it is summarised, and that the document has the tables of the committed results."""

import io
import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import conditions
import intervals
import numpy as np
import pytest
import results as results_module
import tables
import torch
from assignment import Assignment
from runner import RunPool

from polyvit_fast.data.video.encode import encode_h264
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.metrics import average_precisions
from polyvit_fast.train.output.cost_report import estimate_cost
from polyvit_fast.train.schedule import make_step_plan

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "benchmarks" / "schedules"
NAMES = list(conditions.load_experiment().tasks)
FULL = conditions.FORMS["full"]


def specs(stage, seed=1):
    return {spec.condition.name: spec for spec in conditions.list_runs(FULL, stage, NAMES, {}) if spec.seed == seed}


def config_of(spec):
    return conditions.build_config(spec, FULL, "cpu")


def test_the_full_form_has_every_condition_with_five_seeds_and_a_sweep():
    table = list(conditions.list_runs(FULL, "table", NAMES, {}))
    assert len(table) == 5 * (len(conditions.SCHEDULES) + 1 + len(NAMES))
    assert {spec.seed for spec in table} == {1, 2, 3, 4, 5}
    swept = list(conditions.list_runs(FULL, "sweep", NAMES, {}))
    assert {spec.seed for spec in swept} == {0}
    assert {spec.condition.name for spec in swept} == {*specs("table"), *specs("knobs")}
    assert len({spec.name for spec in table}) == len(table)


def test_all_schedules_cost_the_same_and_train_as_many_minibatches():
    costs = {name: estimate_cost(config_of(spec)) for name, spec in specs("table").items() if not name.endswith("alone")}
    flops = {name: cost.training_flops for name, cost in costs.items()}
    assert max(flops.values()) < 1.001 * min(flops.values())
    assert {sum(row.num_steps for row in cost.tasks) for cost in costs.values()} == {3200}


def test_models_of_one_task_together_have_the_minibatches_of_the_weighted_run():
    alone = {name: config_of(specs("table")[f"{name} alone"]) for name in NAMES}
    together = config_of(specs("table")["weighted"])
    assert {name: len(make_step_plan(config)) for name, config in alone.items()} == {n: t.steps for n, t in together.tasks.items()}


def test_the_trunk_starts_from_the_same_weights_in_all_conditions_of_a_seed():
    chosen = ["weighted", "accumulating", "voices alone", conditions.OWN_COSINES]
    models = [PolyViT.from_config(config_of(specs("table")[name])) for name in chosen]
    for model in models[1:]:
        for (name, ours), theirs in zip(models[0].blocks.named_parameters(), model.blocks.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    other = PolyViT.from_config(config_of(specs("table", seed=2)["weighted"]))
    assert not torch.equal(models[0].blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_warm_up_is_the_same_fraction_of_every_plan():
    for name, spec in specs("table").items():
        config = config_of(spec)
        if name == conditions.OWN_COSINES:
            fractions = [task.warmup_steps / task.steps for task in config.tasks.values()]
        else:
            fractions = [config.optim.warmup_steps / sum(task.steps for task in config.tasks.values())]
        assert fractions == pytest.approx([200 / 3200] * len(fractions), rel=0.05)


def test_missing_datasets_leave_the_others_to_be_compared():
    left = ["digits", "voices"]
    names = {spec.condition.name: spec.condition.tasks for spec in conditions.list_runs(FULL, "table", left, {})}
    assert names["weighted"] == ("digits", "voices")
    assert {name for name in names if name.endswith("alone")} == {"digits alone", "voices alone"}
    trunks = {spec.condition.name for spec in conditions.list_runs(FULL, "transfer", left, {})}
    assert trunks == {"images alone", "sounds alone"}


def test_an_assignment_comes_back_from_its_file(tmp_path):
    for stage in conditions.STAGES:
        for spec in list(conditions.list_runs(FULL, stage, NAMES, {}))[::7]:
            todo = Assignment(spec, "full", "cpu", tmp_path / "a.jsonl", tmp_path / "run", False)
            (tmp_path / "todo.json").write_text(todo.to_json())
            assert Assignment.read(tmp_path / "todo.json") == todo


# Intervals


def right(values, metric=None):
    values = list(map(int, values))
    return {"right": "".join(map(str, values)), "metric": np.mean(values) if metric is None else metric}


def test_a_plain_difference_has_an_interval_around_it_and_noise_has_one_with_zero():
    rng = np.random.default_rng(0)
    ours = [right(rng.random(400) < 0.8) for _ in range(5)]
    theirs = [right(rng.random(400) < 0.6) for _ in range(5)]
    clear = intervals.compare("task", ours, theirs)
    low, high = clear.interval
    assert clear.is_clear
    assert low < clear.value < high
    assert clear.value == pytest.approx(0.2, abs=0.03)
    # Two proportions of 400 files, which all five seeds have in common only in part: about 1.3 points of standard error.
    assert 0.03 < high - low < 0.12
    assert not intervals.compare("task", ours, [right(rng.random(400) < 0.8) for _ in range(5)]).is_clear
    same = intervals.compare("task", ours, ours)
    assert (same.value, *same.interval) == (0.0, 0.0, 0.0)


def test_a_difference_of_one_seed_alone_is_not_clear():
    """Four seeds are equal and one differs much: draws without it have no difference."""
    base = [right([1] * 50 + [0] * 50) for _ in range(5)]
    other = [*base[:4], right([1] * 100)]
    assert not intervals.compare("task", other, base).is_clear


def test_average_precision_of_draws_is_that_of_the_drawn_files():
    import base64

    rng = np.random.default_rng(1)
    labels = rng.random((40, 3)) < 0.4
    logits = rng.normal(size=(40, 3)).astype(np.float16)
    packed = base64.b64encode(logits.tobytes()).decode()
    line = {"logits": packed, "labels": ["".join(map(str, map(int, row))) for row in labels], "metric": 0.0}
    files = rng.multinomial(40, np.full(40, 1 / 40), 20)
    measured = intervals.measure_draws(line, files)
    for counts, value in zip(files, measured, strict=True):
        index = np.repeat(np.arange(40), counts)
        # Copies of a file have equal logits, which have one precision in one definition and not in the other.
        jitter = torch.from_numpy(logits[index].astype(np.float64))
        expected = average_precisions(jitter, torch.from_numpy(labels[index].astype(np.float32))).mean()
        assert value == pytest.approx(float(expected), abs=1e-5)


# Tables


def write_run(folder, condition, seed, metrics, rate=1e-3, stage="table", val=None, **first):
    rng = np.random.default_rng([seed, len(condition)])
    steps = dict.fromkeys(metrics, 40)
    run = {"kind": "run", "condition": condition, "stage": stage, "seed": seed, "rate": rate, "steps": steps, "minibatches": steps}
    run |= {"parameters": 100, "flops": 2e12, "seconds": 60.0, "updates": sum(steps.values()), "form": "full"}
    run |= {"data": dict.fromkeys(metrics, "0123456789abcdef")} | first
    lines = [run, {"kind": "val", "step": 80, "metrics": val or metrics}]
    lines += [{"kind": "test", "task": task, **right(rng.random(300) < value)} for task, value in metrics.items()]
    path = folder / stage / f"{condition}-{rate}-{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def compared(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, "weighted", seed, {"a": 0.9, "b": 0.5})
        write_run(tmp_path, "uniform", seed, {"a": 0.6, "b": 0.5})
        write_run(tmp_path, "a alone", seed, {"a": 0.9})
        write_run(tmp_path, "b alone", seed, {"b": 0.9})
    for rate, value in ((1e-3, 0.4), (2e-3, 0.7), (4e-3, 0.7)):
        write_run(tmp_path, "weighted", 0, {"a": value, "b": value}, rate, stage="sweep")
    stages = {stage: results_module.read_runs(tmp_path / stage) for stage in conditions.STAGES}
    return tables.StageResults(**stages)


def test_the_sweep_chooses_the_best_rate_and_of_equal_ones_the_lowest(compared):
    assert results_module.choose_rates(compared.sweep) == {"weighted": 2e-3}
    assert "0.002: **70.0**" in tables.describe_rates(compared)


def test_tables_have_a_line_for_each_condition_and_the_sum_of_models_of_one_task(compared):
    main = tables.describe_main(compared).splitlines()
    assert main[0] == "| test | a | b | mean |"
    assert [line.split("|")[1].strip() for line in main[2:]] == ["uniform", "weighted", tables.SINGLE]
    cost = tables.describe_cost(compared)
    assert f"| {tables.SINGLE} | 200 | 80 | 80 | 4.000 | 2.0 |" in cost


def test_differences_are_bold_where_the_interval_leaves_out_zero(compared):
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in tables.describe_differences(compared).splitlines()[2:]}
    assert rows["uniform"][0].strip().startswith("**-")
    assert not rows["uniform"][1].strip().startswith("**")
    assert rows[tables.SINGLE][1].strip().startswith("**+")
    assert "weighted" not in rows


def test_a_condition_without_some_task_is_left_out(compared):
    compared.table[:] = [run for run in compared.table if run.condition != "b alone"]
    assert tables.SINGLE not in compared.list_conditions()
    assert tables.SINGLE not in tables.describe_main(compared)


def test_tables_are_inserted_between_their_comments_and_nowhere_else():
    text = "before\n<!-- table main -->\nold\n<!-- end -->\nbetween\n<!-- table cost -->\n<!-- end -->\nafter\n"
    done = tables.insert_tables(text, {"main": "| new |\n", "unknown": "| no |\n"})
    assert done == text.replace("old\n", "| new |\n")
    assert tables.insert_tables(done, {"main": "| new |\n"}) == done


def test_the_document_has_the_tables_of_the_committed_results():
    folder = ROOT / "benchmarks" / "results" / "schedules" / "full"
    committed = tables.StageResults(**{stage: results_module.read_runs(folder / stage) for stage in conditions.STAGES})
    assert committed.sweep
    document = (ROOT / "docs" / "schedules.md").read_text()
    assert tables.insert_tables(document, tables.build_tables(committed)) == document


def test_phases_of_task_by_task_are_those_of_its_plan(tmp_path):
    spec = specs("table")["task-by-task"]
    config = config_of(spec)
    minibatches = {name: task.steps for name, task in config.tasks.items()}
    write_run(tmp_path, "task-by-task", 1, dict.fromkeys(NAMES, 0.5), minibatches=minibatches)
    (run,) = results_module.read_runs(tmp_path / "table")
    plan = make_step_plan(config)
    phases = tables.list_phases(run)
    assert [plan[end - 1] for _, end in phases] == [(name,) for name, _ in phases]
    assert phases[-1][1] == len(plan)
    assert all(end % conditions.EVALUATE_EVERY["task-by-task"] == 0 for _, end in phases)


# The command


def command(*arguments, cwd):
    return subprocess.run([sys.executable, str(FOLDER), *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_command_says_what_is_missing(tmp_path):
    done = command("run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "there is no schedules-data/ here: python -m polyvit_fast.experiments.schedules_data makes it\n"
    done = command("report", "--results", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no results" in done.stderr
    done = command("draw", cwd=tmp_path)
    assert done.returncode == 2
    assert "run | report" in done.stderr


def test_no_table_is_made_with_rates_that_were_not_compared(tmp_path):
    (tmp_path / "schedules-data" / "digits").mkdir(parents=True)
    (tmp_path / "schedules-data" / "digits" / "train.csv").write_text("path,labels\n")
    done = command("run", "--form", "full", "--stages", "table", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("stage table: the sweep lacks ")
    assert not (tmp_path / "schedules-runs").exists()


def test_runs_that_have_results_are_not_run_again_and_failures_are_named(tmp_path, capsys):
    runner = RunPool("tiny", "cpu", tmp_path / "results", tmp_path / "work", workers=2)
    done, failing = list(conditions.list_runs(conditions.FORMS["tiny"], "table", NAMES, {}))[:2]
    runner.find_results(done).parent.mkdir(parents=True)
    runner.find_results(done).write_text("{}\n")
    assert runner.run_all([done, failing], "title") == [failing]  # there is no data here
    error = capsys.readouterr().err
    assert f"{failing.name} failed: " in error
    assert "schedules-data" in error
    assert runner.find_results(done).read_text() == "{}\n"


def write_dataset(folder, name, classes, suffix, make, split_sizes=(24, 12, 12)):
    """A dataset as `schedules_data` writes it, with one label a file, or two of several."""
    (folder / name).mkdir(parents=True)
    for split, size in zip(("train", "val", "test"), split_sizes, strict=True):
        (folder / name / split).mkdir()
        lines = ["path,labels"]
        for index in range(size):
            labels = [classes[index % len(classes)]] + ([classes[(index + 1) % len(classes)]] if name == "voices" else [])
            (folder / name / split / f"{index:02d}{suffix}").write_bytes(make(index % len(classes), index))
            lines.append(f"{split}/{index:02d}{suffix},{' '.join(labels)}")
        (folder / name / f"{split}.csv").write_text("\n".join(lines) + "\n")
    (folder / name / "classes.txt").write_text("\n".join(classes) + "\n")
    record = {"version": 1, "counts": {}, "digest": f"digest of {name}", "left_out": {}}
    (folder / name / "dataset.json").write_text(json.dumps(record))


def picture(label, index):
    from PIL import Image

    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 60, (64, 64, 3)) + 15 * label
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def clip(label, index):
    pixels = np.random.default_rng(index).integers(0, 200, (64, 64 + 8 * 7, 3)).astype(np.uint8)
    return encode_h264(np.stack([pixels[:, time * label : time * label + 64] for time in range(8)]), 15)


def sound(label, index):
    file = io.BytesIO()
    time = np.arange(8000) / 8000
    wave_form = 0.5 * np.sin(2 * np.pi * (200 + 150 * label) * time) + 0.1 * np.random.default_rng(index).normal(size=8000)
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(8000)
        wav.writeframes((wave_form.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


@pytest.mark.long
def test_the_whole_comparison_in_small_and_a_run_of_it_again_to_the_bit(tmp_path):
    data = tmp_path / "schedules-data"
    write_dataset(data, "digits", list("0123456789"), ".png", picture)
    write_dataset(data, "camera", ["left", "right", "up", "down", "in", "out", "still"], ".mp4", clip)
    write_dataset(data, "voices", ["be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru"], ".wav", sound)
    write_dataset(data, "drums", ["kick", "snare", "hihat", "tom", "cymbal", "hand"], ".wav", sound, (36, 6, 12))
    done = command("run", "--form", "tiny", "--stages", "table", "transfer", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "schedules-results" / "tiny"
    found = results_module.read_runs(folder / "table")
    assert len(found) == len(conditions.SCHEDULES) + 1 + 3
    for run in found:
        assert set(run.test) == set(run.run["steps"])
        assert run.run["data"] == {name: f"digest of {name}" for name in run.run["steps"]}
    weighted = next(run for run in found if run.condition == "weighted")
    assert {line["trunk"] for line in weighted.probes} == {"weighted", "random"}
    assert {line["trunk"] for run in results_module.read_runs(folder / "transfer") for line in run.probes} == {
        "images alone",
        "videos alone",
        "sounds alone",
    }
    shown = command("report", "--results", str(folder), cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert tables.SINGLE in shown.stdout
    for name in ("differences.png", "forgetting.png"):
        assert (folder / name).stat().st_size > 10_000
    again = weighted.run["name"]
    first = (folder / "table" / f"{again}.jsonl").read_text().splitlines()
    (folder / "table" / f"{again}.jsonl").unlink()
    shutil.rmtree(tmp_path / "schedules-runs" / "tiny" / "table" / again)
    assert command("run", "--form", "tiny", cwd=tmp_path).returncode == 0
    second = (folder / "table" / f"{again}.jsonl").read_text().splitlines()
    without_time = [{**json.loads(lines[0]), "seconds": 0} for lines in (first, second)]
    assert without_time[0] == without_time[1]
    assert first[1:] == second[1:]
