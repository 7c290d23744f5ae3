"""Examples -> latents, noise, timesteps and text for the loop.

A sample is numbered through the whole run, and each thing drawn for it (which picture, flip, timestep, noise) is a
function of (seed, that number, purpose). So a resumed run sees what it would have seen, and batch 4 sees what four
batches of 1 see.

Shapes: B samples, 3 H W a picture in [-1, 1], C h w its latent, L tokens, D width of the text.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minidiff.core.errors import DataError
from minidiff.core.rng import generator, normal
from minidiff.core.vae import AutoencoderKL, sample_posterior
from minidiff.draw.images import load_image, to_tensor
from minidiff.draw.progress import progress
from minidiff.files.atomic import sha256
from minidiff.trainer.buckets import Size, bucketed_order, nearest_bucket
from minidiff.trainer.cache import Cache
from minidiff.trainer.dataset import Example
from minidiff.trainer.settings import FineTuneSettings

Place = tuple[float, float]  # of a crop, across and down: 0 is left or top, 1 right or bottom
MIDDLE: Place = (0.5, 0.5)

# --- pictures --------------------------------------------------------------------------------------------------------


def check_pictures(examples: list[Example], resolution: int, skip_bad: bool, buckets: Sequence[Size] = ()) -> list[Example]:
    """Decode every picture once. Broken ones, and those smaller than `resolution`, are all listed in one DataError.

    With `skip_bad` they are listed in a notice, and the others are returned. With `buckets`, each with its size.
    """
    good, bad = [], []
    for example in examples:
        try:
            size = check_picture(example, load_image(example.path), resolution, buckets)
            good.append(replace(example, size=size) if buckets else example)
        except DataError as error:
            bad.append(str(error))
    if bad:
        listed = "\n  ".join(bad[:10] + ["…"] * (len(bad) > 10))
        what = f"{len(bad)} of {len(examples)} pictures cannot be used:\n  {listed}"
        if not skip_bad or not good:
            skip = ", or leave them out with --skip_bad" if good else ""
            raise DataError(f"{what}\nMend or remove them{skip}; --resolution can be lowered.")
        print(f"Note: {what}", file=sys.stderr)
    return good


def check_picture(example: Example, image: Image.Image, resolution: int, buckets: Sequence[Size] = ()) -> Size:
    """The size at which an example's `image` is trained. DataError if it is too small, or if its mask does not fit."""
    size = nearest_bucket(image.size, buckets) if buckets else (resolution, resolution)
    if size is None:
        wide, high = image.size
        raise DataError(f"{example.path}: {wide} x {high} pixels fill no bucket of --resolution {resolution}.")
    small = min(image.size)
    if not buckets and small < resolution:
        raise DataError(f"{example.path}: its shorter side is {small} pixels, and --resolution is {resolution}.")
    if example.mask:
        mask = load_image(example.mask).convert("L")
        if mask.size != image.size:
            raise DataError(f"{example.mask} has another size than {example.path.name}: {mask.size}, not {image.size}.")
        if mask.getextrema() == (0, 0):
            raise DataError(f"{example.mask} is black all over: there is nothing to learn. White is what is learnt.")
    return size


def crop(image: Image.Image, size: Size, place: Place = MIDDLE, flip: bool = False) -> Tensor:
    """Shrink until the picture just covers `size`, crop the rest: (3, height, width) in [-1, 1].

    `place` says where along the longer side the crop lies.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale))
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round(place[0] * (width - size[0])), round(place[1] * (height - size[1]))
    x = to_tensor(image.crop((left, top, left + size[0], top + size[1])))
    return x.flip(-1) if flip else x


def fingerprint(examples: list[Example]) -> str:
    """A hash of all pictures' bytes, captions, masks and repeats, whatever folder they lie in."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(hashlib.sha256(example.path.read_bytes()).digest() + example.caption.encode() + b"\0")
        if example.mask:
            digest.update(b"mask" + hashlib.sha256(example.mask.read_bytes()).digest())
        if example.repeats > 1:
            digest.update(f"{example.repeats} times".encode())
    return digest.hexdigest()[:16]


# --- samples ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def order(count: int, seed: int, epoch: int) -> list[int]:
    """In which order an epoch goes through `count` pictures."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()


@dataclass(frozen=True)
class Draw:
    """The random choices of a sample, without its noise."""

    picture: int
    place: Place  # of the crop
    flip: bool
    t: Tensor  # (), a whole number
    prompt: str


class Encoded(NamedTuple):
    """A picture's latent, as the VAE gives it, and its mask."""

    mean: Tensor  # (C, h, w)
    logvar: Tensor  # (C, h, w)
    mask: Tensor | None  # (1, h, w), the share of each cell that is learnt; None: without --masked_loss

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


class LatentData:
    """The data of every latent diffusion recipe: `batch(step, micro)` gives latents, noise, timesteps and text.

    Prompts are encoded once. Pictures too, to the mean and log-variance of their latents (`cache_latents`); a latent
    is drawn from these anew each time. With `random_flip` the mirror images are encoded as well. What lies in `cache_dir`
    from an earlier run is not encoded again.

    `encode_prompts` gives (B, L, D), which a batch holds as "text"; or whole numbers (B, L), token ids for a text encoder
    that is trained itself, which it holds as "ids". Where there are `templates`, one is drawn for each sample, and its
    {} is the caption.
    """

    def __init__(
        self,
        examples: list[Example],
        settings: FineTuneSettings,
        resolution: int,
        vae: AutoencoderKL,
        encode_prompts: Callable[[list[str]], Tensor],
        timesteps: int,
        templates: Sequence[str] = ("{}",),
    ) -> None:
        self.examples, self.settings, self.resolution = examples, settings, resolution
        self.vae, self.timesteps, self.templates = vae, timesteps, templates
        self.turns = [i for i, e in enumerate(examples) for _ in range(e.repeats)]  # an epoch, in no order yet
        self.sizes = tuple(self._size(i) for i in self.turns)
        prompts = [template.replace("{}", e.caption) for e in examples for template in templates]
        self.prompts = _each_encoded([*prompts, ""], encode_prompts)
        self.live_text = not self.prompts[""].is_floating_point()  # token ids: the text encoder is trained itself
        self.cache: dict[tuple[int, bool], Encoded] = {}
        self.disk = Cache(settings.cache_dir, vae) if settings.cache_dir else None
        self.used_vae = False
        if settings.cache_latents:
            for i in progress(range(len(examples)), "picture", "encoding pictures", show=True):
                for flip in (False, True) if settings.random_flip else (False,):
                    self.cache[i, flip] = self._kept(i, flip)
        if self.disk:
            there = len(self.cache) - self.disk.made
            print(f"{settings.cache_dir}: {there} of {len(self.cache)} latents were there already.")
        self.samples_per_epoch = len(self._order(0))  # with repeats, and with what fills the last batches of buckets

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the data. A resumed run must have the same."""
        return {"pictures": len(self.examples), "data": fingerprint(self.examples), "side": self.resolution}

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """latents (B, C, h, w), scaled; noise, of that shape; t (B,), whole numbers; text (B, L, D). All on the CPU.

        Instead of text perhaps ids (B, L); with --masked_loss also mask (B, 1, h, w).
        """
        samples = [self.sample(number) for number in self.numbers(step, micro)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def numbers(self, step: int, micro: int) -> range:
        """Which samples of the run a batch holds."""
        s = self.settings
        first = (step * s.gradient_accumulation_steps + micro) * s.train_batch_size
        return range(first, first + s.train_batch_size)

    def describe(self, step: int, micro: int) -> str:
        """The pictures in a batch, for messages."""
        return ", ".join(self.examples[self.draw(number).picture].path.name for number in self.numbers(step, micro))

    def draw(self, number: int) -> Draw:
        """The random choices of sample `number` of the run: a pure function of (seed, number)."""
        s, (epoch, turn) = self.settings, divmod(number, self.samples_per_epoch)
        i = self.turns[self._order(epoch)[turn]]
        draws = generator(s.seed, "sample", number)
        flip, drop, x, y = torch.rand(4, generator=draws).tolist()
        t = torch.randint(self.timesteps, (), generator=draws)
        template = self.templates[int(torch.randint(len(self.templates), (), generator=draws))]
        prompt = "" if drop < s.proportion_empty_prompts else template.replace("{}", self.examples[i].caption)
        place = MIDDLE if s.center_crop else (x, y)
        return Draw(i, place, s.random_flip and flip < 0.5, t, prompt)

    def sample(self, number: int) -> dict[str, Tensor]:
        """One row of a batch."""
        seed, draw = self.settings.seed, self.draw(number)
        encoded = self._encoded(draw.picture, draw.place, draw.flip)
        shape = encoded.mean.shape
        z = sample_posterior(encoded.mean, encoded.logvar, normal(shape, seed, "posterior", number))
        noise = normal(shape, seed, "noise", number)
        if self.settings.noise_offset:  # also a shift of each whole channel: Guttenberg 2023, "Diffusion with Offset Noise"
            noise = noise + self.settings.noise_offset * normal((shape[0], 1, 1), seed, "noise offset", number)
        return self._row(encoded, z, draw.prompt) | {"noise": noise, "t": draw.t}

    def still(self, i: int) -> dict[str, Tensor]:
        """Picture `i` with nothing drawn (its middle, the mean of its latent, the first template), without noise and t."""
        encoded = self._encoded(i, MIDDLE, False)
        return self._row(encoded, encoded.mean, self.templates[0].replace("{}", self.examples[i].caption))

    def _row(self, encoded: Encoded, z: Tensor, prompt: str) -> dict[str, Tensor]:
        row = {"latents": z * self.vae.config.scaling_factor, "ids" if self.live_text else "text": self.prompts[prompt]}
        return row if encoded.mask is None else row | {"mask": encoded.mask}

    def _size(self, i: int) -> Size:
        return self.examples[i].size or (self.resolution, self.resolution)

    def _order(self, epoch: int) -> list[int]:
        if self.settings.aspect_ratio_buckets:
            return bucketed_order(self.sizes, self.settings.train_batch_size, self.settings.seed, epoch)
        return order(len(self.turns), self.settings.seed, epoch)

    def _encoded(self, i: int, place: Place, flip: bool) -> Encoded:
        return self.cache[i, flip] if self.cache else self._encode(i, place, flip)

    def _kept(self, i: int, flip: bool) -> Encoded:
        """The middle of a picture, encoded now or in an earlier run."""
        if self.disk is None:
            return self._encode(i, MIDDLE, flip)
        example, masked = self.examples[i], self.settings.masked_loss
        mask = sha256(example.mask) if masked and example.mask else None
        origin = {"picture": sha256(example.path), "size": self._size(i), "place": MIDDLE, "flip": flip}
        tensors = self.disk.kept(origin | {"masked": masked, "mask": mask}, lambda: self._encode(i, MIDDLE, flip).tensors())
        return Encoded(tensors["mean"], tensors["logvar"], tensors.get("mask"))

    @torch.no_grad()
    def _encode(self, i: int, place: Place, flip: bool) -> Encoded:
        """A picture through the VAE, and its mask: each cell is the mean of its pixels."""
        self.used_vae = True
        example, size, weight = self.examples[i], self._size(i), next(self.vae.parameters())
        x = crop(load_image(example.path), size, place, flip)  # (3, H, W)
        mean, logvar = self.vae.encode(x[None].to(weight.device, weight.dtype))
        mask = torch.ones_like(mean[0, :1], dtype=torch.float32, device="cpu") if self.settings.masked_loss else None
        if mask is not None and example.mask is not None:
            pixels = crop(load_image(example.mask).convert("L"), size, place, flip)[:1] / 2 + 0.5  # (1, H, W) in [0, 1]
            mask = F.avg_pool2d(pixels, self.vae.config.downscale)
        return Encoded(mean[0].float().cpu(), logvar[0].float().cpu(), mask)


@torch.no_grad()
def _each_encoded(prompts: list[str], encode_prompts: Callable[[list[str]], Tensor]) -> dict[str, Tensor]:
    """Each distinct prompt -> (L, D), fp32, or (L,), whole numbers."""
    rows = {p: encode_prompts([p])[0].cpu() for p in dict.fromkeys(prompts)}
    return {p: row.float() if row.is_floating_point() else row for p, row in rows.items()}
