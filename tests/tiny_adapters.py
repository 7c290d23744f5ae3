"""Small models to put adapters on, and what tests do with them."""

import hashlib

import torch
from tiny_sizes import TINY_UNET
from torch import Tensor, nn

from minidiff.core.inject import lora_layers
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files.text_files import build_text_encoder

EVERYWHERE = ("attention", "feed_forward", "projections", "resnets", "samplers")  # linear layers and all convolutions
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(TINY_UNET)


def tiny_text_encoder() -> nn.Module:
    torch.manual_seed(0)
    return build_text_encoder({**TEXT, "bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 39}, "tiny")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(unet: nn.Module) -> Tensor:
    """What the U-Net says to one fixed question."""
    with torch.no_grad():
        return unet(random(2, 4, 8, 8, seed=1), torch.tensor([3, 900]), random(2, 7, 24, seed=2))


def shake(model: nn.Module, adapter_name: str = "default", size: float = 0.1) -> None:
    """Numbers for every B and other lengths for every m, as training would give."""
    for i, layer in enumerate(lora_layers(model).values()):
        if adapter_name in layer.lora_B:
            layer.lora_B[adapter_name].data = size * random(*layer.lora_B[adapter_name].shape, seed=i)
        if adapter_name in layer.lora_magnitude:
            m = layer.lora_magnitude[adapter_name]
            m.data *= 1 + size * random(*m.shape, seed=-i - 1)


def digest(model: nn.Module) -> str:
    """A hash of every name and every bit."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
