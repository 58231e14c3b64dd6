import gc
import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_together
from tiny_runs import tile_task, tiny_config

from polyvit_fast.config import Model, Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train.distributed import reducer as reduce
from polyvit_fast.train.distributed.process_group import World
from polyvit_fast.train.distributed.reducer import Reducer
from polyvit_fast.train.feed import Inputs
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.optim import FlatParameters, Optimizer
from polyvit_fast.train.step import Step, TaskCounters

BATCH = 8
SMALL_BUCKET = 1 << 13  # of the tiny model's 80 KB of gradients


def config():
    return tiny_config(
        tasks={"a": tile_task(), "b": tile_task(num_classes=4, loss="sigmoid")}, optim=Optim(name="sgd", lr=0.1, clip_norm=0.5)
    )


def batch(task: str, number: int):
    generator = torch.Generator().manual_seed(number)
    grid = torch.randn(BATCH, 1, 16, 16, 3, generator=generator)
    return grid, torch.randint(3, (BATCH,), generator=generator)


def backward(model, task: str, number: int, world: World, of: int, part: int) -> None:
    """Of micro-batch `part` of `of` of this process's examples; the sum over all is the gradient of the whole batch's mean loss."""
    grid, labels = (whole.chunk(world.size)[world.rank].chunk(of)[part] for whole in batch(task, number))
    loss = LOSSES[config().tasks[task].loss](model(grid, task), labels, 0.0)
    (loss / (world.size * of * 2)).backward()


def gather_gradient(model, reducer, world, step: int) -> None:
    """A step of both tasks, of which the second comes in two micro-batches: only the last backward is overlapped."""
    backward(model, "a", step, world, 1, 0)
    backward(model, "b", step, world, 2, 0)
    used = [name for name, _ in model.named_parameters() if name != "heads.a.weight" and name != "heads.a.bias"]
    with reducer.overlap(used):
        backward(model, "b", step, world, 2, 1)


class Recorder:
    """Puts on record, in order, what is launched and when a backward pass ends."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.launch, self.backward = dist.all_reduce, torch.Tensor.backward

    def __enter__(self):
        dist.all_reduce, torch.Tensor.backward = self._launch, lambda loss: self._backward(loss)
        return self

    def __exit__(self, *error):
        dist.all_reduce, torch.Tensor.backward = self.launch, self.backward

    def _launch(self, tensor, *arguments, **options):
        self.events.append(f"{len(tensor)} elements")
        return self.launch(tensor, *arguments, **options)

    def _backward(self, loss):
        self.backward(loss)
        self.events.append("end")


@contextmanager
def small_buckets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "BUCKET_BYTES", SMALL_BUCKET)
        yield


def reduced(world: World) -> dict[str, dict[str, object]]:
    """All that is to be looked at, of both precisions, in one call."""
    with small_buckets():
        return {precision: reduced_in(world, precision) for precision in ("fp32", "bf16")}


def reduced_in(world: World, precision: str) -> dict[str, object]:
    model = PolyViT.from_config(config())
    parameters = FlatParameters(model)
    reducer = Reducer(parameters, precision)
    for task, of, part in (("a", 1, 0), ("b", 2, 0), ("b", 2, 1)):
        backward(model, task, 0, world, of, part)  # outside of the context the hooks sleep
    own = parameters.grads.clone()
    parameters.zero_grads()
    with Recorder() as recorder:
        gather_gradient(model, reducer, world, 0)
    found = {"own": own, "sum": parameters.grads.clone(), "events": recorder.events}
    optimizer, done = Optimizer(parameters, config().optim), []
    for step in range(4):
        if step:
            gather_gradient(model, reducer, world, step)
        if step == 2:
            parameters.found_inf.add_(torch.nan if world.rank == world.size - 1 else 0.0)
            with reducer.overlap([]):
                pass
        done.append(bool(optimizer.update(torch.tensor(0.1))[1]))
    return found | {"weights": parameters.values, "done": done}


def of_one_process() -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the first step, and the weights after four, of which the third is skipped."""
    model = PolyViT.from_config(config())
    parameters = FlatParameters(model)
    optimizer, gradient = Optimizer(parameters, config().optim), None
    for step in range(4):
        for task in ("a", "b"):
            backward(model, task, step, World(), 1, 0)
        gradient = parameters.grads.clone() if gradient is None else gradient
        parameters.found_inf.fill_(torch.nan if step == 2 else 0.0)
        optimizer.update(torch.tensor(0.1))
    return gradient, parameters.values


CLIP_NORM = 0.2  # of gradients whose norms are 0.3 to 0.6, halved by the backward pass above
POISONS = {"nan": torch.nan, "inf": torch.inf, "overflow": 1e30}  # the last one is finite, but its square is not


