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
from torch import Tensor

from minidiff.core.vae import AutoencoderKL
from minidiff.draw.images import to_tensor
from minidiff.pocket.drawing import Shape, bounds, move, silhouette
from minidiff.pocket.world import Change, Picture, draw

Spoil = Callable[[list[Shape], random.Random], list[Shape]]
SEEN = 0.08  # of the object's area must come or go


def whole_and_spoiled(picture: Picture, seed: int, vae: AutoencoderKL | None = None) -> Tensor:
    """A drawing and the same one spoiled, (2, 3, 128, 128). With an autoencoder some are joined in latent space."""
    rng = random.Random(f"spoil {seed}")
    if vae is not None and rng.random() < 0.15:
        return joined(vae, picture, seed, rng)
    return both(picture, seed, lambda shapes: spoiled(shapes, rng))


def both(picture: Picture, seed: int, change: Change) -> Tensor:
    """A drawing, and the same one with its object changed, (2, 3, 128, 128)."""
    return torch.stack([to_tensor(draw(picture, seed)), to_tensor(draw(picture, seed, change=change))])


def spoiled(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """By one of SPOILS, and so that its outline shows it."""
    while difference(shapes, after := rng.choice(SPOILS)(shapes, rng)) <= SEEN:
        pass
    return after


def difference(before: list[Shape], after: list[Shape]) -> float:
    """How many pixels come or go, as a share of the object's."""
    a, b = (np.asarray(silhouette(shapes, 128)) > 0 for shapes in (before, after))
    return float((a ^ b).sum() / a.sum())


@torch.no_grad()
def joined(vae: AutoencoderKL, picture: Picture, seed: int, rng: random.Random) -> Tensor:
    """The drawing, and two drawings of one caption joined along a line through the middle; both come from the decoder."""
    other = rng.choice((elsewhere, mirrored))
    z = vae.encode(both(picture, seed, lambda shapes: other(shapes, rng)))[0]
    angle, at = rng.uniform(0, 2 * math.pi), torch.linspace(-0.5, 0.5, z.shape[-1])
    here = at[None, :] * math.cos(angle) + (at[:, None] - 0.15) * math.sin(angle) > rng.uniform(-0.08, 0.08)
    return vae.decode(torch.stack([z[0], torch.where(here, z[0], z[1])])).clamp(-1, 1)


def elsewhere(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """The object a sixth to a third of its size away."""
    left, top, right, bottom = bounds(shapes)
    angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.16, 0.33)
    step = far * np.array([(right - left) * math.cos(angle), (bottom - top) * math.sin(angle)])
    return move(shapes, np.eye(2), step)


def mirrored(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    left, _, right, _ = bounds(shapes)
    return mirror(shapes, (left + right) / 2)


def mirror(shapes: list[Shape], middle: float) -> list[Shape]:
    return move(shapes, np.diag([-1.0, 1.0]), np.array([2 * middle, 0.0]))


def torn(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """Two halves that do not meet: one is a sixth to a third of the object's height too low."""
    left, top, right, bottom = bounds(shapes)
    step, middle = rng.uniform(0.16, 0.33) * (bottom - top), left + (right - left) * rng.uniform(0.4, 0.6)
    halves = [half(shapes, side, middle) for side in (-1.0, 1.0)]
    low = halves.pop(rng.randrange(2))
    return halves[0] + move(low, np.eye(2), np.array([0.0, step]))


def half_mirrored(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """One half of the object, and its mirror image instead of the other."""
    left, _, right, _ = bounds(shapes)
    side, middle = rng.choice((-1.0, 1.0)), left + (right - left) * rng.uniform(0.42, 0.58)
    kept = half(shapes, side, middle)
    return kept + mirror(kept, middle)


def half(shapes: list[Shape], side: float, middle: float) -> list[Shape]:
    """The part of each shape on one side of an upright line: Sutherland and Hodgman 1974, for one edge."""
    kept = []
    for shape in shapes:
        points: list[np.ndarray] = []
        for a, b in zip(shape.points, np.roll(shape.points, -1, axis=0)):
            da, db = side * (a[0] - middle), side * (b[0] - middle)
            points += [a] if da >= 0 else []
            points += [a + (b - a) * da / (da - db)] if da * db < 0 else []
        kept += [replace(shape, points=np.array(points))] if points else []
    return kept


def part(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """The shapes whose middle lies near that of a random one, the largest shape excepted: a head, a wheel, an eye."""
    middles = [(shape.points.min(0) + shape.points.max(0)) / 2 for shape in shapes]
    sizes = [float(np.prod(np.ptp(shape.points, axis=0))) for shape in shapes]
    left, top, right, bottom = bounds(shapes)
    near, reach = rng.choice(middles), rng.uniform(0.1, 0.28) * max(right - left, bottom - top)
    each = zip(shapes, middles, sizes)
    return [shape for shape, at, size in each if np.hypot(*(at - near)) < reach and size < max(sizes)]


def twice(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    """A part is there a second time: mirrored on the other side, or shifted."""
    some = part(shapes, rng)
    left, _, right, _ = bounds(shapes)
    if some and rng.random() < 0.5:
        return shapes + mirror(some, (left + right) / 2)
    return shapes + elsewhere(some, rng) if some else shapes


def erased(shapes: list[Shape], rng: random.Random) -> list[Shape]:
    gone = part(shapes, rng)
    return [shape for shape in shapes if shape not in gone]


SPOILS: tuple[Spoil, ...] = (torn, half_mirrored, twice, erased)
