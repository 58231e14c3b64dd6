import re
import time
from pathlib import Path

import pytest
import torch
from processes import run_together

from polyvit_fast.train.distributed.process_group import PeerLost, World, process_group

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_a_process_is_alone():
    with process_group("cpu") as world:
        assert world == World(0, 1, 0)
        number = torch.tensor(3.0)
        world.all_reduce_sum_(number)
        assert number == 3
        assert (world.all_reduce_max(7), world.gather("x"), world.broadcast("y")) == (7, ["x"], "y")
        with world.rank0_first():
            pass
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("changes", [{"RANK": None}, {"LOCAL_RANK": None}, {"WORLD_SIZE": "two"}], ids=str)
def test_half_an_environment_is_refused(monkeypatch, changes):
    for name, value in (ENVIRONMENT | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=r"torchrun sets RANK, WORLD_SIZE, LOCAL_RANK to numbers, but here is only .*=1"),
        process_group("cpu"),
    ):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"finds 1 GPUs here, none for process 1 .* --nproc-per-node"), process_group("cuda"):
        pass


def talk(world: World, folder: Path) -> dict[str, object]:
    """Every way to talk, in one call."""
    said: dict[str, object] = {"ranks": (world.rank, world.size, world.local_rank)}
    said["largest"] = [world.all_reduce_max(status) for status in (world.rank, -world.rank, 15 if world.rank == 1 else 0)]
    said["gathered"] = world.gather({"rank": world.rank, "part": torch.full((world.rank,), 1.5)})
    said["first"] = world.broadcast(f"from {world.rank}")
    number = torch.tensor([1.0, float(world.rank)])
    world.all_reduce_sum_(number)
    said["sum"] = number.tolist()
    with world.rank0_first():
        if world.rank == 0:
            time.sleep(0.2)
            (folder / "made").touch()
        said["found"] = (folder / "made").exists()
    try:
        with world.rank0_first():
            said["entered"] = True
            if world.rank == 0:
                raise OSError("the disk is full")
    except (OSError, PeerLost) as error:
        said["error"] = f"{type(error).__name__}: {error}"
    world.all_reduce_max(0)
    if world.rank == world.size - 1:
        return said  # and is gone
    try:
        world.all_reduce_max(0)
    except PeerLost as error:
        said["lost"] = str(error)
    return said


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_talk(tmp_path, size):
    said = run_together(size, talk, tmp_path)
    assert [one["ranks"] for one in said] == [(rank, size, rank) for rank in range(size)]
    assert all(one["largest"] == [size - 1, 0, 15] for one in said)
    assert [part["rank"] for part in said[0]["gathered"]] == list(range(size))
    assert [part["part"].tolist() for part in said[0]["gathered"]] == [[1.5] * rank for rank in range(size)]
    assert all(one["gathered"] == [] for one in said[1:])
    assert all(one["first"] == "from 0" for one in said)
    assert all(one["sum"] == [size, size * (size - 1) / 2] for one in said)
    assert all(one["found"] for one in said)
    assert [one.get("entered", False) for one in said] == [True] + [False] * (size - 1)
    assert said[0]["error"] == "OSError: the disk is full"
    assert all(one["error"] == "PeerLost: process 0 of the run failed; its own output says why" for one in said[1:])
    assert all(re.match("another process of the run ended or cannot be reached", one["lost"]) for one in said[:-1])


def fail_alone(world: World) -> str:
    if world.rank:
        raise ValueError("only here")
    with pytest.raises(PeerLost):
        world.all_reduce_max(0)
    return "noticed"


def test_an_error_of_one_process_reaches_the_others_at_once():
    started = time.monotonic()
    with pytest.raises(AssertionError, match="only here"):
        run_together(2, fail_alone)
    assert time.monotonic() - started < 30
