"""Latents and text embeddings on the disk, so that the next run on the same pictures encodes nothing.

    cache/
      3f0c…e1.safetensors      one picture's latent, and its mask; or the embedding of one prompt

A file's name is the sha256 of everything its numbers come from: the picture's bytes, size, crop and flip, or the prompt's
token ids; each number of the network; and what the last bits hang on, such as the device and PyTorch's version. So nothing
ever has to be thrown away because it is out of date, and what is read is, bit for bit, what a processor or GPU of this kind
computed with these versions. Each file also holds the sha256 of its own numbers: one that is damaged, or that somebody else put
there, is computed again.

It appears whole or not at all, so that several processes can share a folder, and be killed.
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import PIL
import torch
from torch import Tensor, nn

from minidiff.core.errors import SettingsError, WeightsError
from minidiff.files.atomic import HIDDEN
from minidiff.files.weights import read_header, save

ABANDONED = 3600  # seconds after which nobody writes on
FORMAT = 1  # goes up when something else is computed from the same picture or prompt

Tensors = Mapping[str, Tensor]


class Cache:
    """The outputs of one network, cached in a folder. SettingsError for a folder that cannot be made."""

    unwritable: ClassVar[set[Path]] = set()  # folders of which this has been said; those of several networks are one

    def __init__(self, folder: str | Path, network: nn.Module) -> None:
        self.folder, self.network = Path(folder), network
        self.made = 0  # how often nothing was there that could be used
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--cache_dir {self.folder} cannot be a folder for the cache: {error.strerror}.") from error
        sweep(self.folder)

    def kept(self, origin: Mapping[str, Any], make: Callable[[], Tensors]) -> Tensors:
        """The output of this network for `origin` (JSON values), computed now or read from an earlier run. On the CPU."""
        key = self.key(origin)
        path = self.folder / f"{key}.safetensors"
        found = read(path, key) if path.exists() else None
        if found is None:
            self.made += 1
            found = {name: tensor.detach().cpu() for name, tensor in make().items()}
            self._write(found, path, key)
        return found

    def key(self, origin: Mapping[str, Any]) -> str:
        """The sha256 of everything that decides the numbers."""
        whole = {"origin": origin, "network": self.fingerprint, "surroundings": self.surroundings}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Of every number of the network."""
        return digest(self.network.state_dict())

    @cached_property
    def surroundings(self) -> dict[str, Any]:
        """Apart from the inputs, the last bits of an output depend on these."""
        device = next(self.network.parameters()).device
        return {
            "format": FORMAT,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
        }

    def _write(self, tensors: Tensors, path: Path, key: str) -> None:
        """A cache that cannot be written is said once, and is no reason to stop."""
        try:
            save(tensors, path, {"key": key, "sha256": digest(tensors)})
        except OSError as error:
            if self.folder not in self.unwritable:
                print(f"Note: --cache_dir: {path} could not be written ({error.strerror}); going on without.", file=sys.stderr)
            self.unwritable.add(self.folder)


def read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of a file, if it is the one of that key and its numbers are as they were written; else None."""
    try:
        file = read_header(path)
        tensors = file.read()
    except (WeightsError, OSError):
        return None
    right = file.metadata.get("key") == key and file.metadata.get("sha256") == digest(tensors)
    return tensors if right else None


def sweep(folder: Path) -> None:
    """Take away what killed processes left half written; younger files may still be in the making."""
    for left in folder.glob(f"{HIDDEN}*.safetensors.*.tmp"):
        with suppress(OSError):  # another process was quicker
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def digest(tensors: Tensors) -> str:
    """sha256 of names, dtypes, shapes and numbers."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
