"""The memory of this process: how glibc and PyTorch get it from the system, and its peak."""

import ctypes
import os
import re
import sys
from pathlib import Path

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the options' numbers in glibc's malloc.h
malloc_options: dict[int, int] = {}  # as this process has set them


def keep_memory() -> None:
    """Have glibc keep freed memory for the next tensors. For programs that own their process.

    Otherwise each large tensor gets new memory, page by page and filled with zeros: a tenth of a U-Net's time on a CPU.
    """
    large_pages()
    tell_malloc(TRIM_THRESHOLD, 2**31 - 1)
    tell_malloc(MMAP_THRESHOLD, 2**30)


def return_memory() -> None:
    """Have glibc return the memory of each freed tensor to the system: slower, with a lower peak.

    A LoRA step of SD 1.5 in fp32 took 1.5 GiB beside the weights; 2.2 by glibc's defaults.
    """
    large_pages()
    tell_malloc(MMAP_THRESHOLD, 2**20)


def large_pages() -> None:
    """Have PyTorch take large tensors in pages of 2 MB. It asks once, before the first of them. (34 s a step became 28 s.)"""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own switch: "transparent huge pages"


def returns_memory() -> bool:
    """Did `return_memory` have the last word?"""
    return malloc_options.get(MMAP_THRESHOLD) == 2**20


def tell_malloc(option: int, value: int) -> None:
    """glibc's mallopt, where there is one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and mallopt(option, value):
        malloc_options[option] = value


def machine_memory() -> int | None:
    """All that this machine has, in bytes; None on Windows, where Python cannot say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: str) -> int | None:
    """The most memory that this process has had so far, in bytes: of tensors on a GPU, else of everything. None on Windows.

    (Linux's `ru_maxrss` begins with that of the parent process.)
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    if sys.platform == "win32":
        return None
    import resource  # only now: Windows has no such module

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
