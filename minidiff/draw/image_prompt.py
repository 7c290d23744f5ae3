"""Pictures as prompts: an IP-Adapter in a pipeline, and the image tower that looks at pictures for it.

B pictures that are drawn   M pictures that are shown   E P see core/ip_adapter.py   H W side of the tower's pictures
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from minidiff.core.errors import SettingsError, WeightsError
from minidiff.core.guidance import Text
from minidiff.core.ip_adapter import ImageProjection, IPAdapter
from minidiff.draw.canvas import as_pictures
from minidiff.files.ip_adapter_file import Pixels

if TYPE_CHECKING:
    from PIL import Image
    from transformers import CLIPVisionModelWithProjection


@dataclass
class ImagePrompt:
    """An IP-Adapter and its image tower."""

    adapter: IPAdapter
    tower: "CLIPVisionModelWithProjection"
    pixels: Pixels

    def __post_init__(self) -> None:
        """WeightsError where the tower is another than the adapter's."""
        projection: Any = self.adapter.image_proj
        self.whole = isinstance(projection, ImageProjection)  # it reads the embedding of the whole picture, not the patches
        first = next(module for module in projection.modules() if isinstance(module, nn.Linear))
        gives = self.tower.config.projection_dim if self.whole else self.tower.config.hidden_size
        if first.in_features != gives:
            what = f"the IP-Adapter reads {first.in_features} numbers and the image tower gives {gives}"
            raise WeightsError(f"{what}; they do not belong together. Give the adapter's own --image_encoder.")

    def set_scale(self, scale: float | Sequence[float]) -> None:
        """How much the pictures count: one number, or one for each cross-attention in the order of the file."""
        layers = list(self.adapter.ip_adapter.values())
        scales = [scale] if isinstance(scale, int | float) else list(scale)
        if len(scales) not in (1, len(layers)) or not all(isinstance(one, int | float) and isfinite(one) for one in scales):
            raise SettingsError(f"ip_adapter_scale is {scales}; give one number, or {len(layers)}, one for each layer.")
        for layer, one in zip(layers, scales * (len(layers) // len(scales))):
            layer.scale = float(one)  # type: ignore[assignment]

    @torch.no_grad()
    def look(self, images: Any) -> tuple[Tensor, Tensor]:
        """The input of the adapter, for pictures that are shown side by side, and for none: each (1, M, E) or (1, M, P, E)."""
        x = torch.stack([as_input(image, *self.pixels) for image in as_list(images)]).to(self.tower.device, self.tower.dtype)
        if self.whole:
            e = self.tower(pixel_values=x).image_embeds
            return e[None], torch.zeros_like(e)[None]
        states = self.tower(pixel_values=torch.cat([x, torch.zeros_like(x)]), output_hidden_states=True).hidden_states[-2]
        return states[None, : len(x)], states[None, len(x) :]


def beside(encode: Callable[[Any], Text], prompt: ImagePrompt | None, images: Any, shown_with: Any) -> Callable[[Any], Text]:
    """Like `encode`, but it appends image tokens: of the pictures to the prompts `shown_with`, of no picture to others."""
    if prompt is None:
        raise SettingsError("ip_adapter_image is given, and no IP-Adapter is loaded that looks at it; load_ip_adapter first.")
    if images is None:
        raise SettingsError("an IP-Adapter is loaded, and there is no ip_adapter_image; give one, or unload_ip_adapter.")
    e, no_e = prompt.look(images)

    def encode_both(prompts: Any) -> Text:
        states, *more = encode(prompts)
        seen = (e if prompts is shown_with else no_e).to(states)
        return prompt.adapter(states, seen.expand(len(states), *seen.shape[1:])), *more

    return encode_both


def as_list(images: Any) -> Iterator["Image.Image"]:
    """Pictures of any type, in a list, or in lists within it, as RGB."""
    from minidiff.draw.images import to_pil

    for image in images if isinstance(images, list | tuple) else [images]:
        yield from as_list(image) if isinstance(image, list | tuple) else to_pil(as_pictures(image, 1))


def as_input(image: "Image.Image", side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(3, H, W), as CLIP's own program has it: the short edge scaled to `side`, the middle cut out, colours standardized."""
    from PIL import Image

    short = min(image.size)
    width, height = (int(side * edge / short) for edge in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    x = torch.from_numpy((np.asarray(scaled, np.float64) * (1 / 255)).astype(np.float32))  # (H, W, 3)
    return ((x - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
