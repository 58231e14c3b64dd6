"""What a user sees of a wrong input: one sentence with the field and what is allowed, in a file its line too, and exit code 2."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from polyvit_fast import cli

PREFIX = {
    "image": "tasks.species.modality.",
    "video": "tasks.clips.modality.",
    "audio": "tasks.calls.modality.",
    "train": "tasks.species.train.",
    "task": "tasks.species.",
    "model": "model.",
    "optim": "optim.",
    "data": "",
    "compute": "",
    "log": "",
    "config": "",
}
"""How the fields of each record of the file are called on a command line."""
RECORDS = {
    "image": ("Image", {"size": "32"}),
    "video": ("Video", {"frames": "4"}),
    "audio": ("Audio", {"clip_seconds": "8"}),
    "train": ("Folder", {"path": '"photos/train"'}),
    "task": ("Task", {"modality": "image", "train": "train", "val": 'Folder(path="photos/val")', "num_classes": "3", "steps": "30"}),
    "model": ("Model", {"dim": "32", "depth": "1", "num_heads": "2", "mlp_dim": "64"}),
    "optim": ("Optim", {}),
    "data": ("DataOptions", {}),
    "compute": ("ComputeOptions", {}),
    "log": ("LogOptions", {}),
}
HEAD = '''"""Our wildlife cameras."""

from pathlib import Path

from polyvit_fast.config import MODELS, ComputeOptions, DataOptions, LogOptions, Model, Optim, Task, Train
from polyvit_fast.data import Audio, DemoFiles, Folder, Image, Manifest, Shards, Synthetic, Video

'''
FURTHER = """
clips = Task(modality=video, train=train, val=train, num_classes=3, steps=30)
calls = Task(modality=audio, train=train, val=train, num_classes=3, steps=30)
"""


def write_experiment(record: str = "", field: str = "", code: str = "") -> tuple[str, int]:
    """A file with `field=code` in one of its records, and the line of that: every field has a line of its own."""
    lines, found = HEAD.splitlines(), 0
    everything = {"tasks": '{"species": task, "clips": clips, "calls": calls}'}
    everything |= {name: name for name in ("model", "optim", "data", "compute", "log")}
    for name, (kind, values) in (*RECORDS.items(), ("config", ("Train", everything))):
        lines += FURTHER.splitlines() if name == "model" else []
        lines.append(f"{name} = {kind}(")
        for key, value in (values | ({field: code} if name == record else {})).items():
            lines.append(f"    {key}={value},")
            found = len(lines) if (name, key) == (record, field) else found
        lines.append(")")
    return "\n".join(lines) + "\n", found


@dataclass(frozen=True)
class Case:
    """A wrong value of one field."""

    record: str
    field: str
    code: str
    """In the file."""
    reason: str
    """Some of what is said about it."""
    flag: str | None = None
    """The value on the command line; None: the command line has no such mistake."""
    flag_reason: str = ""
    """What is said there, if it is not the same."""
    held_in: str = ""
    """Of the line that is named, where a record that holds this one finds the mistake."""

    @property
    def name(self) -> str:
        return f"{self.record}.{self.field}={self.code}"

    def command(self) -> list[str]:
        return [f"--{PREFIX[self.record]}{self.field}".replace("_", "-"), *(self.flag or "").split()]


CASES = [
    # Of the issue.
    Case("task", "steps", "3e1", "steps = 30.0 must be a whole number: write 30", "3e1", "INT"),
    Case("task", "steps", '"30"', 'steps = "30" is text: write 30', "thirty", "INT"),
    Case("task", "mixup", "True", "mixup = True must be a number", "True", "FLOAT"),
    Case("task", "multi_label", "1", "multi_label = 1 must be True or False: write True", "1", "multi_label = True needs loss = sigmoid"),
    Case("optim", "name", '"adam"', 'name = "adam" must be "sgd" or "adamw"; perhaps you meant "adamw"', "adam", "adamw"),
    Case("config", "precision", '"fp16"', 'precision = "fp16" must be ', "fp16", "bf16"),
    Case(
        "image", "crop", '"random_resized"', 'crop = "random_resized" must be "inception" or "resize_crop"', "random_resized", "inception"
    ),
    Case("config", "device", '"gpu"', 'device = "gpu" must be ', "gpu", "cuda"),
    Case("config", "seed", '"hello"', 'seed = "hello" is text, and must be a whole number', "hello", "INT"),
    Case("task", "num_classes", "3.0", "num_classes = 3.0 must be a whole number: write 3", "3.0", "INT"),
    Case("task", "train", '"photos/train"', 'train = "photos/train" must be a Source: write Folder(path="photos/train")'),
    Case("task", "modality", "Image", "modality = <class Image>: write Image(), with brackets"),
    # Types.
    Case("task", "steps", "30.5", "steps = 30.5 must be a whole number", "30.5", "INT"),
    Case("task", "steps", "None", "steps = None must be a whole number", "None", "INT"),
    Case("task", "steps", "[30]", "steps = [30] must be a whole number"),
    Case("task", "steps", "(30, (1, (2, (3,))))", "steps = (30, (1, (2, (...)))) must be a whole number"),
    Case("task", "batch", "True", "batch = True must be a whole number", "True", "INT"),
    Case("task", "steps", 'float("nan")', "steps = nan must be a whole number", "nan", "INT"),
    Case("task", "lr_scale", '"0.1"', 'lr_scale = "0.1" is text: write 0.1', "high", "FLOAT"),
    Case("task", "lr_scale", 'float("inf")', "lr_scale = inf must be a finite number", "inf"),
    Case("optim", "lr", 'float("nan")', "lr = nan must be a finite number", "nan"),
    Case("optim", "betas", "0.9", "betas = 0.9 must be a tuple of 2 numbers", "0.9", "betas"),
    Case("optim", "betas", "(0.9,)", "betas = (0.9,) must be a tuple of 2 numbers, and not 1", "0.9", "betas"),
    Case("optim", "betas", '(0.9, "0.95")', 'betas[1] = "0.95" is text: write 0.95', "0.9 high", "betas"),
    Case("optim", "freeze", '"blocks.*"', 'freeze = "blocks.*" must be a tuple of texts: write ("blocks.*",)'),
    Case("image", "mean", "127.5", "mean = 127.5 must be a tuple of 3 numbers", "127.5", "mean"),
    Case("image", "std", "{127.5}", "std = {127.5} must be a tuple of 3 numbers"),
    Case("image", "flip", '"no"', 'flip = "no" must be True or False', "no", "Unrecognized"),
    Case("image", "flip", "None", "flip = None must be True or False"),
    Case("config", "resume", "0", "resume = 0 must be True or False: write False", "0", "Unrecognized"),
    Case("config", "out", "3", 'out = 3 must be text: write "3"'),
    Case("config", "out", '"a\\0b"', "holds a NUL character"),
    Case("config", "tasks", "[task]", 'tasks = [Task(…)] must be a dict such as {"name": Task(…)}'),
    Case("config", "tasks", "task", 'tasks = Task(…) must be a dict such as {"name": Task(…)}'),
    Case("config", "tasks", '{"a": image}', 'tasks["a"] = Image(…) must be a Task: write Task(…)'),
    Case("config", "tasks", "{1: task}", "tasks has the key 1, which must be text"),
    Case("config", "tasks", "{}", "tasks is empty: a run needs at least one"),
    Case("config", "tasks", '{"a b": task}', "task name 'a b' may hold letters, digits, - and _ only"),
    Case("config", "model", '"S"', 'model = "S" must be a Model: write MODELS["S"]'),
    Case("config", "model", "MODELS", "must be a Model: write Model(…)"),
    Case("config", "optim", '"adamw"', 'optim = "adamw" must be an Optim: write Optim(…)'),
    Case("config", "optim", "Optim", "optim = <class Optim>: write Optim(), with brackets"),
    Case("config", "data", "train", "data = Folder(…) must be a DataOptions: write DataOptions(…)"),
    Case("config", "schedule", "3", "schedule = 3 must be text or a function"),
    Case("config", "init", '{"trunk": 3}', 'init = {"trunk": 3} must be text or a dict such as {"name": "text"}'),
    Case("task", "modality", '"image"', 'modality = "image" must be a Modality: write Image(), Video() or Audio(), of polyvit_fast.data'),
    Case("task", "modality", "train", "modality = Folder(…) must be a Modality: write Image(), Video() or Audio()"),
    Case("task", "val", "None", "val = None must be a Source: write Folder(path=…), Manifest(path=…) or Shards(paths=(…,))"),
    Case("task", "val", 'Path("val.csv")', 'must be a Source: write Manifest(path="val.csv")'),
    Case("task", "test", '"test.tar"', 'test = "test.tar" must be a Source: write Shards(paths=("test.tar",))'),
    Case("train", "path", "3", 'path = 3 must be text: write "3"'),
    Case("train", "path", '["a", "b"]', 'path = ["a", "b"] must be text'),
    Case("train", "path", '""', "path is empty: name the folder with the class folders"),
    # Words.
    Case("task", "loss", '"sofmax"', 'loss = "sofmax" must be "softmax" or "sigmoid"; perhaps you meant "softmax"', "sofmax", "softmax"),
    Case("task", "loss", '["softmax"]', 'loss = ["softmax"] must be "softmax" or "sigmoid"'),
    Case("task", "lr_schedule", '"cos"', 'lr_schedule = "cos" must be "run", "cosine" or "constant"', "cos", "cosine"),
    Case("optim", "name", "Optim", 'name = <class Optim> must be "sgd" or "adamw"'),
    Case("optim", "name", '"AdamW"', 'perhaps you meant "adamw"', "AdamW", "adamw"),
    Case("image", "pool", '"max"', 'pool = "max" must be "cls", "class_tokens" or "mean"', "max", "class_tokens"),
    Case("video", "eval_crops", "2", "eval_crops = 2 must be 1 or 3", "2", "eval-crops"),
    Case("video", "eval_crops", "3.0", "eval_crops = 3.0 must be 1 or 3: write 3", "3.0", "eval-crops"),
    Case("audio", "spectrogram", '"mel"', 'spectrogram = "mel" must be "kaldi" or "mbt"', "mel", "kaldi"),
    Case("data", "decoding", '"dali"', 'decoding = "dali" must be "auto", "cpu" or "gpu"', "dali", "auto"),
    Case("compute", "residual", '"fp16"', 'residual = "fp16" must be "fp32" or "bf16"; perhaps you meant "bf16"', "fp16", "bf16"),
    # Ranges.
    Case("task", "steps", "0", "steps = 0 must be at least 1", "0"),
    Case("task", "steps", "10**9", "steps = 1000000000 must be at most 100,000,000", "1000000000"),
    Case(
        "task", "steps", "99_999_990", "tasks have 100,000,050 steps together: a run has at most 100,000,000", "99999990", held_in="tasks="
    ),
    Case("task", "steps", "10**5000", "steps = <int> must be at most 100,000,000"),
    Case("task", "batch", "-1", "batch = -1 must be at least 1", "-1"),
    Case("task", "batch", "2**40", "batch = 1099511627776 must be at most 1,048,576", str(2**40)),
    Case("task", "micro_batches", "3", "batch = 64 does not divide into micro_batches = 3", "3"),
    Case("task", "num_classes", "10**8", "num_classes = 100000000 must be at most 10,000,000", str(10**8)),
    Case("task", "label_smoothing", "1.0", "label_smoothing = 1.0 must be in [0, 1)", "1.0"),
    Case("task", "warmup_steps", "5", "warmup_steps = 5 of a task needs lr_schedule cosine or constant", "5"),
    Case("task", "loss_weight", "0", "loss_weight = 0.0 must be positive", "0"),
    Case("task", "multi_label", "True", "multi_label = True needs loss = sigmoid"),
    Case("image", "size", "33", "modality image: rows = 33 does not divide by the tubelet's 16", "33", held_in="modality=image"),
    Case("image", "size", "0", "size = 0 must be at least 1", "0"),
    Case("image", "size", "2**20", "has more than 2,147,483,647 numbers", str(2**20), held_in="modality=image"),
    Case("image", "patch", "-16", "patch = -16 must be at least 1", "-16"),
    Case("image", "crop_ratio", "0", "crop_ratio = 0.0 must be in (0, 1]", "0"),
    Case("image", "crop_ratio", "87.5", "crop_ratio = 87.5 must be in (0, 1]", "87.5"),
    Case("image", "num_class_tokens", "5", "num_class_tokens = 5 must be 0, 1 or 2", "5", held_in="modality=image"),
    Case("image", "std", "(1, 0, 1)", "std[1] = 0.0 must be positive", "1 0 1"),
    Case("video", "frames", "6", "modality video: frames = 6 does not divide by the tubelet's 4", "6", held_in="modality=video"),
    Case("video", "stride", "0", "stride = 0 must be at least 1", "0"),
    Case("video", "short_side", "100", "short_side = 100 must be at least size = 224", "100"),
    Case("video", "scale_jitter", "(1.2, 0.8)", "scale_jitter = (1.2, 0.8) must be two positive numbers, the smaller first", "1.2 0.8"),
    Case("video", "eval_clips", "0", "eval_clips = 0 must be at least 1", "0"),
    Case("audio", "clip_seconds", "0.001", "clip_seconds = 0.001 must be a whole number of hundredths", "0.001"),
    Case("audio", "num_mel_bins", "-128", "num_mel_bins = -128 must be at least 1", "-128"),
    Case("audio", "sample_rate_hz", "44", "sample_rate_hz = 44 must be a multiple of 100", "44"),
    Case("model", "dim", "33", "dim = 33 does not divide by num_heads = 2", "33"),
    Case("model", "depth", "0", "depth = 0 must be at least 1", "0"),
    Case("model", "dim", "10**9", "dim = 1000000000 must be at most 65,536", str(10**9)),
    Case("model", "norm_eps", "-1e-6", "norm_eps = -1e-06 must be in (0, 1]", "-1e-6"),
    Case("model", "dropout", "1.5", "dropout = 1.5 must be in [0, 1)", "1.5"),
    Case("optim", "lr", "0", "lr = 0.0 must be positive", "0"),
    Case("optim", "eps", "-1e-8", "eps = -1e-08 must be positive", "-1e-8"),
    Case("optim", "momentum", "1.0", "momentum = 1.0 must be in [0, 1)", "1.0"),
    Case("optim", "betas", "(0.9, 1)", "betas[1] = 1.0 must be in [0, 1)", "0.9 1"),
    Case("optim", "weight_decay", "-0.1", "weight_decay = -0.1 must not be negative", "-0.1"),
    Case("optim", "layer_decay", "0", "layer_decay = 0.0 must be in (0, 1]", "0"),
    Case("data", "max_bad_ratio", "5", "max_bad_ratio = 5.0 must be in [0, 1]", "5"),
    Case("data", "prefetch", "0", "prefetch = 0 must be at least 1", "0"),
    Case("data", "decode_timeout_seconds", "-1", "decode_timeout_seconds = -1.0 must be positive", "-1"),
    Case("compute", "compute_threads", "-2", "compute_threads = -2 must not be negative", "-2"),
    Case("compute", "nonfinite_patience", "0", "nonfinite_patience = 0 must be at least 1", "0"),
    Case("log", "keep", "0", "keep = 0 must be at least 1", "0"),
    Case("log", "eval_every_steps", "-5", "eval_every_steps = -5 must not be negative", "-5"),
    Case("log", "early_stop_evaluations", "3", "early_stop_evaluations = 3 needs evaluations during the run: set eval_every_steps", "3"),
    Case("config", "seed", "2**64", "seed = 18446744073709551616 must be at most 9,223,372,036,854,775,807", str(2**64)),
    Case("config", "init", '"tail=x"', "init names the part 'tail'; there are trunk", "tail=x"),
    # Names of fields.
    Case("task", "batchsize", "3", "Task has no field batchsize; perhaps you meant batch", "3", "Unrecognized"),
    Case("config", "num_threads", "4", "Train has no field num_threads; it is one of DataOptions: write data=DataOptions(num_threads=…)"),
    Case("optim", "learning_rate", "1", "Optim has no field learning_rate", "1", "Unrecognized"),
]
WHOLE = write_experiment()[0]
FILES = {
    "syntax": ("config = Train(\n    tasks={\n", "line 2: '{' was never closed"),
    "indentation": ("x = 1\n  y = 2\n", "line 2: unexpected indent"),
    "import": ("import polyvit_fast\nimport wild_helper\n", "line 2: ModuleNotFoundError: No module named 'wild_helper'"),
    "import of a name": ("from polyvit_fast.data import Picture\n", "line 1: ImportError: cannot import name 'Picture'"),
    "exit": ("import sys\nsys.exit(3)\n", "line 2: the file ends the program (SystemExit: 3), and must only define config"),
    "key": ("sizes = {}\nsizes['small']\n", "line 2: KeyError: 'small'"),
    "assertion": ("assert False\n", "line 1: AssertionError"),
    "recursion": ("def again():\n    return again()\n\nagain()\n", "line 2: RecursionError"),
    "name": (WHOLE.replace("Folder(\n", "Foldr(\n"), "NameError: name 'Foldr' is not defined"),
    "several lines": ("raise RuntimeError('a\\nb')\n", "line 1: RuntimeError: a b"),
    "empty": ("", "it must define `config = Train(...)`, a polyvit_fast.config.Train, and has none"),
    "other name": (WHOLE.replace("config = Train", "settings = Train"), "and has none; rename settings to config"),
    "dict": ("config = {'tasks': {}}\n", "and not a dict"),
    "class": ("from polyvit_fast.config import Train\nconfig = Train\n", "and not the class Train: write Train(...), with brackets"),
    "function": ("def config():\n    return 3\n", "and not a function: call it, config = config()"),
    "tuple": (f"{WHOLE.rstrip()},\n", "and not a tuple: remove the comma after its last bracket"),
    "None": ("config = None\n", "and not a NoneType"),
    "missing field": (WHOLE.replace('    val=Folder(path="photos/val"),\n', ""), "line 20: Task lacks val"),
    "missing fields": (
        WHOLE.replace("    steps=30,\n    num_classes=3,\n", "").replace("    num_classes=3,\n    steps=30,\n", ""),
        "Task lacks",
    ),
    "without names": (WHOLE.replace('path="photos/train"', '"photos/train"'), "Folder takes its values by name: write Folder(path=…, …)"),
    "abstract": (
        WHOLE.replace("modality=image", "modality=__import__('polyvit_fast').config.Modality()"),
        "Modality stands for several classes",
    ),
    "in a function": (
        f"{HEAD}def make(n):\n    return Task(\n        modality=Image(), num_classes=3,\n        train=3, val=3, steps=n)\n\nmake(3)\n",
        "line 11: train = 3 must be a Source",
    ),
    "nested call": (
        HEAD + "import dataclasses\n\noptim = dataclasses.replace(\n    Optim(),\n    lr=-1,\n)\n",
        "line 12: lr = -1.0 must be positive",
    ),
}
BYTES = {
    "latin": ("# caf\xe9\nconfig = 3\n".encode("latin-1"), "it is no text in UTF-8"),
    "utf-16": ("config = 3\n".encode("utf-16-le"), "it holds NUL characters, as UTF-16 does; save it as UTF-8"),
    "utf-16 with its mark": ("config = 3\n".encode("utf-16"), "it is no text in UTF-8"),
    "unknown encoding": (b"# coding: klingon\nconfig = 3\n", "unknown encoding: klingon"),
    "a picture": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "it is no text in UTF-8"),
}


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch, unchecked_types):
    """What the hook of the tests on types would refuse has to come as far as our own check."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")


def run(capsys, *arguments: str) -> str:
    """What a command prints on standard error, on one line. It ends with 2 and prints no traceback."""
    try:
        code = cli.run(list(arguments))
    except SystemExit as end:
        code = end.code
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert (code, "Traceback" in printed) == (2, False), printed
    return printed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_value_in_the_file(case, capsys):
    text, line = write_experiment(case.record, case.field, case.code)
    Path("wildlife.py").write_text(text)
    printed = run(capsys, "plan", "wildlife.py")
    if case.held_in:
        line = next(number for number, code in enumerate(text.splitlines(), 1) if case.held_in in code)
    assert f"experiment file wildlife.py, line {line}: " in printed
    assert case.reason in printed


@pytest.mark.parametrize("case", [case for case in CASES if case.flag is not None], ids=lambda case: case.name)
def test_the_same_value_on_the_command_line(case, capsys):
    Path("wildlife.py").write_text(WHOLE)
    printed = run(capsys, "plan", "wildlife.py", *case.command())
    assert (case.flag_reason or case.reason) in printed


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file(name, capsys):
    content, reason = FILES[name]
    Path("wildlife.py").write_text(content)
    assert reason in run(capsys, "plan", "wildlife.py")


@pytest.mark.parametrize("name", BYTES)
def test_a_file_that_is_no_text(name, capsys):
    content, reason = BYTES[name]
    Path("wildlife.py").write_bytes(content)
    printed = run(capsys, "plan", "wildlife.py")
    assert "experiment file wildlife.py" in printed
    assert reason in printed


def test_an_error_in_a_neighbour_names_its_file_and_line(capsys):
    Path("wildlife.py").write_text("import helper\n")
    Path("helper.py").write_text("\nfrom polyvit_fast.config import Optim\n\noptim = Optim(\n    lr=1,\n    name='adam',\n)\n")
    printed = run(capsys, "train", "wildlife.py")
    assert f'experiment file wildlife.py: {os.getcwd()}/helper.py, line 6: name = "adam" must be' in printed
    Path("helper.py").write_text("x = (\n")
    assert f"{os.getcwd()}/helper.py, line 1: '(' was never closed" in run(capsys, "train", "wildlife.py")


def test_what_is_no_experiment(capsys, tmp_path):
    Path("wildlife.py").write_text(WHOLE)
    Path("folder.py").mkdir()
    Path("notes.txt").touch()
    Path("runs").mkdir()
    Path("runs/only.py").write_text(WHOLE)
    run_folder = Path("runs/demo")
    run_folder.mkdir(parents=True)
    (run_folder / "config.json").write_text("{}")
    (run_folder / "command.txt").write_text("polyvit-fast train demo\npolyvit-fast train demo --keep 3\n")
    for name, reason in {
        "wildlife": "experiment 'wildlife' is unknown; perhaps you meant wildlife.py",
        "wildlive.py": f"experiment file {tmp_path}/wildlive.py does not exist; perhaps you meant wildlife.py",
        "dmo": "perhaps you meant demo",
        "demo.py": f"experiment file {tmp_path}/demo.py does not exist; perhaps you meant demo",
        "nowhere/x.py": f"experiment file {tmp_path}/nowhere/x.py does not exist",
        "folder.py": f"experiment {tmp_path}/folder.py is a folder; give the path of a .py file",
        ".": f"experiment {tmp_path} is a folder; give the path of a .py file",
        "runs": f"experiment {tmp_path}/runs is a folder; give the path of a .py file; perhaps you meant runs/only.py",
        "notes.txt": f"experiment {tmp_path}/notes.txt is no file that ends in .py",
        "runs/demo": f"{tmp_path}/runs/demo is a run folder, not an experiment: evaluate it with polyvit-fast eval runs/demo, or resume it "
        "with the command that began it: polyvit-fast train demo --keep 3",
        "/dev/null": "is no regular file",
        "qqq": "there are: ast_b16_audioset, demo",
    }.items():
        assert reason in run(capsys, "train", name)
