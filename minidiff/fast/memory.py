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
    """Have this process keep the memory that tensors leave, for the next ones. For programs that own their process.

    On Linux a large tensor's memory is given back when it goes, and the next one gets it anew, page by page and filled with
    zeros: about a tenth of a U-Net's time on a CPU. glibc is told to keep it.
    """
    large_pages()
    tell_malloc(TRIM_THRESHOLD, 2**31 - 1)
    tell_malloc(MMAP_THRESHOLD, 2**30)


def return_memory() -> None:
    """Have this process give the memory of each tensor back when it goes: slower, and the peak is what tensors need.

    Left alone, glibc learns from freed tensors of up to 32 MB to keep such memory, and what it keeps does not always fit the
    next one: a LoRA step of SD 1.5 in fp32 took 2.2 GiB beside the weights, and 1.5 like this.
    """
    large_pages()
    tell_malloc(MMAP_THRESHOLD, 2**20)


def large_pages() -> None:
    """Have PyTorch take large tensors in pages of 2 MB; before the first of them, or it will not.

    Memory that is given back comes anew in 512 times fewer pieces: a step of SD 1.5 under `return_memory` took 28 s, before 34.
    """
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
    """The most that this process has had so far, in bytes: of tensors on a GPU, else of everything. None on Windows.

    Linux's `ru_maxrss` is no use: a process begins with that of the one that started it.
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
