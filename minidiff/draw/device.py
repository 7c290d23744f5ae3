"""Where the networks run: --device."""

import os
import re

import torch

from minidiff.core.errors import SettingsError


def chosen_device(name: str | None) -> str:
    """The device of --device: cpu, mps, cuda or cuda:1, which becomes the current GPU; for None a GPU if there is one."""
    gpus, apple = torch.cuda.device_count(), ["mps"] * torch.backends.mps.is_available()
    name = name or ("cuda" if gpus else [*apple, "cpu"][0])
    known = ["cpu", *apple, *(["cuda"] * bool(gpus)), *(f"cuda:{i}" for i in range(gpus))]
    if name.startswith("cuda") and not gpus:
        raise SettingsError(f"--device {name}: there is no GPU that torch can use here; leave the flag out, or say cpu.")
    if name not in known:
        raise SettingsError(f"--device {name} is no device; it can be {', '.join(known)}.")
    if name.startswith("cuda") and not torch.cuda.is_initialized():  # so that cuBLAS repeats its products to the bit
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if ":" in name:
        torch.cuda.set_device(name)
    return name


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, CUDA's with its libraries', and what PyTorch says on a CPU ("can't allocate memory")."""
    words = "out of memory|t allocate memory|not enough memory|CU[A-Z]+_STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))
