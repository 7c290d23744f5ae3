"""Pictures that the pocket world does not contain: patterns, so that the autoencoder learns to hold any colour and any line.

The same seed gives the same picture. Three kinds, KEPT_OUT, are never trained on: they measure what was learned.

    u v   turned and stretched coordinates of the pixels, H W      a picture is H W 3, from 0 to 1
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

SIZE = 128
OVER = 2  # drawn so many times as large, then averaged down: lines get soft edges
Rng = np.random.Generator
Plane = np.ndarray
Painter = Callable[[Rng, Plane, Plane], np.ndarray]


def texture(seed: int, kind: str | None = None) -> Image.Image:
    """A picture of SIZE x SIZE pixels, of this kind or of a random one that may be trained on."""
    rng = np.random.default_rng(seed)
    kind = kind or str(rng.choice(list(SHARES), p=np.array(list(SHARES.values())) / sum(SHARES.values())))
    picture = painted(rng, kind, SIZE * OVER)
    picture = picture.reshape(SIZE, OVER, SIZE, OVER, 3).mean((1, 3))
    if kind not in ("flat", "gradient"):
        if rng.random() < 0.3:  # uneven light
            picture = picture * (1 - 0.6 * rng.random() * cloud(rng, SIZE, 2.5)[..., None])
        if rng.random() < 0.2:  # grain
            picture = picture + rng.uniform(0.01, 0.06) * rng.standard_normal(picture.shape)
    return Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))


def painted(rng: Rng, kind: str, side: int) -> np.ndarray:
    """One pattern, turned by a random angle."""
    v, u = np.mgrid[:side, :side] / side - 0.5
    angle = rng.uniform(0, math.pi) if rng.random() < 0.7 else 0.0
    c, s = math.cos(angle), math.sin(angle)
    return (TRAINED | KEPT_OUT)[kind](rng, c * u + s * v, c * v - s * u)


def colours(rng: Rng, count: int) -> np.ndarray:
    """(count, 3): bright and dark, vivid and grey, and often at the end of the scale."""
    rgb = rng.uniform(-0.2, 1.2, (count, 3)).clip(0, 1)
    grey = rgb.mean(1, keepdims=True)
    return grey + (rgb - grey) * rng.choice([1.0, 0.6, 0.25])


def cloud(rng: Rng, side: int, slope: float) -> np.ndarray:
    """Noise from 0 to 1 whose amplitude falls with frequency: at slope 1 as in photographs, at 2 smoothly."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    amplitude = (np.hypot(fy, fx) + 1 / side) ** -slope
    noise = np.fft.irfft2(amplitude * np.exp(2j * math.pi * rng.random(amplitude.shape)), (side, side))
    return (0.5 + 0.22 * noise / noise.std()).clip(0, 1)


