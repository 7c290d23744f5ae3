"""Looking inside the U-Net while it draws: a filmstrip of one picture, and maps of where it looks for each word.

    with Film(pipe) as film, AttentionMaps(pipe) as maps:
        picture = pipe(prompt, seed=0, callback=film).images[0]
    strip = filmstrip(film, prompt)
    sheet = attention_sheet(picture, maps.mean(), words_of(pipe.tokenizer, prompt, pipe.placeholders))

A filmstrip shows the latents that the network sees at some of the steps, and the picture that it expects.

In cross-attention each place of the picture asks (q), each token of the prompt answers (k), and softmax(q kᵀ / √D) says how
much of its attention a place gives to which token. Averaged over heads, layers and steps, and laid over the picture, that is
DAAM ("What the DAAM", arXiv 2210.04885, section 3). Only the half with the prompt counts, not the empty one of guidance.

C H W one latent   N heads   L h·w places   S tokens   D width of one head
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.core.attention import CrossAttention, SpatialTransformer
from minidiff.core.errors import SettingsError
from minidiff.core.grids import Step
from minidiff.core.ip_adapter import ImageAttention
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.text import LENGTH, token_ids
from minidiff.draw.images import contact_sheet, to_pil
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.prompting import chunked, parse_prompt
from minidiff.studio.sheet import gallery

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Size = tuple[int, int]  # height and width, in cells
Word = tuple[str, list[int]]  # a word of the prompt, and where its tokens stand among the S


class Watcher(ABC):
    """Sees the U-Net while it draws. Use it in a `with`: its hooks are removed at the end."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.pipe = pipe

    @abstractmethod
    def hooks(self) -> Iterable[RemovableHandle]:
        """Hang the hooks on the U-Net. `Watcher` removes them."""

    def __enter__(self) -> Self:
        if self.pipe.tile_size:
            raise SettingsError("tile_size shows the U-Net only parts of the picture; leave it out to look inside.")
        if self.pipe.unet._compiled_call_impl is not None:
            raise SettingsError("a compiled U-Net hides its layers; leave --compile out to look inside.")
        self._hooks = list(self.hooks())
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


# --- the filmstrip -----------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One call of the network: t, the noisy latents that went in, and the clean ones as the network sees them (1, C, H, W)."""

    t: float
    seen: Tensor
    x0: Tensor


