"""In which number format something is computed."""

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """fp16 and bf16 as fp32, in which norms are computed, as under autocast."""
    return x.float() if x.dtype in HALF else x


def as_autocast(x: Tensor) -> Tensor:
    """In the number format that autocast gives the inputs of a product, if it is on; it does not reach into a Function."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if on else x


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast on x's device; `meta`, where there is nothing to round, does not know it."""
    device = x.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known and torch.is_autocast_enabled(device) else nullcontext()


def slow_half(x: Tensor) -> bool:
    """Is x in half precision, on an x86 whose vector instructions (AVX2 at most) know none? PyTorch's loops take ages there.

    (A convolution in bf16 took 119 times as long as in fp32, a linear 6 times.)
    """
    if x.dtype not in HALF or x.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
