"""ControlNet: a picture as condition (arXiv 2302.05543, section 3).

A copy of the U-Net's way down also sees a hint: edges, a depth map, a small picture. Its features are added to the skips and
to the bottom of the U-Net. The U-Net is frozen.

    hint picture -> hint encoder --\
    latents -> conv_in ----------- + -> down 0 .. 3 -> mid      the copy
                                   |       |            |
                                     zero convolutions          1x1, and 0 before training
                                   |       |            |
    latents -> conv_in ----------- + ->    +     ->     +       the U-Net: its skips and its bottom

All connections begin with the weights 0, so before training the U-Net's output is the same to the bit. They learn nevertheless:
the gradient of W in y = W x is dy x^T, and x is not 0. In the first update only they get a gradient; in the second one the copy
and the last layer of the hint encoder, which begins with 0, too; from the third one on, everything.

    B batch   H W height and width of a picture   h w = H/8, W/8   C channels of the U-Net's first level
"""

from dataclasses import asdict

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.core.config import ControlNetConfig
from minidiff.core.unet import Encoder, UNet2DConditionModel


class HintEncoder(nn.Module):
    """3x3 convolutions, three of which halve the sides: then a hint has as many cells as a latent."""

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
    """From latents and a hint, it computes what is added to the skips and the bottom of a U-Net."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = HintEncoder(config)
        self.controlnet_down_blocks = nn.ModuleList(zeros(nn.Conv2d(width, width, 1)) for width in self.skip_widths)
        self.controlnet_mid_block = zeros(nn.Conv2d(self.skip_widths[-1], self.skip_widths[-1], 1))

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, widths: tuple[int, ...] = (16, 32, 96, 256)) -> "ControlNetModel":
        """A ControlNet to be trained: a copy of the U-Net's way down, a new hint encoder of these widths, connections of 0."""
        net = cls(ControlNetConfig(**asdict(unet.config), conditioning_embedding_out_channels=widths))
        net.load_state_dict(unet.state_dict(), strict=False)  # the way down; not the way up, which the net does not have
        return net

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Hint pictures (B, 3, H, W) in [0, 1] -> (B, C, h, w). They do not depend on t, so once for all steps is enough."""
        bgr = self.config.controlnet_conditioning_channel_order == "bgr"
        return self.controlnet_cond_embedding(hint.flip(1) if bgr else hint)

    def forward(self, x: Tensor, t: Tensor, *text: Tensor, hint: Tensor, scale: float = 1, guess: bool = False) -> list[Tensor]:
        """The U-Net's inputs and an encoded hint (B, C, h, w) -> the U-Net's `control`, times `scale`.

        `guess` is the authors' "guess mode": from the first skip to the bottom, weights rise from 0.1 to 1.
        """
        time = self.embed_time(t, text[1] if len(text) > 1 else None, x)
        features = self.encode(self.conv_in(x) + hint, time, text[0])
        connections = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        control = [conv(h) for conv, h in zip(connections, features, strict=True)]
        if self.config.global_pool_conditions:
            return [scale * h.mean((2, 3), keepdim=True) for h in control]
        return [scale * (10 ** (k / (len(control) - 1) - 1) if guess else 1) * h for k, h in enumerate(control)]


def zeros(conv: nn.Conv2d) -> nn.Conv2d:
    """A "zero convolution": all its weights are 0 (arXiv 2302.05543, section 3.1)."""
    for weights in conv.parameters():
        nn.init.zeros_(weights)
    return conv
