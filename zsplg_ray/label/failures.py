"""What a failure of torch means: memory that ran out, or a device that is lost.

What enters: an exception. What leaves: whether to try again in smaller steps, or to give up. Apart
from the models, for whoever only has to tell errors apart need not load them.
"""

from __future__ import annotations

import torch


def free_memory() -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (GPU or CPU) or Python says that memory ran out."""
    told = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in told
        for sign in ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")
    )


def is_broken_device(error: BaseException) -> bool:
    """Whether a GPU reports an error after which it answers nothing else in this process."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
