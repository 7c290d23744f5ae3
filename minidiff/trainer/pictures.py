"""Checks of the pictures themselves, before training: their size, the aspect-ratio bucket of each, their masks."""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minidiff.core.config import UNetConfig, VAEConfig
from minidiff.core.errors import DataError, SettingsError
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.images import load_image, load_weights, open_image
from minidiff.files.atomic import sha256
from minidiff.trainer.dataset import Example, Scan, Size
from minidiff.trainer.latents import LatentData, crop

LOOKED_AT, BLURRED = 4, 20.0  # pictures of which the VAE's error is measured before training; dB
BELOW = "Below 20 dB (PSNR) the VAE loses what is small, such as faces and letters, and no training brings it back."


def training_sizes(unet: UNetConfig, vae: VAEConfig, resolution: int | None, buckets: bool) -> tuple[int, list[Size]]:
    """The side at which a model is trained, by default its own; and the sizes that pictures may have then.

    SettingsError for a side that the U-Net cannot halve at each level.
    """
    side, stride = resolution or unet.sample_size * vae.downscale, vae.downscale * 2 ** (len(unet.block_out_channels) - 1)
    if side % stride:
        near = max(side // stride, 1) * stride
        raise SettingsError(f"--resolution {side}: this model needs a multiple of {stride}, such as {near} or {near + stride}.")
    return side, bucket_sizes(side, stride) if buckets else [(side, side)]


def warnings_of(data: LatentData, own: int) -> Iterator[str]:
    """Warnings before training starts; `own` is the side in pixels that the base was made for."""
    if not 0.7 < data.resolution / own < 1.5:
        yield f"--resolution {data.resolution} is far from the {own} of the base, which may then draw things double or cut off."
    some, scale = range(0, len(data.examples), -(-len(data.examples) // LOOKED_AT)), data.vae.config.scaling_factor
    seen = {data.examples[i]: data.fixed(i)["latents"] / scale for i in some}  # perhaps from the cache
    levels = {e.path.name: reconstruction(data.vae, e, mean) for e, mean in seen.items()}
    if poor := ", ".join(f"{name} with {level:.0f} dB" for name, level in levels.items() if level < BLURRED):
        yield f"from the VAE comes back {poor}. {BELOW}"
    shapes, batch = Counter(data.sizes_in_turn), data.settings.train_batch_size
    times = [-(-shapes[size] // batch) * batch / shapes[size] for size in data.sizes]  # in an epoch
    if data.settings.aspect_ratio_buckets and max(times) > 1.2 * min(times):
        each = ", ".join(f"{e.path.name} {often:.2g} x" for e, often in zip(data.examples, times))
        yield f"batches of one shape are filled up, so an epoch shows {each}. --train_batch_size 1 shows each as often."


def reconstruction(vae: AutoencoderKL, example: Example, mean: Tensor | None = None) -> float:
    """PSNR in dB of a picture that the VAE has encoded and decoded. `mean`: of its latent (C, h, w), if it is known."""
    weight, image = next(vae.parameters()), load_image(example.path)
    x = crop(image, example.size or image.size)[None].to(weight.device, weight.dtype)
    with torch.no_grad():
        z = vae.encode(x)[0] if mean is None else mean[None].to(x)
        return psnr(vae.decode(z).clamp(-1, 1), x)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over pictures of 10 log10(4 / MSE) dB, for values in [-1, 1]."""
    return (10 * torch.log10(4 / (x - y).square().flatten(1).mean(1).clamp(min=1e-10))).mean().item()


def bucket_sizes(resolution: int, stride: int) -> list[Size]:
    """Aspect-ratio buckets: sizes in which pictures keep their shape, of about as many pixels as a square, and never more.

    Sides are multiples of `stride`, from half to twice `resolution`.
    """
    shortest = math.ceil(resolution / 2 / stride) * stride
    wide = [(w, resolution**2 // w // stride * stride) for w in range(shortest, resolution + 1, stride)]
    return sorted({*wide, *((height, width) for width, height in wide)})


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size | None:
    """Of the buckets that a picture of `size` fills without being enlarged, the nearest in shape; None if it fills none."""
    width, height = size
    filled = [b for b in buckets if b[0] <= width and b[1] <= height]
    return min(filled, key=lambda b: abs(math.log(b[0] / b[1]) - math.log(width / height)), default=None)


def check_picture(example: Example, sizes: Sequence[Size]) -> Example:
    """The example with the one of `sizes` at which it is trained. DataError if it is damaged, too small, or its mask unfit."""
    image = load_image(example.path)
    size = nearest_bucket(image.size, sizes)
    if size is None:
        few = f"{image.width} x {image.height} pixels are too few for --resolution {max(map(min, sizes))}"
        raise DataError(f"{example.path}: {few}.")
    if example.mask:
        mask = load_weights(example.mask)
        if mask.size != image.size:
            raise DataError(f"{example.mask} has another size than {example.path.name}: {mask.size}, not {image.size}.")
        if mask.getextrema() == (0, 0):
            raise DataError(f"{example.mask} is black all over: there is nothing to learn. White is what is learnt.")
        if mask.getextrema() == (255, 255):
            warnings.warn(f"{example.mask} is white all over, so the whole picture is learnt.", stacklevel=2)
    if example.hint:
        with open_image(example.hint) as hint:
            a, b = (w / h for w, h in (hint.size, image.size))
            if max(a, b) > 1.02 * min(a, b):
                raise DataError(f"{example.hint} has another shape than {example.path.name}: {hint.size}, not {image.size}.")
    return replace(example, size=size)


def check_pictures(examples: list[Example], sizes: Sequence[Size], skip_bad: bool) -> list[Example]:
    """The examples with their sizes. One DataError lists all pictures that cannot be used; with `skip_bad` it is a notice."""
    good, bad = [], []
    for example in examples:
        try:
            good.append(check_picture(example, sizes))
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


def check_scan(scan: Scan, sizes: Sequence[Size]) -> list[Example]:
    """`data check`: an error for each picture that is no use, and a notice for each that is there twice; returns the good."""
    seen, known, good = dict[str, Path](), {example.path for example in scan.examples}, list[Example]()
    for example in scan.examples + [Example(path, "") for path in scan.pictures if path not in known]:
        with scan.collecting():
            good.append(check_picture(example, sizes))
            if (first := seen.setdefault(sha256(example.path), example.path)) != example.path:
                scan.notices.append(f"{example.path}: the same file as {first.name}.")
    return good


def as_table(scan: Scan, folder: Path) -> str:
    """For the terminal: a line for each error and notice, with files as seen from the folder, and a last line that counts."""
    lines = [f"error   {text}" for text in scan.errors] + [f"notice  {text}" for text in scan.notices]
    short = [text.replace(f"{folder}/", "").replace("\n", " ") for text in lines]
    counts = (f"{len(some)} {what}{'s'[: len(some) != 1]}" for some, what in ((scan.errors, "error"), (scan.notices, "notice")))
    return "\n".join([*short, ", ".join(counts)])
