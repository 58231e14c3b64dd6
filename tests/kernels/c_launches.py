"""What the C library launches, run on the CPU: `recording_driver.c` stands for the driver, Triton's interpreter for the GPU.

A program of its own, because the driver's name must not be taken in the tests' process: c_launches.py LIBRARY DRIVER ROWS. The rows are
those that the library was compiled from. It raises where something is wrong.
"""

import contextlib
import ctypes
import sys
import threading
from pathlib import Path
from unittest import mock

import torch
from attention_cases import assert_obeys, upstream
from samples import normal

from polyvit_kernels import tiles
from polyvit_kernels.aot import library
from polyvit_kernels.tiles import lookup
from polyvit_kernels.triton_kernels import attention_long, attention_short

TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
OK, NO_KERNEL, BAD_ARGUMENT, NO_GPU, NO_CONTEXT, CUDA_ERROR = range(6)
ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)


class Attention(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_char_p),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "head_dim")),
        ("qkv_strides", ctypes.c_int64 * 4),
        ("grad_strides", ctypes.c_int64 * 3),
    ]


class Gpu:
    """The driver and the library that uses it, with the memory that kernels may touch."""

    def __init__(self, library_path: Path, driver_path: Path) -> None:
        self.driver = ctypes.CDLL(str(driver_path))
        self.held = library.load(library_path)
        self.kernels = {
            kernel.contents.image: kernel.contents
            for row in library.rows(self.held)
            for kernel in (row.kernels[index] for index in range(row.num_kernels))
        }
        self.memory: dict[int, torch.Tensor] = {}
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        self.failure: Exception | None = None
        self.callback = ON_LAUNCH(self._launch)
        ctypes.c_void_p.in_dll(self.driver, "on_launch").value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def set(self, **values: int) -> None:
        for name, value in values.items():
            ctypes.c_int.in_dll(self.driver, name).value = value

    def get(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.driver, name).value

    def pointer(self, tensor: torch.Tensor) -> ctypes.c_void_p:
        self.memory[tensor.data_ptr()] = tensor
        return ctypes.c_void_p(tensor.data_ptr())

    def error(self) -> str:
        return self.held.polyvit_kernels_error().decode()

    def _launch(self, image, grid, threads, shared, stream, parameters) -> int:
        try:
            self._run(self.kernels[image], tuple(grid[:3]), threads, shared, parameters)
        except Exception as failure:
            self.failure = failure
        return 0

    def _run(self, kernel, grid, threads, shared, parameters) -> None:
        assert (threads, shared) == (32 * kernel.num_warps, kernel.shared_bytes)
        name = kernel.name.decode()
        arguments = {}
        for index in range(kernel.num_parameters):
            parameter = kernel.parameters[index]
            kind = parameter.type.decode()
            where = parameters[index]
            if kind.startswith("*"):
                arguments[parameter.name.decode()] = self.memory[ctypes.c_uint64.from_address(where).value]
            else:
                arguments[parameter.name.decode()] = TYPES[kind].from_address(where).value
        for scratch in range(2):
            assert ctypes.c_uint64.from_address(parameters[kernel.num_parameters + scratch]).value == 0
        constants = {kernel.constants[i].name.decode(): kernel.constants[i].value.decode() for i in range(kernel.num_constants)}
        arguments |= {key: None if value == "none" else int(value) for key, value in constants.items()}
        module = attention_short if "short" in name else attention_long
        getattr(module, name)[grid](**arguments)
        self.launches.append((name, grid))

    def attention(self, qkv: torch.Tensor, grad: torch.Tensor, packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(out, log-sums, gradient of qkv) by the C library. The kernels for bf16 work on fp32: only the interpreter sees the elements."""
        batch, tokens, _, heads, head_dim = qkv.shape
        call = Attention(dtype=b"bf16", batch=batch, tokens=tokens, heads=heads, head_dim=head_dim)
        if not packed:
            call.qkv_strides[:] = qkv.stride()[:4]
            call.grad_strides[:] = grad.stride()[:3]
        out, lse = torch.empty(batch, tokens, heads, head_dim), torch.empty(batch, heads, tokens)
        scratch, dqkv = torch.empty_like(lse), torch.empty(qkv.shape)
        self.must(self.held.polyvit_attention_forward(ctypes.byref(call), *map(self.pointer, (qkv, out, lse)), None))
        tensors = (grad, qkv, out, lse, scratch, dqkv)
        self.must(self.held.polyvit_attention_backward(ctypes.byref(call), *map(self.pointer, tensors), None))
        return out, lse, dqkv

    def must(self, status: int) -> None:
        if self.failure:
            raise self.failure
        assert status == OK, self.error()


class Recorded:
    """Stands for a kernel: keeps the grids that it is launched with, and computes nothing."""

    def __init__(self, name: str, launches: list[tuple[str, tuple[int, ...]]]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]):
        self.launches.append((self.name, (*grid, 1, 1)[:3]))
        return lambda *args, **named: None


def python_launches(arch: int, qkv: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor):
    """(kernel, grid) of each launch of the launchers in Python, with the rows for `arch`."""
    found = []
    families = {"attention_short": attention_short, "attention_long": attention_long}
    with contextlib.ExitStack() as stack:
        for module in families.values():
            for name in [name for name in vars(module) if name.startswith("attention_") and "_kernel" in name]:
                stack.enter_context(mock.patch.object(module, name, Recorded(name, found)))
        for direction, tensors in (("forward", (qkv,)), ("backward", (grad, qkv, out, lse))):
            for op, module in families.items():
                tile = tiles.pick(f"{op}_{direction}", arch, torch.bfloat16, tokens=qkv.shape[1], features=qkv.shape[4], portable=True)
                if tile.backend == "triton":
                    getattr(module, direction)(*tensors, tile)
                    break
    return found


def check_attention(gpu: Gpu) -> None:
    """Every family of kernels, contiguous and not, computes what the reference does, with the launches of the Python functions."""
    seen = set()
    for capability, batch, tokens, heads, packed in (
        (90, 2, 50, 3, True),
        (90, 2, 50, 3, False),
        (90, 1, 197, 1, True),
        (120, 1, 50, 2, True),
        (100, 2, 270, 1, False),
    ):
        gpu.set(capability=capability, context=capability)
        assert gpu.held.polyvit_kernels_arch() == capability
        gpu.launches.clear()
        strided = normal(batch, 3, heads, tokens + 3, 64).permute(0, 3, 1, 2, 4)[:, 3:]
        qkv = strided.contiguous() if packed else strided
        grad = upstream(qkv).contiguous() if packed else upstream(qkv)
        out, lse, dqkv = gpu.attention(qkv, grad, packed)
        assert_obeys(qkv, {"out": out, "dqkv": dqkv}, lse, torch.float32, grad)
        assert gpu.launches == python_launches(capability, qkv, grad, out, lse)
        seen |= {name for name, _ in gpu.launches}
    assert len(seen) == 5


def check_what_is_refused(gpu: Gpu) -> None:
    """Each call that the kernels cannot serve gets its status and says why."""
    gpu.set(capability=90, context=90)
    qkv, out, lse = normal(1, 32, 3, 1, 64), torch.empty(1, 32, 1, 64), torch.empty(1, 1, 32)

    def refused(status: int, words: str, *, at: int = 0, strides: tuple[int, ...] = (), **changes) -> None:
        call = Attention(**{"dtype": b"bf16", "batch": 1, "tokens": 32, "heads": 1, "head_dim": 64} | changes)
        call.qkv_strides[: len(strides)] = strides
        where = ctypes.c_void_p(qkv.data_ptr() + at)
        found = gpu.held.polyvit_attention_forward(ctypes.byref(call), where, gpu.pointer(out), gpu.pointer(lse), None)
        assert (found, words in gpu.error()) == (status, True), (found, gpu.error())

    gpu.launches.clear()
    refused(BAD_ARGUMENT, "p_qkv is", at=8)
    refused(BAD_ARGUMENT, "must be a multiple of 16 bytes", at=8)
    refused(BAD_ARGUMENT, "stride_token is 200, but must be a multiple of 16", strides=(6400, 200, 64, 64))
    refused(BAD_ARGUMENT, "more than 32 bits count", strides=(1 << 40, 1 << 30, 64, 64))
    refused(BAD_ARGUMENT, "more than 32 bits count", tokens=1 << 30)
    refused(BAD_ARGUMENT, "stride_batch is 4398046511104, which 32 bits do not hold", strides=(1 << 42, 192, 64, 64))
    refused(BAD_ARGUMENT, "70000 programs along axis 2", batch=70000)
    refused(BAD_ARGUMENT, "are no sizes", heads=0)
    refused(NO_KERNEL, "no kernel for attention_long_forward of fp32, sm_90", dtype=b"fp32")
    refused(NO_KERNEL, "was not compiled as attention_short_fwd_kernel with HEAD_DIM=48", head_dim=48)
    refused(OK, "", batch=0)
    gpu.set(context=0)
    refused(NO_CONTEXT, "no CUDA context is current")
    gpu.set(context=121, capability=121)
    refused(NO_GPU, "is for sm_120 and does not run on this GPU, sm_121", tokens=50)
    gpu.set(context=75, capability=75)
    refused(NO_KERNEL, "sm_75")
    gpu.set(context=89, capability=89)
    refused(NO_KERNEL, "built without sm_89")
    assert not gpu.launches


def check_an_image_is_loaded_once_per_context(gpu: Gpu) -> None:
    gpu.set(capability=90, context=1000, loads=0)
    row = gpu.held.polyvit_kernels_find(b"attention_short_forward", b"bf16", 90, 197, 64)
    kernel = gpu.held.polyvit_kernels_choose(row, None, None)
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(gpu.held.polyvit_kernels_load(kernel))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [OK] * 16
    assert gpu.get("loads") == 1
    assert gpu.get("opted_in_bytes") == kernel.contents.shared_bytes > 48 << 10
    gpu.set(context=1001)
    assert gpu.held.polyvit_kernels_load(kernel) == OK
    assert gpu.get("loads") == 2


def check_no_device(gpu: Gpu) -> None:
    """Must come first: a driver that was opened stays open."""
    gpu.set(device_error=100)
    assert gpu.held.polyvit_kernels_arch() == -NO_GPU
    assert gpu.error() == "no CUDA GPU: cuInit gives CUDA_ERROR_NO_DEVICE"
    gpu.set(device_error=0)


if __name__ == "__main__":
    found = Gpu(Path(sys.argv[1]), Path(sys.argv[2]))
    lookup.TABLE = tiles.load_rows(Path(sys.argv[3]))
    check_no_device(found)
    check_an_image_is_loaded_once_per_context(found)
    check_what_is_refused(found)
    check_attention(found)
