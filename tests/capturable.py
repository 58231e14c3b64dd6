"""Refuses, without a GPU, what no CUDA graph captures: meta tensors stand for those of a device, for the host cannot read them either.

A graph captures launches on the device. Whatever happens between device and host is lost, or makes the capture fail: a copy from one to
the other, a number that Python reads, a shape that depends on data.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import choose_an_h100s_rows
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from polyvit_kernels.ops import dtypes, update

META = torch.device("meta")
_aten = torch.ops.aten

READERS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__contains__, torch.is_nonzero),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__index__),
}
"""Give Python what lies on the device."""

WRITERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
"""Make a tensor of Python's numbers, on the host, and copy it."""

COPIES = (_aten.copy_.default, _aten._to_copy.default)


class NotCapturableError(Exception):
    """A call that cannot be captured; the message names it and says why."""


@contextmanager
def check_capturable(*, feeds: bool = False) -> Iterator[None]:
    """Inside, a call on meta tensors that cannot be captured raises NotCapturableError.

    With `feeds`, copies to the device may be queued, for which the host does not wait, although no graph captures them.
    """
    with _Calls(), _Operators(feeds):
        yield


class _Calls(TorchFunctionMode):
    """Sees calls of PyTorch as they are written: on meta tensors, operators no longer show where a number came from."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_on_device = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if is_on_device and func in READERS:
            _refuse(func, "the host reads what lies on the device")
        if is_on_device and func in (Tensor.__getitem__, Tensor.__setitem__) and _has_host_index(args[1]):
            _refuse(func, "an index of the host's numbers is copied to the device")
        if is_on_device and func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
            _refuse(func, "a number is copied from the host; fill_ takes it along with its launch")
        out = func(*args, **(kwargs or {}))
        if func in WRITERS and out.is_meta and not (args and isinstance(args[-1], Tensor) and args[-1].is_meta):
            _refuse(func, "numbers are copied from the host")
        return out


class _Operators(TorchDispatchMode):
    """Sees every operator, those of a backward pass too."""

    def __init__(self, feeds: bool) -> None:
        super().__init__()
        self.feeds = feeds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if len(devices) > 1 and not (self.feeds and _is_queued_to_device(func, args, kwargs)):
            _refuse(func, "a copy between host and device" if func in COPIES else "tensors of the host among those of the device")
        if "meta" in devices and _depends_on_data(func, args):
            _refuse(func, "the host waits for data, on which the output's shape or value depends")
        return func(*args, **kwargs)


def _is_queued_to_device(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is a copy to the device for which the host does not wait."""
    if func is _aten.copy_.default:
        return args[0].is_meta and args[2:] == (True,)
    return func is _aten._to_copy.default and kwargs["device"] == META and kwargs.get("non_blocking", False)


def _has_host_index(index: Any) -> bool:
    indices = index if isinstance(index, tuple) else (index,)
    return any(isinstance(one, list | np.ndarray) or (isinstance(one, Tensor) and not one.is_meta) for one in indices)


def _depends_on_data(func: Any, args: Any) -> bool:
    if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default):
        return any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )  # a mask's nonzero elements are counted
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


def _refuse(func: Callable, reason: str) -> None:
    raise NotCapturableError(f"{resolve_name(func) or func}: {reason}")


@pytest.fixture
def on_meta(monkeypatch):
    """On meta tensors the public operations are those of a GPU: what is registered for CUDA runs, with an H100's rows.

    It runs up to the launches of kernels, which take tensors of the device alone and write nothing. Autocast knows no meta tensors.
    """
    monkeypatch.setattr(dtypes, "runs_registered", lambda x: True)
    choose_an_h100s_rows(monkeypatch, portable=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    for kind in (JITFunction, InterpretedFunction):  # Gluon's functions are JITFunctions
        monkeypatch.setattr(kind, "run", _launch)
    monkeypatch.setattr(update, "_check_apart", lambda *args: None)  # of addresses, of which meta tensors have none
    for name, operation in OPDEFS.items():
        if name.startswith("polyvit::"):
            monkeypatch.setattr(operation, "_abstract_fn", operation._backend_fns["cuda"])


def _launch(self, *args, grid, warmup, **kwargs) -> None:
    """Instead of a kernel's launch."""
    tensors = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in (*args, *kwargs.values())]
    if any(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in tensors):
        raise NotCapturableError(f"{self.__name__}: a kernel takes a tensor of the host")
