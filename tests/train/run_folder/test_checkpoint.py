import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from polyvit_fast.train.run_folder import checkpoint
from polyvit_fast.train.run_folder.checkpoint import CheckpointError, find_newest, iterate, read, save
from polyvit_fast.train.run_folder.earlier_versions import SCHEMA, LaterVersionError, stamp

# Runs in a process of its own, so that forking is safe: saves again and again, each time in a child that is killed one call later. What the
# children leave behind is read back after each kill; the findings go to stdout.
KILLER = """
import builtins, json, os, resource, shutil, signal, sys
from pathlib import Path
import torch
from polyvit_fast.train.run_folder import checkpoint

left = None  # calls until the kill

def fuse():
    global left
    if left is not None:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def fused(function):
    def call(*args, **kwargs):
        fuse()
        return function(*args, **kwargs)
    return call

class Halves:
    "A file whose every write reaches the disk in two halves, between which the process may die."
    def __init__(self, path, mode):
        self.file = builtins.open(path, mode, buffering=0) if "b" in mode and "r" not in mode else builtins.open(path, mode)
    def __enter__(self):
        return self
    def __exit__(self, *info):
        self.file.close()
    def __getattr__(self, name):
        return getattr(self.file, name)
    def write(self, data):
        fuse()
        written = self.file.write(data[: len(data) // 2])
        fuse()
        return written + self.file.write(data[len(data) // 2 :])

def save(folder, step, value, keep=1):
    groups = {name: {"w": torch.full((300, 7), value), "b": torch.tensor([value])} for name in ("model", "optimizer")}
    return checkpoint.save(folder, step, groups, {"value": value}, {"kind": "toy"}, keep=keep)

def look(folder):
    found = checkpoint.find_newest(folder, report=lambda text: None)
    if found is None:
        return None
    value = found.state["value"]
    whole = all((t == value).all() for name in ("model", "optimizer") for t in found.load_tensors(name).values())
    return [found.step, value, bool(whole)]

def in_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(action() or 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def sweep(before, step, value):
    global left
    findings = []
    for calls in range(1, 1000):
        folder = root / "run"
        shutil.rmtree(folder, ignore_errors=True)
        for old in before:
            save(folder, *old)
        def killed():
            global left
            for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir"):
                setattr(os, name, fused(getattr(os, name)))
            checkpoint.open = Halves
            left = calls
            save(folder, step, value)
        code = in_child(killed)
        found = look(folder)
        after = in_child(lambda: save(folder, 99, 99.0) and None)
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        findings.append({"code": code, "found": found, "after": [after, look(folder), names]})
        if code != -signal.SIGKILL:
            return findings

def too_large():
    folder = root / "limited"
    save(folder, 1, 1.0, keep=2)
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        big = {"model": {"w": torch.ones(100_000)}}
        try:
            checkpoint.save(folder, 2, big, {}, {}, keep=1)
        except checkpoint.CheckpointError as error:
            (root / "message").write_text(str(error))
            return 3
    return {"code": in_child(limited), "message": (root / "message").read_text(), "found": look(folder),
            "names": sorted(path.name for path in (folder / "checkpoints").iterdir())}

root = Path(sys.argv[1])
print(json.dumps({
    "first": sweep([], 5, 5.0),
    "next": sweep([(5, 5.0)], 10, 10.0),
    "same step": sweep([(5, 5.0)], 5, 5.5),
    "too large": too_large(),
}))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    command = [sys.executable, "-c", KILLER, str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("scenario", "old", "new"),
    [("first", None, [5, 5.0, True]), ("next", [5, 5.0, True], [10, 10.0, True]), ("same step", [5, 5.0, True], [5, 5.5, True])],
)
def test_a_kill_at_any_call_of_a_save_loses_nothing_that_was_saved(killed, scenario, old, new):
    findings = killed[scenario]
    print(f"{scenario}: killed at {len(findings) - 1} calls")
    assert len(findings) > 30  # five files of several writes and an fsync each, the folders, the renames
    assert [finding["code"] for finding in findings] == [-9] * (len(findings) - 1) + [0]
    found = [finding["found"] for finding in findings]
    first_new = found.index(new)
    assert first_new > 20
    assert found == [old] * first_new + [new] * (len(found) - first_new)
    for finding in findings:  # the next save goes well and clears what the kill left
        assert finding["after"] == [0, [99, 99.0, True], ["step_00000099"]]


def test_a_write_that_the_system_cuts_short_keeps_the_older_checkpoint(killed):
    found = killed["too large"]
    assert found["code"] == 3
    assert "step 2 was not saved" in found["message"]
    assert "File too large" in found["message"]
    assert found["found"] == [1, 1.0, True]
    assert found["names"] == ["step_00000001"]


def toy_save(folder: Path, step: int, keep: int = 2, **more) -> Path:
    groups = {
        "model": {"w": torch.full((5, 3), float(step)), "b": torch.arange(4)},
        "optimizer": {"m": torch.full((2,), step / 7)},
    }
    return save(folder, step, groups, {"counters": {"a": step}, "best": 0.1}, {"seed": 3}, keep=keep, **more)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def full_disk(tmp_path, options: str) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    return folder


@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=8m", "not enough free disk space"), ("size=64m,nr_inodes=14", "No space left on device")],
    ids=["no bytes left", "no inodes left"],
)
def test_a_full_disk_is_reported_and_harms_nothing(tmp_path, options, reason):
    folder = full_disk(tmp_path, options)
    groups = {"model": {"w": torch.randn(750_000)}}
    try:
        save(folder, 1, groups, {}, {}, keep=1)
        save(folder, 2, groups, {}, {}, keep=2)
        with pytest.raises(CheckpointError) as caught:
            save(folder, 3, groups, {}, {}, keep=2)
        reported = str(caught.value)
        assert reason in reported
        assert "step 3 was not saved" in reported
        assert "it needs 4.0 MB" in reported
        assert steps(folder) == ["step_00000001", "step_00000002"]
        found = find_newest(folder)
        assert found
        assert torch.equal(found.load_tensors("model")["w"], groups["model"]["w"])
        shutil.rmtree(folder / "checkpoints" / "step_00000001")
        assert save(folder, 3, groups, {}, {}, keep=2).name == "step_00000003"
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_every_file_is_synced_before_the_rename_and_the_manifest_is_last(tmp_path, monkeypatch):
    toy_save(tmp_path, 1)
    calls: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")).name)), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda old, new: (calls.append(("rename", Path(new).name)), rename(old, new))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (calls.append(("delete", Path(path).name)), rmtree(path, **how))[1])
    toy_save(tmp_path, 2, keep=1)
    others = [call for call in calls if call != ("delete", calls[5][1])]
    files = ["state.json", "config.json", "model.safetensors", "optimizer.safetensors"]
    assert [name for kind, name in others[:4] if kind == "sync"] == files
    assert others[4] == ("sync", "MANIFEST.json")
    assert others[5][0] == "sync"
    assert others[5][1].startswith(".tmp-step_00000002-")
    assert others[6:9] == [("rename", "step_00000002"), ("sync", "checkpoints"), ("sync", tmp_path.name)]
    assert [kind for kind, _ in others[9:]] == ["rename", "delete"]  # the older one goes after all that
    assert others[9][1].startswith(".tmp-removed-")


def test_what_is_saved_comes_back(tmp_path):
    state = {"counters": {"motion": 7}, "best": 1 / 3, "worst": float("-inf"), "seconds": [0.1, 2]}
    tensors = {"model": {"w": torch.randn(3, 4)}, "optimizer": {"w.m": torch.randn(12)}, "ema": {"w": torch.randn(3, 4)}}
    path = save(tmp_path, 1234, tensors, state, {"seed": 3, "tasks": {}}, keep=1)
    assert path == tmp_path / "checkpoints" / "step_00001234"
    found = find_newest(tmp_path)
    assert found
    assert (found.step, found.config, found.path) == (1234, {**stamp(), "seed": 3, "tasks": {}}, path)
    assert found.state == {**stamp(), **state, "step": 1234, "worst": None}  # JSON has no infinity
    assert found.names == ("model", "optimizer", "ema")
    for name, group in tensors.items():
        loaded = found.load_tensors(name)
        assert loaded.keys() == group.keys()
        assert all(torch.equal(loaded[key], group[key]) for key in group)
    with pytest.raises(CheckpointError, match="holds no tensors named 'head'; it has model, optimizer, ema"):
        found.load_tensors("head")


def test_tensor_files_are_the_bytes_that_the_safetensors_library_writes(tmp_path):
    views = {"transposed": torch.randn(4, 6).T, "sliced": torch.randn(9, 9)[::2, 1:5], "expanded": torch.randn(3, 1).expand(3, 5)}
    tensors = views | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "long": torch.randn((1 << 18) + 3)}
    tensors |= {"parameter": torch.nn.Parameter(torch.randn(4)), "counts": torch.arange(9)}
    path = save(tmp_path, 1, {"model": tensors}, {}, {}, keep=1) / "model.safetensors"
    assert path.read_bytes() == safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", checkpoint.DTYPES, ids=str)
def test_every_dtype_is_read_by_the_safetensors_library(tmp_path, dtype):
    tensors = {"odd": (torch.randn(5, 3) * 10).to(dtype), "wide": torch.randn(3, dtype=torch.float64), "narrow": torch.rand(11) > 0.5}
    path = save(tmp_path, 1, {"model": tensors}, {}, {}, keep=1) / "model.safetensors"
    for name, tensor in safetensors.torch.load_file(path).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_a_tensor_that_cannot_be_stored_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"phase: a tensor of torch\.complex64 cannot be stored"):
        save(tmp_path, 1, {"model": {"phase": torch.zeros(2, dtype=torch.complex64)}}, {}, {}, keep=1)
    assert steps(tmp_path) == []
    with pytest.raises(ValueError, match="keep = 0 must be at least 1"):
        toy_save(tmp_path, 1, keep=0)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path):
    path.write_bytes(path.read_bytes() + b" ")


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def empty(path: Path):
    path.write_bytes(b"")


def swap(path: Path):
    other = path.with_name("config.json" if path.name != "config.json" else "model.safetensors")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def take_from_the_previous(path: Path):
    previous = path.parent.with_name("step_00000001") / path.name
    path.write_bytes(previous.read_bytes())


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "MANIFEST.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [truncate, lengthen, flip_a_bit, Path.unlink, empty, swap, take_from_the_previous], ids=lambda f: f.__name__
)
def test_any_damage_is_found_and_the_previous_checkpoint_used(tmp_path, name, damage):
    toy_save(tmp_path, 1)
    damaged = toy_save(tmp_path, 2)
    before = {file: (damaged / file).read_bytes() for file in FILES}
    damage(damaged / name)
    same = {file: (damaged / file).read_bytes() for file in FILES if (damaged / file).exists()} == before
    reported: list[str] = []
    found = find_newest(tmp_path, reported.append)
    assert found
    if same:  # both steps have the same configuration, so that its file is no other
        assert (name, damage) == ("config.json", take_from_the_previous)
        assert found.step == 2
    elif (name, damage) == ("MANIFEST.json", lengthen):  # a blank at the end of JSON means nothing
        assert found.step == 2
    else:
        assert found.step == 1
        assert (found.load_tensors("model")["w"] == 1).all()
        assert len(reported) == 1
        assert "step_00000002" in reported[0]
        assert name in reported[0] or damage is swap


def test_no_flipped_bit_of_a_manifest_passes(tmp_path):
    toy_save(tmp_path, 1)
    path = toy_save(tmp_path, 2)
    content = (path / "MANIFEST.json").read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (path / "MANIFEST.json").write_bytes(flipped)
        with pytest.raises(CheckpointError, match="step_00000002"):
            read(path)


def test_the_reason_is_logged_with_the_file(tmp_path, capsys):
    flip_a_bit(toy_save(tmp_path, 4) / "optimizer.safetensors")
    assert find_newest(tmp_path) is None
    assert f"{tmp_path}/checkpoints/step_00000004/optimizer.safetensors: the content differs from its SHA-256" in capsys.readouterr().err
    (tmp_path / "checkpoints/step_00000004/state.json").unlink()
    assert find_newest(tmp_path) is None
    assert "step_00000004/state.json is missing" in capsys.readouterr().err


def forge(path: Path, name: str) -> None:
    """Make the manifest vouch for a file as it is now."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    content = (path / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("pack", [pickle.dumps, "zip"], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_and_not_run(tmp_path, pack, forged):
    canary = tmp_path / "canary"
    toy_save(tmp_path, 1)
    path = toy_save(tmp_path, 2)
    if pack == "zip":
        torch.save(Bomb(canary), path / "model.safetensors")
    else:
        (path / "model.safetensors").write_bytes(pack(Bomb(canary)))
    if forged:
        forge(path, "model.safetensors")
    reported: list[str] = []
    found = find_newest(tmp_path, reported.append)
    assert found
    assert found.step == 1
    assert "model.safetensors" in reported[0]
    assert ("is not a safetensors file" in reported[0]) == forged
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))  # the bomb was real
    assert canary.exists()


