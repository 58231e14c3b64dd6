"""Tensors of more than 2³¹ elements: offsets that would wrap around in 32 bits.

They lie in a file with holes, of which only what is touched takes memory. Triton's interpreter wraps 32-bit numbers as a GPU does.
"""

import pytest
import torch
from attention_cases import DTYPES, row
from compare import DEVICE
from samples import normal

from polyvit_kernels.triton_kernels import attention_long, attention_short

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="holes are a matter of files; test_gpu.py has tensors of that size")
FAR = 2**30 + 64  # fits 32 bits itself, but twice of it does not


@pytest.fixture
def far_apart(tmp_path):
    """A function that copies a tensor so that its examples lie `FAR` elements apart."""

    def spread(x):
        size = FAR * (len(x) - 1) + x[0].numel()
        path = tmp_path / f"holes{len(list(tmp_path.iterdir()))}"
        with path.open("wb") as file:
            file.truncate(size * x.element_size())
        wide = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype).as_strided(x.shape, (FAR, *x.stride()[1:]))
        return wide.copy_(x)

    return spread


@pytest.mark.parametrize("kernels", ["attention_short", "attention_long"])
def test_attention(kernels, far_apart):
    module = {"attention_short": attention_short, "attention_long": attention_long}[kernels]
    qkv, grad = normal(3, 5, 3, 1, 16).to(DTYPES[0]), normal(3, 5, 1, 16, seed=1).to(DTYPES[0])
    forward, backward = row(f"{kernels}_forward", 5, 16), row(f"{kernels}_backward", 5, 16)
    out, lse = module.forward(qkv, forward)
    far_out, far_lse = module.forward(far_apart(qkv), forward)
    assert torch.equal(far_out, out)
    assert torch.equal(far_lse, lse)
    found, _ = module.backward(far_apart(grad), far_apart(qkv), out, lse, backward)
    assert torch.equal(found, module.backward(grad, qkv, out, lse, backward)[0])
