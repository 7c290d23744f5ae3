"""Adapters of random numbers for the tiny model, for tests that need some."""

from collections.abc import Sequence

import torch
from torch import nn

from minidiff.core.inject import DEFAULT_TARGETS, adapter_weights, eject, inject, trainable
from minidiff.core.lora import LoRAWeights

EVERY = ("attention", "feed_forward", "projections", "resnets", "samplers")  # linear layers and convolutions


def random_adapter(
    models: dict[str, nn.Module], seed: int, rank: int = 2, alpha: float = 3, targets: Sequence[str] = DEFAULT_TARGETS
) -> dict[str, LoRAWeights]:
    """A changed adapter for each network, "unet" and "text_encoder"; the networks are left as they were."""
    found = {}
    for part, model in models.items():
        inject(model, rank, alpha, targets if part == "unet" else ("text", "text_mlp"), seed)
        for i, (name, p) in enumerate(trainable(model).items()):
            if ".lora_B." in name:
                p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + i))
        found |= {f"{part}.{name}": weights for name, weights in adapter_weights(model).items()}
        eject(model)
    return found
