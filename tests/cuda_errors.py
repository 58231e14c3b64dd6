"""What a GPU says of the kernels that were launched before."""

import torch

# As they are now: the test whose report is made may have patched them.
_is_initialized, _synchronize = torch.cuda.is_initialized, getattr(torch._C, "_cuda_synchronize", None)


def find_cuda_error() -> str:
    """What the GPU answers to this process; nothing where it answers as it should, or was never asked for anything."""
    if _synchronize is None or not _is_initialized():
        return ""
    try:
        _synchronize()
    except RuntimeError as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    return ""
