"""Examples -> latents, noise, timesteps and text for the loop.

A sample is numbered through the whole run, and each thing drawn for it (which picture, flip, timestep, noise) is a
function of (seed, that number, purpose). So a resumed run sees what it would have seen, and batch 4 sees what four
batches of 1 see.

Shapes: B samples, 3 H W a picture in [-1, 1], C h w its latent, L tokens, D width of the text.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minidiff.errors import DataError
from minidiff.images import load_image, to_tensor
from minidiff.models.vae import AutoencoderKL, sample_posterior
from minidiff.rng import generator, normal
from minidiff.train.folders import Example
from minidiff.train.settings import FineTuneSettings

# --- pictures --------------------------------------------------------------------------------------------------------


def check_pictures(examples: list[Example], resolution: int, skip_bad: bool) -> list[Example]:
    """Decode every picture once. Broken ones, and those smaller than `resolution`, are all listed in one DataError.

    With `skip_bad` they are listed in a notice, and the others are returned.
    """
    good, bad = [], []
    for example in examples:
        try:
            small = min(load_image(example.path).size)
            if small < resolution:
                raise DataError(f"{example.path}: its shorter side is {small} pixels, and --resolution is {resolution}.")
            good.append(example)
        except DataError as error:
            bad.append(str(error))
    if bad:
        listed = "\n  ".join(bad[:10] + ["…"] * (len(bad) > 10))
        what = f"{len(bad)} of {len(examples)} pictures cannot be used:\n  {listed}"
        if not skip_bad or not good:
            raise DataError(f"{what}\nMend or remove them, or leave them out with --skip_bad; --resolution can be lowered.")
        print(f"Note: {what}", file=sys.stderr)
    return good


def square(image: Image.Image, size: int, place: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> Tensor:
    """Shrink the shorter side to `size`, crop a square: (3, size, size) in [-1, 1].

    `place`, each part in [0, 1], says where along the longer side the crop lies: 0 left or top, 0.5 the middle.
    """
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round(place[0] * (width - size)), round(place[1] * (height - size))
    x = to_tensor(image.crop((left, top, left + size, top + size)))
    return x.flip(-1) if flip else x


def fingerprint(examples: list[Example]) -> str:
    """A hash of all pictures' bytes and captions, whatever folder they lie in."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(hashlib.sha256(example.path.read_bytes()).digest() + example.caption.encode() + b"\0")
    return digest.hexdigest()[:16]


# --- batches ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> list[int]:
    """In which order an epoch goes through `count` pictures."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()


class LatentData:
    """What every latent diffusion recipe reads: `batch(step, micro)` gives latents, noise, timesteps and text.

    Captions are encoded once. Pictures too, to the mean and log-variance of their latents (`cache_latents`); a latent
    is drawn from these anew each time. With `random_flip` the mirror images are encoded as well.
    """

    def __init__(
        self,
        examples: list[Example],
        settings: FineTuneSettings,
        resolution: int,
        vae: AutoencoderKL,
        encode_prompts: Callable[[list[str]], Tensor],
        timesteps: int,
    ) -> None:
        self.examples, self.settings, self.resolution = examples, settings, resolution
        self.vae, self.timesteps = vae, timesteps
        self.text = _encoded([e.caption for e in examples] + [""], encode_prompts)
        self.moments: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        if settings.cache_latents:
            for i in _with_bar(range(len(examples))):
                for flip in (False, True) if settings.random_flip else (False,):
                    self.moments[i, flip] = self._encode(i, (0.5, 0.5), flip)

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        return {"pictures": len(self.examples), "data": fingerprint(self.examples), "side": self.resolution}

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """latents (B, C, h, w), scaled; noise, of that shape; t (B,), whole numbers; text (B, L, D). All on the CPU."""
        s = self.settings
        first = (step * s.gradient_accumulation_steps + micro) * s.train_batch_size
        samples = [self.sample(number) for number in range(first, first + s.train_batch_size)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def sample(self, number: int) -> dict[str, Tensor]:
        """Sample `number` of the run: a pure function of (seed, number)."""
        epoch, place = divmod(number, len(self.examples))
        seed, i = self.settings.seed, order(len(self.examples), self.settings.seed, epoch)[place]
        draws = generator(seed, "sample", number)
        flip, drop, x, y = torch.rand(4, generator=draws).tolist()
        t = torch.randint(self.timesteps, (), generator=draws)

        caption = "" if drop < self.settings.proportion_empty_prompts else self.examples[i].caption
        crop = (0.5, 0.5) if self.settings.center_crop else (x, y)
        mean, logvar = self._moments(i, crop, self.settings.random_flip and flip < 0.5)
        z = sample_posterior(mean, logvar, normal(mean.shape, seed, "posterior", number))
        noise = normal(mean.shape, seed, "noise", number)
        return {"latents": z * self.vae.config.scaling_factor, "noise": noise, "t": t, "text": self.text[caption]}

    def _moments(self, i: int, crop: tuple[float, float], flip: bool) -> tuple[Tensor, Tensor]:
        return self.moments[i, flip] if self.moments else self._encode(i, crop, flip)

    @torch.no_grad()
    def _encode(self, i: int, crop: tuple[float, float], flip: bool) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (C, h, w)."""
        weight = next(self.vae.parameters())
        x = square(load_image(self.examples[i].path), self.resolution, crop, flip)
        mean, logvar = self.vae.encode(x[None].to(weight.device, weight.dtype))
        return mean[0].float().cpu(), logvar[0].float().cpu()


@torch.no_grad()
def _encoded(captions: list[str], encode_prompts: Callable[[list[str]], Tensor]) -> dict[str, Tensor]:
    """Each distinct caption -> (L, D)."""
    return {c: encode_prompts([c])[0].float().cpu() for c in dict.fromkeys(captions)}


def _with_bar(numbers: Iterable[int]) -> Iterable[int]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(numbers, desc="encoding pictures", leave=False, file=sys.stderr)  # type: ignore[no-any-return]
