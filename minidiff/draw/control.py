"""ControlNets in drawing: their hints, how much and when each of them acts, and the U-Net with what they add.

An encoded hint is as large as the latents. It travels behind them, as more channels, so that tiles cut both alike:

    x (B, C, h, w) --with_hints--> (B, C + C' n, h, w) --tiles--> (B, C + C' n, tile, tile) --with_control--> the U-Net

B pictures, 2B with guidance   C channels of a latent   C' of an encoded hint   n nets   H W a picture   h w a latent
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from minidiff.core.config import UNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.errors import SettingsError
from minidiff.core.guidance import UNetCall
from minidiff.draw.canvas import as_picture
from minidiff.files.looks import FAMILIES

Numbers = float | Sequence[float]
SAME = ("cross_attention_dim", "block_out_channels", "down_block_types", "layers_per_block")


@dataclass
class Control:
    """The ControlNets of one call."""

    nets: Sequence[ControlNetModel]
    pictures: list[list[Tensor]]  # for each net: one hint, or one for each picture that is drawn
    scales: Sequence[float]
    starts: Sequence[float]
    ends: Sequence[float]
    guess: bool
    tokens: int  # of the text; what an IP-Adapter puts behind them is not for the nets
    hints: list[Tensor] = field(default_factory=list)  # encoded, (B, C', h, w)
    calls: int = 1  # of the U-Net in all
    call: int = 0  # the number of the present call

    def with_hints(self, unet: UNetCall, count: int, height: int, width: int) -> UNetCall:
        """The outer side: what the sampler calls, once for each step. `count` pictures of this size share the encoded hints."""
        for net, pictures in zip(self.nets, self.pictures):
            if len(pictures) not in (1, count):
                raise SettingsError(f"{len(pictures)} hints (control_image) for {count} pictures; give one, or one for each.")
            hint = torch.cat([scaled(picture, height, width) for picture in pictures]).to(net.conv_in.weight)
            self.hints.append(net.encode_hint(hint).expand(count, -1, -1, -1))

        def call(x: Tensor, *inputs: Tensor) -> Tensor:
            hints = [hint.to(x).repeat(len(x) // len(hint), 1, 1, 1) for hint in self.hints]
            output = unet(torch.cat([x, *hints], dim=1), *inputs)
            self.call += 1
            return output

        return call

    def with_control(self, unet: UNetCall) -> UNetCall:
        """The inner side: it finds the hints behind the latents, and calls the U-Net with what the nets add."""

        def call(x: Tensor, *inputs: Tensor) -> Tensor:
            widths = [hint.shape[1] for hint in self.hints]
            x, *hints = x.split([x.shape[1] - sum(widths), *widths], dim=1)
            rows = zip(self.nets, self.scales, self.starts, self.ends, hints)
            now, then = self.call / self.calls, (self.call + 1) / self.calls  # shares of the way: before this call, behind it
            found = [
                self.ask(net, scale, hint, x, *inputs)
                for net, scale, start, end, hint in rows
                if scale and start <= now and then <= end
            ]
            return unet(x, *inputs, control=[sum(parts) for parts in zip(*found)]) if found else unet(x, *inputs)

        return call

    def ask(self, net: ControlNetModel, scale: float, hint: Tensor, x: Tensor, *inputs: Tensor) -> list[Tensor]:
        """One net's part of `control`. In guess mode, it sees and changes only the half with the prompt."""
        guided, weight = len(x) > len(self.hints[0]), net.conv_in.weight  # 2B, of which the first half is without the prompt
        half = len(x) // 2 if guided and (self.guess or net.config.global_pool_conditions) else 0
        t, states, *rest = (part[half:] if half else part for part in (*inputs, hint, x[:, : weight.shape[1]]))
        states = states[:, : self.tokens] if states.shape[1] > self.tokens else states  # the same object: fast/frozen.py
        states, *vector, hint, seen = (part.to(weight.dtype) for part in (states, *rest))
        found = [h.to(x.dtype) for h in net(seen, t, states, *vector, hint=hint, scale=scale, guess=self.guess)]
        return [torch.cat([torch.zeros_like(h), h]) for h in found] if half else found


