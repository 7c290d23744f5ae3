"""The denoiser of SD 1.x, SD 2 and SDXL: a U-Net whose transformers read the prompt (arXiv 2112.10752, section 3.3).

    B batch   C C' channels   h w height and width: of the latents, then of each level   S text tokens   D text width
    T width of the time embedding   V width of SDXL's added vector

Attribute names are the keys of SD's files, so a checkpoint loads without a map of names.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minidiff.core.attention import SpatialTransformer
from minidiff.core.blocks import Downsample, NormSiLU, ResBlock, TimeEmbedding, Upsample, timestep_embedding
from minidiff.core.config import UNetConfig


def transformer(channels: int, config: UNetConfig, level: int) -> SpatialTransformer:
    """A transformer with the heads and the depth of a level."""
    settings = config.attention_head_dim, config.transformer_layers_per_block
    heads, depth = (setting if isinstance(setting, int) else setting[level] for setting in settings)
    groups, linear = config.norm_num_groups, config.use_linear_projection
    return SpatialTransformer(channels, config.cross_attention_dim, heads, groups, depth, linear)


class Level(nn.Module):
    """One resolution: ResBlocks from `ins` channels; if `attend`, a transformer after each; then a step down or up."""

    def __init__(self, ins: list[int], level: int, config: UNetConfig, time_width: int, attend: bool, step: str | None):
        super().__init__()
        groups, c_out = config.norm_num_groups, config.block_out_channels[level]
        if attend:
            self.attentions = nn.ModuleList(transformer(c_out, config, level) for _ in ins)
        self.resnets = nn.ModuleList(ResBlock(c_in, c_out, time_width, groups, config.norm_eps) for c_in in ins)
        if step == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out, pad_all_around=True)])
        if step == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def layer(self, i: int, time: Tensor, text: Tensor, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The i-th ResBlock and its transformer. On the way up they read x and a skip side by side: (B, C + C', h, w)."""
        x = self.resnets[i](x if skip is None else torch.cat([x, skip], dim=1), time)
        return self.attentions[i](x, text) if hasattr(self, "attentions") else x


class DownLevel(Level):
    """A level on the way down. It appends every intermediate result to `skips`, for the way up."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, time, text, x)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class UpLevel(Level):
    """A level on the way up. It takes the skips back, the last one first."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, time, text, x, skips.pop())
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, size=skips[-1].shape[-2:])  # an odd side was rounded up on the way down
        return x


class MidBlock(nn.Module):
    """At the bottom: ResBlock, transformer, ResBlock."""

    def __init__(self, channels: int, config: UNetConfig, time_width: int) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.attentions = nn.ModuleList([transformer(channels, config, level=-1)])
        self.resnets = nn.ModuleList(ResBlock(channels, channels, time_width, groups, eps) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        return self.resnets[1](self.attentions[0](x, text), time)


class Encoder(nn.Module):
    """The way down: time embedding, first convolution, levels, bottom. A ControlNet (controlnet.py) has it, too."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers, last = config.block_out_channels, config.layers_per_block, len(config.block_out_channels) - 1
        self.time_width = 4 * widths[0]
        self.time_embedding = TimeEmbedding(widths[0], self.time_width)
        vector_width = config.projection_class_embeddings_input_dim  # None: there is no vector
        self.add_embedding = TimeEmbedding(vector_width, self.time_width) if vector_width else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        self.skip_widths = [widths[0]]  # channels of each skip
        self.down_blocks = nn.ModuleList()
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types)):
            ins = [self.skip_widths[-1]] + [width] * (layers - 1)
            step = "down" if i < last else None
            self.down_blocks.append(DownLevel(ins, i, config, self.time_width, "CrossAttn" in kind, step))
            self.skip_widths += [width] * (layers + (step is not None))

        self.mid_block = MidBlock(widths[-1], config, self.time_width)

    def embed_time(self, t: Tensor | float, vector: Tensor | None, latents: Tensor) -> Tensor:
        """t (B,) or a number, and SDXL's vector (B, V) -> (B, T)."""
        t = torch.as_tensor(t, device=latents.device).expand(len(latents))
        time = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(latents.dtype))
        return time if self.add_embedding is None else time + self.add_embedding(vector)

    def encode(self, x: Tensor, time: Tensor, text: Tensor) -> list[Tensor]:
        """x (B, C, h, w), after conv_in -> the skips, of which x is the first; and behind them the output of the bottom."""
        skips = [x]
        for down in self.down_blocks:
            x = down(x, time, text, skips)
        return [*skips, self.mid_block(x, time, text)]


class UNet2DConditionModel(Encoder):
    """Predicts the noise (or the velocity) in a latent, given the timestep and the prompt.

    SD 1.5, with C = 320, 640, 1280, 1280:

        latent -> conv_in -> down 0 (320, 64²) -> down 1 (640, 32²) -> down 2 (1280, 16²) -> down 3 (1280, 8², no text)
                                 |                    |                     |                      |
                              12 skips            each one           handed straight            mid (8²)
                                 |                 across                   |                      |
        output <- conv_out <- up 3 (320, 64²) <- up 2 (640, 32²) <- up 1 (1280, 16²) <- up 0 (1280, 8², no text)

    SD 2 has more heads on the smaller levels. SDXL has three levels, and up to ten layers in one transformer.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, layers, last = config.block_out_channels, config.layers_per_block, len(config.block_out_channels) - 1
        skips, c = list(self.skip_widths), widths[-1]
        self.up_blocks = nn.ModuleList()
        for i, (width, kind) in enumerate(zip(widths[::-1], config.up_block_types)):
            ins = [before + skips.pop() for before in [c] + [width] * layers]  # one layer more than on the way down
            step = "up" if i < last else None
            self.up_blocks.append(UpLevel(ins, last - i, config, self.time_width, "CrossAttn" in kind, step))
            c = width

        self.conv_norm_out = NormSiLU(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self, latents: Tensor, t: Tensor | float, text: Tensor, vector: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """latents (B, 4, h, w), t (B,) or a number, text (B, S, D), in SDXL a vector (B, V) -> (B, 4, h, w).

        `control`: what a ControlNet adds to each skip and to the output of the bottom.
        """
        time = self.embed_time(t, vector, latents)
        features = self.encode(self.conv_in(latents), time, text)
        if control is not None:
            features = [own + added for own, added in zip(features, control, strict=True)]
        *skips, x = features
        for up in self.up_blocks:
            x = up(x, time, text, skips)
        return self.conv_out(self.conv_norm_out(x))
