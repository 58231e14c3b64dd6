import subprocess
import sys
from pathlib import Path

import measure_tree

TREE = {
    "polyvit_fast/__init__.py": "",
    "polyvit_fast/first.py": "def half(x):\n    # lazy imports count\n    from polyvit_fast.data import second\n    return second\n",
    "polyvit_fast/data/__init__.py": "",
    "polyvit_fast/data/second.py": "import polyvit_fast.first\n\n\nclass Twice: ...\n",
    "polyvit_fast/data/third.py": "import polyvit_fast.data.second\n\n\nclass Twice: ...\n",
    "kernels/polyvit_kernels/__init__.py": "",
    "kernels/polyvit_kernels/norm.py": "import triton\n\n\n@triton.jit\ndef norm_kernel(x):\n    b_x = x  # [BLOCK_D]\n    return b_x\n",
}


def make_tree(root: Path) -> Path:
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def test_cycles_of_lazy_imports_between_siblings_are_found(tmp_path):
    code = "import sys, measure_tree, pathlib; print(measure_tree.find_cycles(measure_tree.build_graph(pathlib.Path(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(make_tree(tmp_path))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
    assert sorted(shown.split("'")[1::2]) == ["polyvit_fast.data", "polyvit_fast.first"]
    assert shown.count("{") == 1


def test_classes_of_one_name_comments_and_floors_are_counted(tmp_path):
    files = measure_tree.read_files(make_tree(tmp_path), "polyvit_fast", "kernels")
    assert measure_tree.find_repeated_classes(files) == {"Twice": ["polyvit_fast/data/second.py", "polyvit_fast/data/third.py"]}
    kernels = [file for file in files if file.holds_kernels()]
    assert [file.name for file in kernels] == ["kernels/polyvit_kernels/norm.py"]
    assert measure_tree.comment_ratio(kernels) == 100 / 7
    floors = measure_tree.count_on_floors(TREE)
    assert floors == {"kernels/polyvit_kernels": (1, 0), "polyvit_fast": (1, 1), "polyvit_fast/data": (2, 0)}


def test_the_command_prints_the_measurements_of_this_checkout(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure_tree.py"])
    measure_tree.main()
    shown = capsys.readouterr().out
    lines = dict(line.rsplit("  ", 1) for line in shown.splitlines()[:3])
    assert all(int(value) >= 0 for value in lines.values())
    assert "polyvit_fast/data" in shown
