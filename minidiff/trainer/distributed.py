"""Several processes, one for each GPU, that train as one: `torchrun --nproc_per_node N -m minidiff train …`.

Each process reads the same batches, takes its share of the rows, and the gradients are averaged before the update. So all
hold the same weights at each step, and these are those of one process, but for the order in which numbers are added up.
DistributedDataParallel (arXiv 2006.15704) does the same, and hides the exchange behind the backward pass.

The first process, of rank 0, alone writes files and draws. They run on one machine, or share the output folder.

    R processes   B samples of a batch, B / R of each process
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minidiff.core.errors import MinidiffError, SettingsError

BUCKET = 32_000_000  # numbers that travel together: many small tensors would each wait for an answer
PATIENCE = timedelta(hours=2)  # the others wait while the first one draws or saves; a process that dies is noticed at once


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and what they say to each other. All must make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    def check(self, batch_size: int) -> None:
        """SettingsError for a batch that cannot be shared evenly: its mean would not be the mean of the shares."""
        if batch_size % self.size:
            near = batch_size - batch_size % self.size
            sizes = " or ".join(str(n) for n in (near, near + self.size) if n)
            raise SettingsError(
                f"--train_batch_size {batch_size} is for all {self.size} processes together, which cannot share it evenly; "
                f"give {sizes}."
            )

    def share(self, batch: dict[str, Tensor], batch_size: int) -> dict[str, Tensor]:
        """This process's rows of a batch.

        A tensor of k B rows holds k batches one after the other (DreamBooth: pictures of the subject, then of the class): it
        gives a share of each. One without rows is for all.
        """
        if self.size == 1:
            return batch
        part = batch_size // self.size
        mine = slice(self.rank * part, (self.rank + 1) * part)
        halves = {k: v.unflatten(0, (-1, batch_size)) for k, v in batch.items() if v.ndim}  # (k, B, …)
        return {k: halves[k][:, mine].flatten(0, 1) if v.ndim else v for k, v in batch.items()}

    def average(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its mean over all processes."""
        if self.size == 1:
            return
        for bucket in buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            with self._talking():
                dist.all_reduce(flat)
            flat /= self.size
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        box = [torch.tensor(value, dtype=torch.float64)]
        self.average(box)
        return box[0].item()

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of the processes."""
        return self.mean(float(flag)) > 0

    def wait(self) -> None:
        """Go on when all have come here."""
        self.any(False)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """torch says that a connection broke; a person wants to know what it means."""
        try:
            yield
        except RuntimeError as error:
            raise MinidiffError(
                f"Process {self.rank} of {self.size} stops, as another process of this run has ended; its message says why. "
                "Go on with --resume_from_checkpoint latest."
            ) from error


def world() -> World:
    """The processes that `joined` has connected; else this one alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """Connect the processes that torchrun started, each with a GPU of its own as "cuda"; only the first one's prints are seen.

    `device` is that of --device. Where torchrun did not start this process there is nothing to do.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if sys.platform == "win32" or not dist.is_available():
        raise SettingsError("several processes need a torch with torch.distributed and gloo; start minidiff without torchrun.")
    backend, gpus, local = "gloo", torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus and device != "cpu":
        together = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if together > gpus:
            raise SettingsError(f"torchrun started {together} processes, and there are {gpus} GPUs: --nproc_per_node {gpus}.")
        if device not in (None, "cuda"):
            raise SettingsError(f"--device {device}: torchrun gives each process a GPU of its own; leave the flag out.")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if dist.get_rank() else sys.stdout):
        yield world()
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors, in order, in groups of about BUCKET numbers."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(t.numel() for t in group) + tensor.numel() > BUCKET:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group
