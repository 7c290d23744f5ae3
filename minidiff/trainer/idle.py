"""Networks that have done their part: they leave the GPU, or the memory, and come back where somebody draws.

Once pictures and prompts are encoded, a training step runs through neither the VAE nor a text encoder that is not trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def put_away(networks: Sequence[nn.Module], needed_again: bool) -> None:
    """Into the CPU's memory, where they can wait; or out of any: on `meta` they keep their shapes, and no numbers."""
    for network in networks:
        network.to("cpu" if needed_again else "meta")


@contextmanager
def at_hand(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the `with`, the networks are on the device; afterwards they wait again."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        put_away(networks, needed_again=True)
