"""The autoencoder between pictures and latents: stage one of latent diffusion (arXiv 2112.10752, section 3.1).

B batch   C channels   H W picture height and width   h w = H/8, W/8 latent height and width (four levels)
"""

import torch
from torch import Tensor, nn

from minidiff.core.attention import SpatialAttention
from minidiff.core.blocks import Downsample, NormSiLU, ResBlock, Upsample
from minidiff.core.config import VAEConfig

EPS = 1e-6  # every norm of the VAE


class Level(nn.Sequential):
    """ResBlocks at one resolution, then a step down or up, one after the other. The last level has no step."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, step: str | None) -> None:
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.resnets = nn.Sequential(*(ResBlock(a, b, None, groups, EPS) for a, b in zip(widths, widths[1:])))
        if step == "down":
            self.downsamplers = nn.Sequential(Downsample(c_out, pad_all_around=False))
        if step == "up":
            self.upsamplers = nn.Sequential(Upsample(c_out))


def levels(widths: tuple[int, ...], layers: int, groups: int, step: str) -> nn.Sequential:
    """A Level for each width, with a step down or up between two levels."""
    ins, steps = (widths[0], *widths[:-1]), [step] * (len(widths) - 1) + [None]
    return nn.Sequential(*(Level(c_in, c_out, layers, groups, step) for c_in, c_out, step in zip(ins, widths, steps)))


class MidBlock(nn.Module):
    """At the smallest resolution: ResBlock, attention over all cells, ResBlock."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])
        self.resnets = nn.ModuleList(ResBlock(channels, channels, None, groups, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 8, h, w): four channels of mean and four of log-variance, before `quant_conv` mixes all eight."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = levels(widths, config.layers_per_block, groups, "down")
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = NormSiLU(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """(B, 4, h, w) -> (B, 3, H, W): the encoder's mirror image, with one more ResBlock a level."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = levels(widths, config.layers_per_block + 1, groups, "up")
        self.mid_block = MidBlock(widths[0], groups)
        self.conv_norm_out = NormSiLU(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.up_blocks(self.mid_block(self.conv_in(z)))
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """A variational autoencoder (arXiv 1312.6114), trained with a very small weight on its KL term."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Picture (B, 3, H, W) in [-1, 1] -> mean and log-variance of the latent, each (B, 4, h, w), not yet scaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, 4, h, w), divided by `scaling_factor` -> picture (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = μ + σ ⊙ ε: Auto-Encoding Variational Bayes (arXiv 1312.6114), eq. 10, with σ = exp(½ log σ²)."""
    return mean + torch.exp(0.5 * logvar) * noise