def test_files_that_the_manifest_does_not_name_and_names_outside_are_refused(tmp_path):
    toy_save(tmp_path, 1)
    path = toy_save(tmp_path, 2)
    shutil.copy(path / "model.safetensors", path / "extra.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors named 'extra'"):
        read(path).load_tensors("extra")
    outside = path.parent / "outside.json"
    outside.write_text("{}")
    forge(path, "../outside.json")
    with pytest.raises(CheckpointError, match="and no other folder"):
        read(path)


def test_other_formats_and_renamed_folders_are_refused(tmp_path):
    path = toy_save(tmp_path, 1)
    path.rename(path.with_name("step_00000007"))
    with pytest.raises(CheckpointError, match="of format 1, step 1; expected 1, 7"):
        read(path.with_name("step_00000007"))
    path = toy_save(tmp_path, 2)
    manifest = path / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(CheckpointError, match="of format 0, step 2; expected 1, 2"):
        read(path)
    assert find_newest(tmp_path) is None
    assert find_newest(tmp_path / "nowhere") is None


def test_what_a_later_version_saved_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    toy_save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "stamp", lambda: {"schema": SCHEMA + 1, "version": "0.99.0"})
    path = toy_save(tmp_path, 2, keep=9)
    with pytest.raises(LaterVersionError, match=r"step_00000002 was written by polyvit-fast 0\.99\.0, .*; upgrade: pip install"):
        find_newest(tmp_path)
    manifest = path / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(LaterVersionError, match="step_00000002 was written by a later version of polyvit-fast; upgrade: pip install"):
        find_newest(tmp_path)