def clipped(world: World) -> dict[str, object]:
    """By `own_clip_norm`, in both precisions, and with something not finite in the gradient of the last process."""
    found: dict[str, object] = {}
    for precision in ("fp32", "bf16"):
        parameters = FlatParameters(model := PolyViT.from_config(config()))
        with small_buckets():
            reducer = Reducer(parameters, precision, CLIP_NORM / world.size)
        for task, of, part in (("a", 1, 0), ("b", 2, 0), ("b", 2, 1)):
            backward(model, task, 0, world, of, part)
        own = parameters.grads.clone()
        parameters.zero_grads()
        with Recorder() as recorder:
            gather_gradient(model, reducer, world, 0)
        found[precision] = {"own": own, "sum": parameters.grads.clone(), "events": recorder.events}
        for name, poison in POISONS.items():
            parameters.zero_grads()
            parameters.grads[7] = poison if world.rank == world.size - 1 else 1.0
            with reducer.overlap([]):
                pass
            found[f"{precision} {name}"] = float(parameters.compute_grad_norm())
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_each_process_clips_its_own_gradient_before_the_mean(size):
    found = run_together(size, clipped)
    for precision, rounding in (("fp32", 2.0**-22), ("bf16", 2.0**-7)):
        own = torch.stack([one[precision]["own"].double() for one in found]) * size  # each process's mean, not yet averaged over all
        norms = own.norm(dim=1, keepdim=True)
        assert (norms > CLIP_NORM).all()
        assert norms.max() > 1.05 * norms.min()  # else it would not matter who clips
        expected = (own * CLIP_NORM / norms).mean(0)
        after = own.mean(0) * CLIP_NORM / own.mean(0).norm()
        for one in found:
            assert torch.equal(one[precision]["sum"], found[0][precision]["sum"])
            assert (one[precision]["sum"] - expected).norm() < rounding * expected.norm()
            assert (one[precision]["sum"] - after).norm() > 0.01 * expected.norm()
            assert [math.isfinite(one[f"{precision} {name}"]) for name in POISONS] == [False] * len(POISONS)
            last = max(number for number, event in enumerate(one[precision]["events"]) if event == "end")
            assert last == one[precision]["events"].count("end") - 1  # no bucket leaves before all are there


def one_update(world: World, clip: str) -> tuple[dict[str, torch.Tensor], TaskCounters]:
    """Of both tasks, whose second one mixes its batch with the reversed one."""
    tasks = {"a": tile_task(), "b": tile_task(mixup=1.0, mixup_pairs="reversed", micro_batches=2)}
    run = tiny_config(tasks=tasks, optim=Optim(name="sgd", clip_norm=CLIP_NORM, clip=clip))
    step = Step(PolyViT.from_config(run), run, world)
    step.begin(("a", "b"), 1.0, 0)
    for task in ("a", "b"):
        grid, labels = (whole.chunk(world.size)[world.rank] for whole in batch(task, 0))
        step.forward_backward(task, Inputs(grid, labels, torch.tensor(0.7)), last=task == "b")
    step.update()
    return step.parameters.state_dict(), step.read_counters().wait()["b"]


def mean_gradient(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Of one process's examples of both batches, in plain PyTorch."""
    model = PolyViT.from_config(tiny_config(tasks={"a": tile_task(), "b": tile_task()}))
    grid, labels = (whole.chunk(size)[rank] for whole in batch("a", 0))
    loss = torch.nn.functional.cross_entropy(model(grid, "a"), labels)
    logits = model(0.7 * grid + 0.3 * grid.flip(0), "b")
    loss += 0.7 * torch.nn.functional.cross_entropy(logits, labels) + 0.3 * torch.nn.functional.cross_entropy(logits, labels.flip(0))
    (loss / 2).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def total_norm(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in gradient.values()]).norm()


def scaled(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    norm = total_norm(gradient)
    assert norm > CLIP_NORM
    return {name: tensor * CLIP_NORM / norm for name, tensor in gradient.items()}


@pytest.mark.parametrize("clip", ["mean", "process"])
def test_a_step_clips_before_or_after_the_mean_over_processes(clip):
    found, own = run_together(2, one_update, clip), [mean_gradient(rank, 2) for rank in range(2)]
    if clip == "process":
        first, second = map(scaled, own)
        expected = {name: (first[name] + second[name]) / 2 for name in first}
        norm = sum(map(total_norm, own)) / 2
    else:
        mean = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
        expected, norm = scaled(mean), total_norm(mean)
    start = dict(PolyViT.from_config(tiny_config(tasks={"a": tile_task(), "b": tile_task()})).named_parameters())
    for weights, counters in found:
        for name, gradient in expected.items():
            torch.testing.assert_close(start[name].detach() - weights[name], gradient, rtol=1e-3, atol=2e-6)
        assert counters.grad_norm == pytest.approx(float(norm), rel=1e-4)  # what is logged is that before clipping
        assert (counters.updates, counters.clipped) == (1, 1.0)


@cache
def of_processes(size: int) -> list[dict[str, dict[str, object]]]:
    return run_together(size, reduced)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_processes_together_are_one(size, precision):
    found = [one[precision] for one in of_processes(size)]
    gradient, weights = of_one_process()
    first = found[0]
    assert all(torch.equal(one["sum"], first["sum"]) and torch.equal(one["weights"], first["weights"]) for one in found)
    assert all(one["events"] == first["events"] and one["done"] == [True, True, False, True] for one in found)
    own = torch.stack([one["own"].double() for one in found])
    # The reducer's own error: one rounding to bf16 before the first sum, and each of the sums along the way is rounded.
    rounding = 2.0**-8 if precision == "bf16" else 2.0**-24
    assert ((first["sum"] - own.sum(0)).abs() <= own.abs().sum(0) * (size + 1) * rounding).all()
    # The gradient of a divided batch is rounded differently from that of the whole, inside the model, where a bound on one element would
    # depend on what cancels. Of the whole gradient it is 3e-7.
    assert (own.sum(0) - gradient).norm() < 1e-5 * gradient.norm()
    assert ((first["sum"] - gradient).norm() > 1e-4 * gradient.norm()) == (precision == "bf16")
    torch.testing.assert_close(first["weights"], weights, rtol=0, atol=2e-3 if precision == "bf16" else 1e-5)


def test_buckets_leave_while_the_backward_pass_computes():
    events = of_processes(2)[0]["fp32"]["events"]
    assert events.count("end") == 3
    begin = [i for i, event in enumerate(events) if event == "end"][1]  # of the micro-batch before the last
    before, after = (len(list(group)) for end, group in itertools.groupby(events[begin + 1 :], lambda event: event == "end") if not end)
    assert before > 3 * after
    assert after == 1  # the rest, with found_inf


class Sent(dist.Work):
    """A transport to nowhere that notes what it is given."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        monkeypatch.setattr(dist, "all_reduce", self.send)

    def send(self, tensor, async_op):
        assert async_op
        self.tensors.append(tensor)
        return self

    def wait(self):
        pass


@pytest.mark.parametrize("bucket_bytes", [1, SMALL_BUCKET, 25 << 20])
def test_buckets_hold_every_gradient_once_and_found_inf_last(monkeypatch, bucket_bytes):
    monkeypatch.setattr(reduce, "BUCKET_BYTES", bucket_bytes)
    sent = Sent(monkeypatch)
    parameters = FlatParameters(PolyViT.from_config(config()))
    with Reducer(parameters, "fp32").overlap([]):
        pass
    parameters.grads.copy_(torch.arange(len(parameters.grads)))
    *matrices, rest = sent.tensors
    assert torch.equal(torch.cat([*reversed(matrices), rest]), parameters.grads)
    assert rest[0] == parameters.decayed
    assert parameters.found_inf in rest
    assert all(tensor.nbytes >= bucket_bytes for tensor in matrices[:-1])
    assert len(matrices) == {1: 11, SMALL_BUCKET: 7, 25 << 20: 1}[bucket_bytes]  # of 11 weight matrices


def test_a_gradient_that_comes_too_late_is_an_error(monkeypatch):
    Sent(monkeypatch)
    model = PolyViT.from_config(config())
    parameters = FlatParameters(model)
    reducer = Reducer(parameters, "fp32")
    with pytest.raises(RuntimeError, match=r"has a gradient that its bucket left without"), reducer.overlap([]):
        backward(model, "a", 0, World(), 1, 0)
    with reducer.overlap(name for name in parameters.leaves if not name.startswith("heads.b")):  # and is forgotten
        backward(model, "a", 0, World(), 1, 0)


@pytest.fixture
def nccl():
    """A transport of one process, in which a sum changes nothing."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    yield
    # NCCL waits for the graphs that use it, which a failed test's traceback would keep.
    for name in ("last_traceback", "last_value", "last_exc", "last_type"):
        vars(sys).pop(name, None)
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_records_the_reduction_inside_the_backward_pass(nccl, monkeypatch, precision):
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 1 << 17)
    model = PolyViT.from_config(replace(config(), model=Model(dim=128, depth=2, num_heads=2, mlp_dim=512))).cuda()
    parameters = FlatParameters(model)
    reducer = Reducer(parameters, precision)
    grid, labels = (tensor.cuda() for tensor in batch("a", 0))
    used = [name for name in parameters.leaves if not name.startswith("heads.b")]
    assert len(reducer.buckets) > 3

    def run() -> None:
        loss = LOSSES["softmax"](model(grid, "a"), labels, 0.0)
        with reducer.overlap(used):
            loss.backward()

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            parameters.zero_grads()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    expected = parameters.grads.clone()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    for _ in range(2):
        parameters.grads.zero_()
        graph.replay()
        torch.testing.assert_close(parameters.grads, expected)
    assert parameters.grads.norm() > 0
    assert torch.equal(parameters.grads, parameters.grads.bfloat16().float()) == (precision == "bf16")