def control_of(
    nets: Sequence[ControlNetModel], unet: UNetConfig, image: Any, scale: Any, start: Any, end: Any, guess: bool, tokens: int,
) -> Control:  # fmt: skip
    """The arguments of a call, checked. With several nets, `image`, `scale`, `start` and `end` are lists, or one for all."""
    if not nets:
        given = "guess_mode" if image is None else "control_image"
        raise SettingsError(f"{given} was given and there is no ControlNet: pipe.controlnet, or --controlnet.")
    if image is None:
        raise SettingsError("guess_mode was given and there is no control_image that the picture could follow.")
    check_family(nets, unet)
    each = {"control_image": image, "controlnet_conditioning_scale": scale,
            "control_guidance_start": start, "control_guidance_end": end}  # fmt: skip
    lists = [isinstance(given, (list, tuple)) and (len(nets) > 1 or given is not image) for given in each.values()]
    rows = [list(given) if several else [given] * len(nets) for several, given in zip(lists, each.values())]
    if odd := next((name for name, row in zip(each, rows) if len(row) != len(nets)), None):
        raise SettingsError(f"{len(each[odd])} in {odd} for {len(nets)} ControlNets; give one for each.")
    if late := next(((first, last) for first, last in zip(*rows[2:]) if not 0 <= first < last <= 1), None):
        what = "control_guidance_start is {:g} and control_guidance_end {:g}; both are shares of the way, the start comes first"
        raise SettingsError(what.format(*late) + ".")
    return Control(nets, [pictures_of(one) for one in rows[0]], rows[1], rows[2], rows[3], guess, tokens)


def check_family(nets: Sequence[ControlNetModel], unet: UNetConfig) -> None:
    """SettingsError for a ControlNet of another family than the model's."""
    for wrong, net in ((name, net.config) for net in nets for name in SAME if getattr(net.config, name) != getattr(unet, name)):
        ours, theirs = (FAMILIES.get(config.cross_attention_dim, "another kind") for config in (unet, net))
        values = f"{wrong} is {getattr(net, wrong)}, not {getattr(unet, wrong)}"
        raise SettingsError(f"the ControlNet is for {theirs} and the model is {ours}: {values}. Take the one for this model.")


def pictures_of(image: Any) -> list[Tensor]:
    """Hints (3, H, W): pictures as uint8; or numbers of the caller's, which are not changed and may lie in [-1, 1]."""
    found: list[Tensor] = []
    for one in image if isinstance(image, (list, tuple)) else [image]:
        if not isinstance(one, Tensor):
            if (mode := getattr(one, "mode", "RGB")) != "RGB":
                warnings.warn(f"control_image: a picture of mode {mode} becomes RGB.", stacklevel=2)
            one = ((as_picture(one, "control_image") + 1) * 127.5).round().byte()
        elif one.ndim not in (3, 4) or one.shape[-3] != 3 or not one.abs().max() <= 1.001:  # or NaN
            raise SettingsError("control_image must be a picture, a path, or a tensor (3, H, W) with numbers in [0, 1].")
        found += one.reshape(-1, *one.shape[-3:])
    return found


def scaled(picture: Tensor, height: int, width: int) -> Tensor:
    """A hint (3, H, W) as the net sees it, (1, 3, height, width): a picture in [0, 1]. Another size is scaled, or stretched."""
    from PIL import Image

    own = tuple(picture.shape[-2:])
    if own != (height, width):
        warnings.warn(f"control_image of {own[1]} x {own[0]} pixels is scaled to {width} x {height}.", stacklevel=2)
    if picture.is_floating_point():
        return picture[None] if own == (height, width) else interpolate(picture[None], (height, width))
    image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
