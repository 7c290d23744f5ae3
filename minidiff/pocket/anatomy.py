"""Drawings spoiled in the ways in which a diffusion model fails: two heads, a missing leg, halves that do not belong together.

Only the object is spoiled, the place stays, so that a judge has to look at the object. What is spoiled is seen: a mirrored
half of a house is still a house, and is not counted.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minidiff.core.vae import AutoencoderKL
from minidiff.draw.images import to_tensor
from minidiff.pocket.drawing import Shape, bounds, fill
from minidiff.pocket.world import Picture, draw

Spoil = Callable[[list[Shape], random.Random], list[Shape]]
SEEN = 0.08  # of the object's area must come or go


def whole_and_spoiled(picture: Picture, seed: int, vae: AutoencoderKL | None = None) -> Tensor:
    """A drawing and the same one spoiled, (2, 3, 128, 128). With an autoencoder some are joined in latent space."""
    rng = random.Random(f"spoil {seed}")
    if vae is not None and rng.random() < 0.15:
        return joined(vae, picture, seed, rng)
    return torch.stack([to_tensor(draw(picture, seed)), to_tensor(draw(picture, seed, change=lambda some: spoiled(some, rng)))])


def spoiled(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """By one of SPOILS, and so that its outline shows it."""
    before = silhouette(shapes)
    while True:
        after = rng.choice(SPOILS)(shapes, rng)
        if (before ^ silhouette(after)).sum() > SEEN * before.sum():
            return after


def silhouette(shapes: list[Shape]) -> np.ndarray:
    """The pixels of the object, (128, 128) of True and False."""
    mask = Image.new("1", (128, 128))
    for shape in shapes:
        fill(ImageDraw.Draw(mask), shape, 128, 1)
    return np.asarray(mask)


@torch.no_grad()
def joined(vae: AutoencoderKL, picture: Picture, seed: int, rng: random.Random) -> Tensor:
    """The drawing, and two drawings of one caption joined along a line through the middle; both come from the decoder."""
    other = rng.choice((elsewhere, mirrored))
    x = torch.stack([to_tensor(draw(picture, seed)), to_tensor(draw(picture, seed, change=lambda some: other(some, rng)))])
    z, angle = vae.encode(x)[0], rng.uniform(0, 2 * math.pi)
    at = torch.linspace(-0.5, 0.5, z.shape[-1])
    here = at[None, :] * math.cos(angle) + (at[:, None] - 0.15) * math.sin(angle) > rng.uniform(-0.08, 0.08)
    return vae.decode(torch.stack([z[0], torch.where(here, z[0], z[1])])).clamp(-1, 1)


def elsewhere(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """The object a sixth to a third of its size away."""
    left, top, right, bottom = bounds(shapes)
    angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.16, 0.33)
    step = far * np.array([(right - left) * math.cos(angle), (bottom - top) * math.sin(angle)])
    return [replace(shape, points=shape.points + step) for shape in shapes]


def mirrored(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    left, _, right, _ = bounds(shapes)
    return [replace(shape, points=shape.points * (-1, 1) + (left + right, 0)) for shape in shapes]


def torn(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """Two halves that do not meet: one is a sixth to a third of the object's height too low."""
    left, top, right, bottom = bounds(shapes)
    step, middle = rng.uniform(0.16, 0.33) * (bottom - top), left + (right - left) * rng.uniform(0.4, 0.6)
    halves = [[cut(shape, side, middle) for shape in shapes] for side in (-1.0, 1.0)]
    low = [replace(shape, points=shape.points + (0, step)) for shape in halves.pop(rng.randrange(2))]
    return [shape for shape in halves[0] + low if len(shape.points)]


def half_mirrored(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """One half of the object, and its mirror image instead of the other."""
    left, _, right, _ = bounds(shapes)
    side, middle = rng.choice((-1.0, 1.0)), left + (right - left) * rng.uniform(0.42, 0.58)
    half = [kept for shape in shapes if len((kept := cut(shape, side, middle)).points)]
    return half + [replace(shape, points=shape.points * (-1, 1) + (2 * middle, 0)) for shape in half]


def cut(shape: Shape, side: float, middle: float) -> Shape:
    """The part of a shape on one side of an upright line: Sutherland and Hodgman 1974, for one edge."""
    points: list[np.ndarray] = []
    for a, b in zip(shape.points, np.roll(shape.points, -1, axis=0)):
        da, db = side * (a[0] - middle), side * (b[0] - middle)
        points += [a] if da >= 0 else []
        points += [a + (b - a) * da / (da - db)] if da * db < 0 else []
    return replace(shape, points=np.array(points).reshape(-1, 2))


def part(shapes: list[Shape], rng: random.Random) -> list[int]:
    """The shapes whose middle lies near that of a random one, the largest shape excepted: a head, a wheel, an eye."""
    middles = [(shape.points.min(0) + shape.points.max(0)) / 2 for shape in shapes]
    sizes = [float(np.prod(np.ptp(shape.points, axis=0))) for shape in shapes]
    left, top, right, bottom = bounds(shapes)
    near, reach = rng.choice(middles), rng.uniform(0.1, 0.28) * max(right - left, bottom - top)
    return [i for i, at in enumerate(middles) if np.hypot(*(at - near)) < reach and sizes[i] < max(sizes)]


def twice(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """A part is there a second time: mirrored on the other side, or shifted."""
    some = [shapes[i] for i in part(shapes, rng)]
    left, _, right, _ = bounds(shapes)
    if some and rng.random() < 0.5:
        return shapes + [replace(shape, points=shape.points * (-1, 1) + (left + right, 0)) for shape in some]
    return shapes + elsewhere(some, rng) if some else shapes


def erased(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    gone = part(shapes, rng)
    return [shape for i, shape in enumerate(shapes) if i not in gone]


SPOILS: tuple[Spoil, ...] = (torn, half_mirrored, twice, erased)
