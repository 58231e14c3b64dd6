import pytest
import torch
from compare import DEVICE
from torch.nn import functional

from polyvit_kernels.ops.dtypes import (
    FLOATING,
    check_floating,
    check_one_device,
    is_autocast_on,
    matmul_dtype,
    norm_dtype,
    without_autocast,
)

KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_without_autocast_everything_keeps_its_dtype(dtype):
    x = torch.zeros(2, 2, dtype=dtype, device=DEVICE)
    assert matmul_dtype(x) == norm_dtype(x) == dtype


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_products_are_as_torchs(half, dtype):
    x = torch.ones(16, 16, dtype=dtype, device=DEVICE)
    with torch.autocast(DEVICE.type, half):
        assert matmul_dtype(x) == functional.linear(x, x).dtype
        assert norm_dtype(x) == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="torch normalises in fp32 under autocast on a GPU only")
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_under_autocast_normalising_is_as_torchs(dtype):
    x = torch.ones(2, 16, dtype=dtype, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert norm_dtype(x) == functional.layer_norm(x, (16,)).dtype


def test_autocast_of_another_device_changes_nothing_nor_do_whole_numbers_change():
    with torch.autocast("cuda" if DEVICE.type == "cpu" else "cpu", torch.bfloat16, enabled=torch.cuda.is_available()):
        assert matmul_dtype(torch.zeros(2, device=DEVICE)) == torch.float32
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert matmul_dtype(torch.zeros(2, dtype=torch.uint8, device=DEVICE)) == torch.uint8


def test_meta_tensors_have_no_autocast():
    meta = torch.zeros(2, device="meta")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert matmul_dtype(meta) == torch.float32
        assert not is_autocast_on(meta)
        with without_autocast(meta):
            assert matmul_dtype(torch.zeros(2, device=DEVICE)) == torch.bfloat16


def test_autocast_is_switched_off_for_a_while():
    x = torch.ones(2, 2, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with without_autocast(x):
        assert (x @ x).dtype == torch.float32


def test_tensors_on_several_devices_are_told_by_name():
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    check_one_device(x=here, y=here)
    check_one_device(x=there)
    with pytest.raises(ValueError, match="tensors must be on one device, not x on cpu, y on meta"):
        check_one_device(x=here, y=there)


def test_dtypes_that_are_no_floating_point_ones_are_told_by_name():
    check_floating(**{str(dtype): dtype for dtype in FLOATING}, x=torch.zeros(2, dtype=torch.float64))
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        for thing in (torch.zeros(2, dtype=dtype), dtype):
            with pytest.raises(ValueError, match=f"y is {dtype}, but a floating-point dtype is needed"):
                check_floating(x=torch.zeros(2), y=thing)