def test_the_newest_and_the_best_stay(tmp_path):
    for step in range(10, 70, 10):
        toy_save(tmp_path, step, best_step=20 if step >= 20 else None)
    assert steps(tmp_path) == ["step_00000020", "step_00000050", "step_00000060"]
    assert [found.step for found in iterate(tmp_path)] == [60, 50, 20]
    toy_save(tmp_path, 70, keep=1, best_step=70)
    assert steps(tmp_path) == ["step_00000070"]


def test_a_broken_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path):
    toy_save(tmp_path, 1)
    truncate(toy_save(tmp_path, 2) / "model.safetensors")
    toy_save(tmp_path, 3)
    assert steps(tmp_path) == ["step_00000001", "step_00000003"]


def test_later_steps_of_a_run_that_was_set_back_do_not_push_out_the_new_one(tmp_path):
    toy_save(tmp_path, 5)
    flip_a_bit(toy_save(tmp_path, 9) / "model.safetensors")
    toy_save(tmp_path, 7, keep=1)
    reported: list[str] = []
    found = find_newest(tmp_path, reported.append)
    assert found
    assert found.step == 7
    assert "step_00000009" in reported[0]
    toy_save(tmp_path, 9, keep=1)
    assert steps(tmp_path) == ["step_00000009"]
    assert find_newest(tmp_path, reported.append)
    assert len(reported) == 1


