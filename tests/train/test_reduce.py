import gc
import itertools
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from processes import free_port, together
from tiny_runs import tile_task, tiny_config

from polyvit_fast.config import Model, Optim
from polyvit_fast.model.polyvit import PolyViT
from polyvit_fast.train import reduce
from polyvit_fast.train.distributed import World
from polyvit_fast.train.loss import LOSSES
from polyvit_fast.train.optim import FlatParameters, Optimizer
from polyvit_fast.train.reduce import Reducer

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
    """Of micro-batch `part` of `of` of this process's share of a batch; the sum over all is the gradient of the whole batch's mean loss."""
    grid, labels = (whole.chunk(world.size)[world.rank].chunk(of)[part] for whole in batch(task, number))
    loss = LOSSES[config().tasks[task].loss](model(grid, task), labels, 0.0)
    (loss / (world.size * of * 2)).backward()


def gather_gradient(model, reducer, world, step: int) -> None:
    """A step of both tasks, of which the second comes in two micro-batches: only the last backward is overlapped."""
    backward(model, "a", step, world, 1, 0)
    backward(model, "b", step, world, 2, 0)
    used = [name for name, _ in model.named_parameters() if name != "heads.a.weight" and name != "heads.a.bias"]
    with reducer.overlapped(used):
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


def reduced(world: World) -> dict[str, dict[str, object]]:
    """All that is to be looked at, of both precisions, in one start of processes."""
    reduce.BUCKET_BYTES = SMALL_BUCKET
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
            parameters.taint.add_(torch.nan if world.rank == world.size - 1 else 0.0)
            with reducer.overlapped([]):
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
        parameters.taint.fill_(torch.nan if step == 2 else 0.0)
        optimizer.update(torch.tensor(0.1))
    return gradient, parameters.values


@cache
def of_processes(size: int) -> list[dict[str, dict[str, object]]]:
    return together(size, reduced)


@pytest.mark.parametrize(("size", "precision"), [(2, "fp32"), (2, "bf16"), (4, "fp32"), (4, "bf16")])
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
    # The gradient of parts of a batch is rounded otherwise than that of the whole, inside the model, where a bound on one element would
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
    assert after == 1  # the rest, with the taint


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
def test_buckets_hold_every_gradient_once_and_the_taint_last(monkeypatch, bucket_bytes):
    monkeypatch.setattr(reduce, "BUCKET_BYTES", bucket_bytes)
    sent = Sent(monkeypatch)
    parameters = FlatParameters(PolyViT.from_config(config()))
    with Reducer(parameters, "fp32").overlapped([]):
        pass
    parameters.grads.copy_(torch.arange(len(parameters.grads)))
    *matrices, rest = sent.tensors
    assert torch.equal(torch.cat([*reversed(matrices), rest]), parameters.grads)
    assert rest[0] == parameters.decayed
    assert parameters.taint in rest
    assert all(tensor.nbytes >= bucket_bytes for tensor in matrices[:-1])
    assert len(matrices) == {1: 11, SMALL_BUCKET: 7, 25 << 20: 1}[bucket_bytes]  # of 11 weight matrices


def test_a_gradient_that_comes_too_late_is_an_error(monkeypatch):
    Sent(monkeypatch)
    model = PolyViT.from_config(config())
    parameters = FlatParameters(model)
    reducer = Reducer(parameters, "fp32")
    with pytest.raises(RuntimeError, match=r"has a gradient that its bucket left without"), reducer.overlapped([]):
        backward(model, "a", 0, World(), 1, 0)
    with reducer.overlapped(name for name in parameters.leaves if not name.startswith("heads.b")):  # and is forgotten
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
        with reducer.overlapped(used):
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
