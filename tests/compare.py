"""The rule by which a fast operation is judged against plain PyTorch: no further from the truth than twice plain's own distance.

The distance is measured twice: by the largest error, which sees one wrong element among many, and by the root of the mean square, which
sees all that are a little less exact. The largest of few errors is a matter of luck: over seeds it is anything from half of what it is on
average to double, and which it is depends on the CPU's instructions. So plain's counts as three times its root of the mean square at least,
as it is for a few hundred normal errors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels are tested: on the GPU if there is one, else in Triton's interpreter on the CPU."""

Operation = Callable[..., Tensor]


def assert_as_exact_as_torch(ours: Operation, plain: Operation, truth: Operation, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Hold `ours` to the rule, for the output and the gradient of every floating-point input, called by keyword.

    `plain` is the baseline at the same `dtype`; `truth` is computed in fp64 from the same rounded inputs. All run on `DEVICE`.
    """
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    found = outputs_and_gradients(ours, inputs)
    with one_thread():
        baseline = outputs_and_gradients(plain, inputs)
    assert_within_rule(found, baseline, outputs_and_gradients(truth, exact), dtype)


def assert_within_rule(found: dict[str, Tensor], baseline: dict[str, Tensor], true: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Hold tensors by name to the rule. The baseline must be sane itself: within 32 roundings of the truth's largest value."""
    assert found.keys() == true.keys()
    for name, value in true.items():
        assert found[name].dtype == baseline[name].dtype, f"{name}: {found[name].dtype}"
        assert found[name].shape == value.shape, f"{name}: {found[name].shape}"
        error, allowed = largest_difference(found[name], value), largest_difference(baseline[name], value)
        mean_error, mean_allowed = mean_difference(found[name], value), mean_difference(baseline[name], value)
        assert allowed <= 32 * torch.finfo(dtype).eps * largest_difference(value, torch.zeros_like(value)) + 1e-5, (
            f"{name}: plain PyTorch is off by {allowed:.3g}"
        )
        assert error <= 2 * max(allowed, 3 * mean_allowed) + 1e-5, f"{name}: error {error:.3g}, plain PyTorch's is {allowed:.3g}"
        assert mean_error <= 2 * mean_allowed + 1e-5, f"{name}: mean error {mean_error:.3g}, plain PyTorch's is {mean_allowed:.3g}"


def outputs_and_gradients(operation: Operation, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output of `operation` and the gradients of all floating-point inputs, for one random gradient by the output."""
    leaves = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    output = operation(**leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(output, list(wanted.values()), upstream)
    return {"output": output.detach()} | {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch sums on one thread: the parts that several sum are more exact, and a baseline must not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """max |a − b| in fp64; infinite when `a` holds a NaN, 0 for empty tensors."""
    return (a.double() - b.double()).abs().nan_to_num(torch.inf, torch.inf).max().item() if a.numel() else 0.0


def mean_difference(a: Tensor, b: Tensor) -> float:
    """The root of the mean square of a − b in fp64; infinite when `a` holds a NaN, 0 for empty tensors."""
    return (a.double() - b.double()).square().mean().sqrt().nan_to_num(torch.inf, torch.inf).item() if a.numel() else 0.0