class Film(Watcher):
    """The pipeline's callback: one `Frame` a step."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        super().__init__(pipe)
        self.frames = list[Frame]()

    def hooks(self) -> Iterable[RemovableHandle]:
        yield self.pipe.unet.register_forward_pre_hook(self._look)

    def _look(self, unet: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._input = inputs[0][:1]  # of the first picture; with guidance both halves hold the same latents

    def __call__(self, step: Step) -> None:
        x0 = step.x0[:1].float().cpu()
        seen = self._input[:, : x0.shape[1]]  # a U-Net for inpainting is given the mask as well, behind the latents
        self.frames.append(Frame(step.t, seen.float().cpu(), x0))


def filmstrip(film: Film, title: str = "", count: int = 8, tile: int = 192) -> Image.Image:
    """`count` of the frames as a strip, the first and the last among them: t and the noise above, two pictures below.

    The noise is √(1 - ā_t), its share in x_t = √ā_t x_0 + √(1 - ā_t) ε (DDPM, arXiv 2006.11239, eq. 4): 1 is noise alone.
    """
    if count < 1 or not film.frames:
        raise SettingsError(f"a strip of {count} out of {len(film.frames)} steps; draw with callback=film, and show 1 or more.")
    chosen = torch.linspace(0, len(film.frames) - 1, min(count, len(film.frames))).round().int().tolist()
    frames = [film.frames[i] for i in chosen]
    rows = [to_pil(film.pipe.decode(torch.cat(latents))) for latents in ([f.seen for f in frames], [f.x0 for f in frames])]
    labels = [f"t {frame.t:.0f}, noise {noise_share(film.pipe.schedule, frame.t):.2f}" for frame in frames]
    return contact_sheet(rows, ["what the network sees", "what it believes"], labels, title, tile)


def noise_share(schedule: NoiseSchedule, t: float) -> float:
    """√(1 - ā_t); between two timesteps, on the line between their ā."""
    a_bar = schedule.alphas_cumprod.double().numpy()
    return math.sqrt(1 - np.interp(t, range(len(a_bar)), a_bar))  # DDPM eq. 4


# --- maps of attention -------------------------------------------------------------------------------------------------


class AttentionMaps(Watcher):
    """Watches every cross-attention.

    It computes the attention again with the layers' own projections, so that adapters count. Of a batch it keeps the last
    picture: with guidance the half with the prompt comes last.
    """

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        super().__init__(pipe)
        self.sums: dict[Size, Tensor] = {}  # (S, h, w), fp32 on the CPU
        self.count = 0  # layers times steps
        self._size: Size = (0, 0)  # of the feature map whose transformer runs now

    def hooks(self) -> Iterable[RemovableHandle]:
        for name, module in self.pipe.unet.named_modules():
            if isinstance(module, SpatialTransformer):
                yield module.register_forward_pre_hook(self._measure)
            elif name.endswith("attn2"):
                yield module.register_forward_hook(self._look)

    def _measure(self, transformer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._size = tuple(inputs[0].shape[-2:])

    @torch.no_grad()
    def _look(self, layer: CrossAttention, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Recompute the attention of one layer: fused kernels do not return its weights."""
        x, text = (tensor[-1:] for tensor in inputs)  # (1, L, C), (1, S, D_text)
        if isinstance(layer, ImageAttention):
            text = text[:, : text.shape[1] - layer.image[0].count]
        q, k = layer.split_heads(layer.to_q(x)).float(), layer.split_heads(layer.to_k(text)).float()
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # 1706.03762 eq. 1: (1, N, L, S)
        total = weights.mean(dim=(0, 1)).T.unflatten(-1, self._size).cpu()  # (S, h, w)
        self.sums[self._size] = self.sums.get(self._size, 0) + total
        self.count += 1

    def mean(self) -> Tensor:
        """(S, h, w): how much of its attention each place gives to each token, over layers, heads and steps; 1 in all.

        Smaller maps are scaled to the size of the largest (DAAM, eq. 5).
        """
        sums = [F.interpolate(total[None], size=max(self.sums), mode="bilinear") for total in self.sums.values()]
        return torch.cat(sums).sum(dim=0) / self.count  # bilinear: no share below 0


def words_of(tokenizer: "CLIPTokenizer", prompt: str, placeholders: Mapping[str, Sequence[int]] = {}) -> list[Word]:
    """The words of a prompt, between spaces, each with all of its tokens; without the weights and marks of the language."""
    parsed = parse_prompt(prompt)
    chunks = chunked(tokenizer, parsed, placeholders)
    free = [LENGTH * i + 1 + j for i, chunk in enumerate(chunks) for j in range(len(chunk))]  # each starts with a mark
    words: list[Word] = []
    for text in (word for section in parsed.sections for part in section for word in part.text.split()):
        count = len(token_ids(tokenizer, text, placeholders))
        if name := re.sub(r"^[^\w<]+|[^\w>]+$", "", text):
            words.append((name, free[:count]))
        free = free[count:]
    return words


def attention_sheet(picture: Image.Image, maps: Tensor, words: Sequence[Word], title: str = "", tile: int = 192) -> Image.Image:
    """The picture, and a tile for each word: bright where the picture looks at it. `maps` (S, h, w) from `AttentionMaps.mean`.

    Each word is scaled to its own brightest place: words differ in how much attention they get; the question here is where.
    """
    if not words:
        raise SettingsError("the prompt has no words, so there is nothing to look at.")
    tiles = [over(picture, maps[positions].sum(dim=0)) for _, positions in words]  # the share of its tokens together
    return gallery([picture, *tiles], ["the picture", *(text for text, _ in words)], title, tile)


def over(picture: Image.Image, heat: Tensor) -> Image.Image:
    """A heat map (h, w) laid over a picture in gray."""
    import matplotlib  # only now: it takes time to import

    scaled = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    size = (picture.height, picture.width)
    smooth = F.interpolate(scaled[None, None], size=size, mode="bicubic")[0, 0].clamp(0, 1).numpy()
    glow, gray = 255 * matplotlib.colormaps["inferno"](smooth)[..., :3], np.asarray(picture.convert("L"))[..., None]
    return Image.fromarray((0.7 * glow + 0.3 * gray).round().astype(np.uint8))
