"""What stands around the training loop: checks before it, signals during it."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minidiff.core.errors import SettingsError
from minidiff.trainer.settings import TrainSettings


def check_trainable(trainable: Mapping[str, nn.Parameter], settings: TrainSettings) -> str:
    """What is trained is fp32 (fp16 steps below 2^-11 of a weight would be lost); the device type it is on."""
    wrong = [name for name, p in trainable.items() if p.dtype != torch.float32 or not p.requires_grad]
    if wrong or not trainable:
        raise RuntimeError(f"a task trains fp32 parameters that require gradients; not so: {wrong[:5] or 'none'}")
    device = next(iter(trainable.values())).device.type
    check_precision(settings.mixed_precision, device)
    return device


def check_precision(precision: str, device: str) -> None:
    """SettingsError where the device cannot train in that --mixed_precision."""
    if precision == "fp16" and device == "cpu":
        raise SettingsError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    if precision == "bf16" and device != "cpu" and not torch.cuda.is_bf16_supported():
        raise SettingsError("--mixed_precision bf16 is more than this GPU can do; use fp16.")


def check_gradients(trainable: Mapping[str, nn.Parameter]) -> None:
    """After the first backward pass: a tensor that gets no gradient would silently stay what it is."""
    without = [name for name, p in trainable.items() if p.grad is None]
    if without:
        raise RuntimeError(f"{len(without)} of {len(trainable)} trainable tensors got no gradient: {without[:5]}")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM asks to stop after the step at hand; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nStopping after this step; the state will be saved.\n")  # print is not safe in a handler

    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread only
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """The same bits each time: torch's own random state is ours inside, and on a GPU only kernels that repeat themselves run.

    (Those of the CPU do so anyway.) Afterwards all is as it was. If cuBLAS was in use before `chosen_device` could set it up,
    PyTorch only warns, and its attention takes kernels that do not quite repeat themselves.
    """
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    memory: Any = torch.utils.deterministic
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    if gpus:
        torch.use_deterministic_algorithms(True, warn_only="CUBLAS_WORKSPACE_CONFIG" not in os.environ)
        memory.fill_uninitialized_memory = False  # writing zeros first is slow, and only hides bugs
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled
