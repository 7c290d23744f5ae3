"""Several processes, one for each GPU, that train as one: `torchrun --nproc_per_node N -m minidiff train …`.

Each process reads the same batches and takes its share of the rows. DistributedDataParallel (arXiv 2006.15704) averages the
gradients in the backward pass. So all processes hold the same weights at each step, and these are the weights of one process,
but for the order of additions. The first process (rank 0) alone writes files and draws. All see the same output folder.

    R processes   B samples of a batch, B / R of each process
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.train import Batch, Task
from minidiff.trainer.settings import TrainSettings

PATIENCE = timedelta(hours=2)  # the others wait while the first one draws or saves; a process that dies is noticed at once


@dataclass(frozen=True)
class World:
    """Which process this is, of how many. All processes must call its methods in the same order."""

    rank: int = 0
    size: int = 1

    def check(self, settings: TrainSettings) -> None:
        """SettingsError for a batch that cannot be shared evenly: its mean would not be the mean of the shares."""
        if settings.train_batch_size % self.size:
            rule = f"is for all {self.size} processes together; give a multiple of {self.size}"
            raise SettingsError(f"--train_batch_size {settings.train_batch_size} {rule}.")
        if settings.optimizer_in_backward and self.size > 1:
            raise SettingsError("--optimizer_in_backward is for one process: several would have to meet at every tensor.")

    def share(self, batch: Batch, batch_size: int) -> Batch:
        """This process's rows of a batch; a tensor without rows is for all.

        DreamBooth's batch has 2 B rows, pictures of the subject and then of the class: it gives a share of each half.
        """
        part = batch_size // self.size
        mine = slice(self.rank * part, (self.rank + 1) * part)
        halves = {k: v.unflatten(0, (-1, batch_size)) for k, v in batch.items() if v.ndim}  # (1 or 2, B, …)
        return {k: halves[k][:, mine].flatten(0, 1) if v.ndim else v for k, v in batch.items()}

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in one of the processes."""
        return bool(flag) if self.size == 1 else bool(summed(torch.tensor(float(flag))) > 0)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.any(False)


class Loss(nn.Module):
    """The loss as a module that has the trained parameters: DistributedDataParallel takes nothing else."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.trained, self.loss = nn.ParameterList(task.trainable.values()), task.loss

    def forward(self, batch: Batch, step: int, micro: int) -> Tensor:
        return self.loss(batch, step, micro)


def shared(task: Task, world: World, settings: TrainSettings) -> Task:
    """The task on the rows of this process; its loss and its gradients are means over all processes."""
    if world.size == 1:
        return task
    module = DistributedDataParallel(Loss(task))

    def loss(batch: Batch, step: int, micro: int) -> Tensor:
        last = micro == settings.gradient_accumulation_steps - 1
        with nullcontext() if last else module.no_sync():  # gradients travel once an update
            own: Tensor = module(world.share(batch, settings.train_batch_size), step, micro)
        mean = summed(own.detach().clone()) / world.size
        return own + (mean - own.detach())  # the value is the mean; the gradient is that of `own`, and DDP averages it

    return replace(task, loss=loss)


def summed(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, in place."""
    dist.all_reduce(x)
    return x


def world() -> World:
    """The processes that `joined` has connected; else this one alone."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else World()


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """Connect the processes that torchrun started, each with a GPU of its own as "cuda"; only the first one's prints are seen.

    `device` is that of --device. Where torchrun did not start this process there is nothing to do.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if gpus and (together := int(os.environ.get("LOCAL_WORLD_SIZE", size))) > gpus:
        raise SettingsError(f"torchrun started {together} processes, and there are {gpus} GPUs: --nproc_per_node {gpus}.")
    if gpus and device not in (None, "cuda"):
        raise SettingsError(f"--device {device}: torchrun gives each process a GPU of its own; leave the flag out.")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if dist.get_rank() else sys.stdout):
            yield world()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise MinidiffError(
            f"Process {dist.get_rank()} of {size} stops, as another process of this run has ended; its message says why. "
            "Go on with --resume_from_checkpoint latest."
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone
