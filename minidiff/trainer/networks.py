"""Networks at rest: those that no training step needs wait in the CPU's memory, and none has dropout while it draws."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.trainer.latents import LatentData


def offload(networks: Sequence[nn.Module], needed_again: bool) -> None:
    """Into the CPU's memory, where they can wait; or out of any: on `meta` they keep their shapes, and no numbers."""
    for network in networks:
        network.to("cpu" if needed_again else "meta")


@contextmanager
def on_device(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the `with`, the networks are on the device; afterwards in the CPU's memory again."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        offload(networks, needed_again=True)


def idle_networks(pipe: StableDiffusionPipeline, data: LatentData) -> list[nn.Module]:
    """Those that no training step runs through."""
    return [pipe.vae] * bool(data.cache) + [pipe.text_encoder] * (not data.live_text)


@contextmanager
def without_dropout(pipe: StableDiffusionPipeline) -> Iterator[None]:
    """Inside the `with`, the networks are as they are for drawing."""
    networks, training = (pipe.unet, pipe.text_encoder), pipe.unet.training  # both are trained, or none yet
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network in networks:
            network.train(training)
