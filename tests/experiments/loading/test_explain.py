import pytest

from polyvit_fast.experiments.loading.run_file import run_file

pytestmark = pytest.mark.usefixtures("unchecked_types")
HEAD = "from dataclasses import dataclass, replace\nfrom polyvit_fast.config import *\nfrom polyvit_fast.data import *\n"  # three lines
TASK = "modality=Image(size=32), train=Synthetic(), val=Synthetic(), num_classes=2, "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim = Optim(\n  lr=1,\n  name='adam')", ", line 6: name = "),
        ("é = 'é'; optim = Optim(name='sgd', lr=0,\n  eps=1)", ", line 4: lr = 0.0 must be positive"),
        ("model = Model(\n  num_heads=7,\n  depth=3)", ", line 5: dim = 768 does not divide by num_heads = 7"),
        ("settings = {'lr': -1}\noptim = Optim(**settings)", ", line 5: lr = -1.0 must be positive"),
        ("def make(lr):\n  return Optim(\n    lr=lr)\nmake(\n  -1)", ", line 6: lr = -1.0 must be positive"),
        ("optim = replace(\n  Optim(),\n  lr=-1)", ", line 6: lr = -1.0 must be positive"),
        ("optim = [Optim(lr=1), Optim(\n  lr=lr) if True else 0] if (lr := -1) else 0", ", line 5: lr = -1.0"),
        (
            f"config = Train(\n  device='cpu',\n  tasks={{'a': Task({TASK}steps=3)}},\n  data=DataOptions(\n    decoding='gpu'))",
            ", line 8: --decoding gpu needs --device cuda",
        ),
        (f"task = Task({TASK}\n  step=3)", ", line 5: Task has no field step; perhaps you meant steps"),
        (f"task = Task({TASK}\n  x=1,\n  steps=3)", ", line 5: Task has no field x; it has modality, train, val, num_classes, steps"),
        ("optim = replace(Optim(),\n  learn=3)", ", line 5: Optim has no field learn"),
        ("train = Train(\n  keep=3)", ", line 5: Train has no field keep; it is one of LogOptions: write log=LogOptions(keep=…)"),
        ("task = Task()", ", line 4: Task lacks modality and train and val and num_classes and steps"),
        ("folder = Folder('a')", ", line 4: Folder takes its values by name: write Folder(path=…, …)"),
        ("source = Source()", ", line 4: Source stands for several classes: write Folder(path=…)"),
        ("class Mine(Source):\n  pass\nMine()", ", line 6: TypeError: Can't instantiate abstract class Mine"),
        ("def f(a): pass\nf(b=1)", ", line 5: TypeError: f() got an unexpected keyword argument 'b'"),
        ("class A:\n  def __init__(self): pass\nA(\n  b=1)", ", line 7: TypeError: A.__init__() got an unexpected keyword argument"),
        (
            "@dataclass(frozen=True, kw_only=True)\nclass M(Image):\n  def __post_init__(self):\n    raise ValueError('no')\nM()",
            ", line 7: ValueError: no",
        ),
        ("x = int('a')", ", line 4: ValueError: invalid literal for int()"),
        ("raise SystemExit", ", line 4: the file ends the program (SystemExit), and must only define config"),
        ("exit()", ", line 4: the file ends the program"),
        ("open('nowhere')", ", line 4: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere'"),
        ("x = (", ", line 4: '(' was never closed"),
        ("eval('1 +')", ": <string>, line 1: invalid syntax"),
    ],
)
def test_the_line_and_what_is_wrong_there(text, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{HEAD}{text}\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared
        run_file(path)
    assert str(caught.value).startswith(f"experiment file {path}{said}")
    assert "\n" not in str(caught.value)
