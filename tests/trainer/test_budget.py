"""The estimate of a run's memory: what it counts, and what the savings change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.saved_bytes import saved_bytes
from tiny_adapters import TEXT, random, tiny_unet
from torch import Tensor, nn

from minidiff.core.config import NoiseConfig
from minidiff.core.inject import inject, trainable
from minidiff.core.recipes import DiffusionLoss
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.text import TextEncoders
from minidiff.draw.speed import speed_up_network
from minidiff.files.text_files import build_text_encoder
from minidiff.trainer import memory
from minidiff.trainer.memory import MIB, Counter, step_bytes
from minidiff.trainer.optimizers import adamw
from minidiff.trainer.settings import FineTuneSettings
from minidiff.trainer.task import Job

PLAIN = FineTuneSettings()


def a_task(full: bool = False, **batch: Tensor) -> Job:
    """A tiny U-Net with a LoRA, or all of its weights, to train."""
    unet = tiny_unet()
    inject(unet, 2)
    speed_up_network(unet)
    if full:
        unet.requires_grad_(True)
    text_encoder = build_text_encoder({**TEXT, "hidden_size": 24, "bos_token_id": 38, "eos_token_id": 39}, "tiny")
    text_encoder.requires_grad_(False)
    given = {"latents": random(2, 4, 8, 8), "noise": random(2, 4, 8, 8), "t": torch.tensor([3, 900])}
    given |= {"text": random(2, 7, 24), **batch}
    networks = {"unet": unet, "text_encoder": text_encoder}
    loss = DiffusionLoss(unet, NoiseSchedule.from_config(NoiseConfig()), TextEncoders([text_encoder]))
    return Job(trainable(unet), lambda step, micro: given, loss=loss, export=None, modules=networks)  # type: ignore[arg-type]


def count(forward: Callable[[], object], weights: list[Tensor]) -> int:
    counter = Counter()
    counter.seen |= {id(w.untyped_storage()): w.untyped_storage() for w in weights}
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        forward()
    return counter.saved


def test_saved_bytes_by_hand() -> None:
    """SiLU saves its input; the second saves the first's output; a weight does not count, and a view counts once."""
    x, linear = torch.empty(3, 5, requires_grad=True), nn.Linear(5, 5)
    assert count(lambda: F.silu(F.silu(x)), []) == 2 * 15 * 4
    assert count(lambda: linear(x), [*linear.parameters()]) == 15 * 4
    assert count(lambda: x * x.view(3, 5), []) == 15 * 4
    linear.requires_grad_(False)
    assert count(lambda: linear(x), [*linear.parameters()]) == 0


def test_the_table_before_a_run() -> None:
    task = a_task()
    unet = task.modules["unet"]
    need = memory.budget(task, PLAIN)
    weights = {name: sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) for name, m in task.modules.items()}
    trained = 4 * sum(p.numel() for p in task.trainable.values())
    batch = task.batch(0, 0)
    saved = saved_bytes(lambda: unet(batch["latents"], batch["t"], batch["text"]), unet.parameters())["bytes"]
    assert step_bytes(task, PLAIN)[0] == saved  # on meta as in memory
    assert need.held == {**weights, "optimizer": 2 * trained}
    assert need.moments["training step"] > saved + trained
    assert need.together == sum(need.held.values()) + max(need.moments.values()) + need.allowance
    assert f"{need.together / MIB:,.1f} MiB" in str(need).splitlines()[-1]
    assert all(p.device.type == "cpu" for p in unet.parameters())


@pytest.mark.parametrize(
    "changes, row",
    [
        ({"use_8bit_adam": True}, "optimizer"),
        ({"use_ema": True}, "averaged weights"),
        ({"gradient_checkpointing": True}, "training step"),
        ({"optimizer_in_backward": True}, "training step"),
    ],
)
def test_each_saving_makes_its_row_smaller(changes: dict[str, Any], row: str) -> None:
    """And an average makes a row."""
    task = a_task(full=True)
    before, after = (
        need.held | need.moments
        for need in (memory.budget(task, PLAIN), memory.budget(task, replace(PLAIN, **changes)))
    )
    assert (row not in before and after[row] > 0) if row == "averaged weights" else after[row] < before[row]


def test_gradients_that_wait_and_that_do_not() -> None:
    """With the optimizer in the backward pass each goes at once: then there is one gradient, else there are all."""
    task = a_task(full=True)
    sizes = [4 * p.numel() for p in task.trainable.values()]
    plain, early = (step_bytes(task, replace(PLAIN, optimizer_in_backward=on))[1] for on in (False, True))
    assert plain > step_bytes(task, PLAIN)[0] + sum(sizes) and plain - early == sum(sizes) - max(sizes)


def test_autocast_keeps_copies_of_weights() -> None:
    """In bf16 saved tensors are half as large, but trained fp32 weights have a copy in bf16."""
    task = a_task(full=True)
    copies = 2 * sum(p.numel() for name, p in task.modules["unet"].named_parameters() if name.endswith("weight"))
    half = replace(PLAIN, mixed_precision="bf16")
    assert step_bytes(task, half)[0] > step_bytes(task, PLAIN)[0] / 2 + copies / 2


def test_the_optimizers_bytes_are_those_it_has() -> None:
    for eight_bit in (False, True):
        settings = replace(PLAIN, use_8bit_adam=eight_bit, optimizer_in_backward=True)
        parameters = [nn.Parameter(torch.zeros(n)) for n in (300, 4096, 5000)]
        optimizer = adamw(parameters, settings)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        there = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
        assert memory.optimizer_bytes([p.numel() for p in parameters], settings) == there


def test_a_text_encoder_in_training_saves_tensors_too() -> None:
    task = a_task(ids=torch.randint(0, 38, (2, 7), generator=torch.Generator().manual_seed(0)))
    del (batch := task.batch(0, 0))["text"]
    frozen = step_bytes(task, PLAIN)[0]
    task.modules["text_encoder"].requires_grad_(True)
    assert batch.keys() == {"latents", "noise", "t", "ids"} and step_bytes(task, PLAIN)[0] > frozen
