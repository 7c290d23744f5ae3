"""The memory of this process: how glibc and PyTorch get it from the system, and its peak."""

import ctypes
import os
import re
import sys
from functools import cache
from pathlib import Path

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the options' numbers in glibc's malloc.h


def keep_memory(keep: bool = True) -> None:
    """Have glibc keep freed memory for the next tensors: a tenth of a U-Net's time on a CPU. For programs, not libraries.

    Without `keep` it returns freed memory to the system: slower, but SD 1.5's LoRA step took 1.5 GiB beside the weights, not
    2.2. In both cases PyTorch takes large tensors in pages of 2 MB, if none was made before. (34 s a step became 28 s.)
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own switch: "transparent huge pages"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None  # only glibc has it
    if mallopt and keep:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
    if mallopt:
        mallopt(MMAP_THRESHOLD, 2**30 if keep else 2**20)


@cache
def machine_memory() -> int | None:
    """All that this machine has, in bytes; None on Windows, where Python cannot say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: str) -> int | None:
    """The most memory that this process has had so far, in bytes: of tensors on a GPU, else of everything. None on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # on Linux, ru_maxrss begins with that of the parent process
    if status.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    if sys.platform == "win32":
        return None
    import resource  # only now: Windows has no such module

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
