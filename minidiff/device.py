"""Where the networks run."""

import torch

from minidiff.errors import SettingsError


def chosen_device(name: str | None) -> str:
    """The device of --device: cpu, cuda or cuda:1; for None a GPU if there is one. SettingsError for any other."""
    gpus = torch.cuda.device_count()
    name = name or ("cuda" if gpus else "cpu")
    known = ["cpu", "cuda", *(f"cuda:{i}" for i in range(gpus))]
    if name.startswith("cuda") and not gpus:
        raise SettingsError(f"--device {name}: there is no GPU that torch can use here; leave the flag out, or say cpu.")
    if name not in known:
        raise SettingsError(f"--device {name} is no device; it can be {', '.join(known if gpus else known[:1])}.")
    return name
