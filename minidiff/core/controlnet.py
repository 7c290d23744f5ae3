"""ControlNet: a picture as condition (arXiv 2302.05543, section 3).

A copy of the U-Net's way down also sees a hint: edges, a depth map, a small picture. What it finds is added to what the way
down of the U-Net hands over. The U-Net stays as it is.

    hint picture -> hint encoder --\
    latents -> conv_in ----------- + -> down 0 .. 3 -> mid      the copy
                                   |       |            |
                                     zero convolutions          1x1, and 0 before training
                                   |       |            |
    latents -> conv_in ----------- + ->    +     ->     +       the U-Net: its skips and its bottom

All connections begin with the weights 0, so at birth the U-Net's output is the same to the bit. They learn nevertheless: the
gradient of W in W x is dy x^T, and x is not 0. In the first update only they get a gradient; in the second one the copy and
the last layer of the hint encoder, which is 0 too; from the third one on, everything.

    B batch   H W picture height and width   h w = H/8, W/8   C channels of the U-Net's first level   S D as in unet.py
"""

from dataclasses import asdict

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.core.config import ControlNetConfig
from minidiff.core.unet import Encoder, UNet2DConditionModel


class HintEncoder(nn.Module):
    """3x3 convolutions, three of which halve the side: as many cells as a latent has."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in zip(widths, widths[1:]):
            self.blocks += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, wider, 3, padding=1, stride=2)]
        self.conv_out = zeros(nn.Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        x = F.silu(self.conv_in(hint))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNetModel(Encoder):
    """For latents and a hint it finds what is to be added to the skips and the bottom of a U-Net."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = HintEncoder(config)
        self.controlnet_down_blocks = nn.ModuleList(zeros(nn.Conv2d(width, width, 1)) for width in self.skip_widths)
        self.controlnet_mid_block = zeros(nn.Conv2d(self.skip_widths[-1], self.skip_widths[-1], 1))

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, widths: tuple[int, ...] = (16, 32, 96, 256)) -> "ControlNetModel":
        """A ControlNet to be trained: the U-Net's way down, a new hint encoder of these widths, and connections of 0."""
        net = cls(ControlNetConfig(**asdict(unet.config), conditioning_embedding_out_channels=widths))
        net.load_state_dict(unet.state_dict(), strict=False)
        return net

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Hint pictures (B, 3, H, W) in [0, 1] -> (B, C, h, w). It does not depend on t: once for a picture is enough."""
        bgr = self.config.controlnet_conditioning_channel_order == "bgr"
        return self.controlnet_cond_embedding(hint.flip(1) if bgr else hint)

    def forward(self, x: Tensor, t: Tensor, *text: Tensor, hint: Tensor, scale: float = 1, guess: bool = False) -> list[Tensor]:
        """The U-Net's inputs, an encoded hint (B, C, h, w) -> `control` of the U-Net's call, times `scale`.

        `guess`, "guess mode": the shallow levels, whose structure is fine, weigh less.
        """
        time = self.embed_time(t, text[1] if len(text) > 1 else None, x)
        found = self.encode(self.conv_in(x) + hint, time, text[0])
        found = [conv(h) for conv, h in zip([*self.controlnet_down_blocks, self.controlnet_mid_block], found, strict=True)]
        if self.config.global_pool_conditions:
            return [scale * h.mean((2, 3), keepdim=True) for h in found]
        return [scale * (10 ** (k / (len(found) - 1) - 1) if guess else 1) * h for k, h in enumerate(found)]


def zeros(conv: nn.Conv2d) -> nn.Conv2d:
    """A "zero convolution", in which all weights are 0: 2302.05543, section 3.1."""
    for weights in conv.parameters():
        nn.init.zeros_(weights)
    return conv