SAVER = """
import sys
from itertools import count
from pathlib import Path
import torch
from polyvit_fast.train.run_folder import checkpoint

for step in count(1):
    checkpoint.save(Path(sys.argv[1]), step, {"model": {"w": torch.full((1000,), float(step))}}, {}, {}, keep=1)
    if step == 1:
        print("saved", flush=True)
"""


def test_a_reader_finds_a_whole_checkpoint_beside_a_run_that_saves_and_deletes(tmp_path):
    with subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            seen = [1]
            while seen[-1] < 20:
                found = find_newest(tmp_path, pytest.fail)
                assert found
                seen.append(found.step)
        finally:
            process.kill()
    assert seen == sorted(seen)


def test_tensors_of_a_checkpoint_that_was_deleted_since_are_reported(tmp_path):
    toy_save(tmp_path, 1, keep=1)
    old = find_newest(tmp_path)
    toy_save(tmp_path, 2, keep=1)
    assert old
    with pytest.raises(CheckpointError, match="step_00000001 is gone: the run that goes on there has deleted it"):
        old.load_tensors("model")


def test_steps_are_numbers_not_words(tmp_path):
    for step in (999, 1000, 99_999_999, 100_000_000):
        toy_save(tmp_path, step, keep=4)
    assert [found.step for found in iterate(tmp_path)] == [100_000_000, 99_999_999, 1000, 999]
    for name in ("step_notes", "step_12x", ".tmp-step_00000005-abc"):
        (tmp_path / "checkpoints" / name).mkdir()
    found = find_newest(tmp_path, pytest.fail)
    assert found
    assert found.step == 100_000_000
    assert (tmp_path / "checkpoints" / ".tmp-step_00000005-abc").exists()  # a reader leaves a writer's folder alone
    toy_save(tmp_path, 100_000_001, keep=1)
    assert steps(tmp_path) == ["step_100000001", "step_12x", "step_notes"]