def blend(share: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """From the first colour, where `share` is 0, to the second, where it is 1."""
    return pair[0] + (pair[1] - pair[0]) * share[..., None].clip(0, 1)


def gradient(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    share = 0.5 + u if rng.random() < 0.6 else 1.4 * np.hypot(u - rng.uniform(-0.5, 0.5), v)
    return blend(share, colours(rng, 2))


def bands(rng: Rng, u: Plane) -> np.ndarray:
    """Stripes along v, in two to six colours and as many widths, again and again."""
    edges = np.cumsum(rng.uniform(0.3, 1, rng.integers(2, 7)))
    at = np.searchsorted(edges, (u * rng.uniform(1.2, 9) * 2) % edges[-1], side="right")
    return colours(rng, len(edges) + 1)[at]


def checks(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    n, m = rng.uniform(2, 16, 2) if rng.random() < 0.3 else np.full(2, rng.uniform(2, 16))
    return colours(rng, 2)[((u * n) // 1 + (v * m) // 1).astype(int) % 2]


def dots(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    n, radius = rng.uniform(2, 11), rng.uniform(0.2, 0.45)
    shift = 0.5 * ((v * n) // 1 % 2) * rng.integers(0, 2)
    return colours(rng, 2)[(np.hypot((u * n + shift) % 1 - 0.5, (v * n) % 1 - 0.5) < radius).astype(int)]


def bricks(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    """Rows of tiles, each in one of a few colours, with mortar between them."""
    n, long, joint, shift = rng.uniform(3, 12), rng.uniform(1, 3), rng.uniform(0, 0.2), rng.choice([0, 0.5])
    row = (v * n) // 1
    along = u * n / long + shift * (row % 2)
    mortar = ((v * n) % 1 < joint) | (along % 1 < joint / long)
    which = (row.astype(int) * 7 + (along // 1).astype(int) * 13) ** 2 % 5
    return np.where(mortar[..., None], colours(rng, 1)[0], colours(rng, 5)[which % rng.integers(1, 6)])


def clouds(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    """Noise from rough to smooth, between two colours or in each of the three primaries."""
    slope, side = rng.uniform(1.0, 2.4), len(u)
    if rng.random() < 0.6:
        return blend(cloud(rng, side, slope), colours(rng, 2))
    return np.stack([cloud(rng, side, slope) for _ in range(3)], axis=-1)


def cells(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    """Every pixel has the colour of the nearest of some points."""
    count = int(rng.integers(4, 50))
    x, y = rng.uniform(-0.7, 0.7, (2, count))
    nearest = ((u[::2, ::2, None] - x) ** 2 + (v[::2, ::2, None] - y) ** 2).argmin(-1)
    return colours(rng, count)[nearest.repeat(2, 0).repeat(2, 1)]


def collage(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    """Scraps of paper on top of each other, many small and few large: the edges of a photograph (arXiv 1006.0423)."""
    picture = painted(rng, str(rng.choice(SCRAPS)), len(u))
    for _ in range(rng.integers(3, 50)):
        x, y, turn = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6), rng.uniform(0, math.pi)
        radius = 0.05 / rng.uniform(0.1, 1)
        a, b = (u - x) * math.cos(turn) + (v - y) * math.sin(turn), (v - y) * math.cos(turn) - (u - x) * math.sin(turn)
        b = b * rng.uniform(1, 3)
        inside = np.hypot(a, b) < radius if rng.random() < 0.6 else np.maximum(abs(a), abs(b)) < radius
        picture[inside] = painted(rng, str(rng.choice(SCRAPS)), len(u))[inside] if radius > 0.25 else colours(rng, 1)[0]
    return picture


def rings(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    return bands(rng, np.hypot(u - rng.uniform(-0.3, 0.3), v - rng.uniform(-0.3, 0.3)))


def zigzags(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    return bands(rng, u + rng.uniform(0.5, 1.2) * abs((v * rng.uniform(3, 8)) % 1 - 0.5) / 4)


def scales(rng: Rng, u: Plane, v: Plane) -> np.ndarray:
    """Overlapping round scales in rows, each lighter at its rim."""
    n, pair = rng.uniform(4, 9), colours(rng, 2)
    row = (v * n) // 1
    depth = np.hypot((u * n + 0.5 * (row % 2)) % 1 - 0.5, (v * n) % 1)
    return blend(np.where(depth < 0.55, depth / 0.55, 0.3), pair)


TRAINED: dict[str, Painter] = {
    "flat": lambda rng, u, v: np.ones((*u.shape, 1)) * colours(rng, 1), "gradient": gradient,
    "stripes": lambda rng, u, v: bands(rng, u), "plaid": lambda rng, u, v: (bands(rng, u) + bands(rng, v)) / 2,
    "checks": checks, "dots": dots, "bricks": bricks, "clouds": clouds, "cells": cells, "collage": collage,
}  # fmt: skip
KEPT_OUT: dict[str, Painter] = {"rings": rings, "zigzags": zigzags, "scales": scales}
SCRAPS = ("flat", "gradient", "stripes", "checks", "dots", "clouds")
SHARES = {kind: 1.0 for kind in TRAINED} | {"flat": 2.5, "clouds": 2.0, "collage": 4.0}
