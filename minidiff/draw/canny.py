"""Edges, the hint of the most used ControlNet: Canny's detector (IEEE PAMI 8(6), 1986), pixel for pixel that of OpenCV.

    gradient -> thin its ridges -> keep strong edges, and weak ones that touch them

All numbers are whole, as in OpenCV, so that every comparison has the same answer.
"""

import math

import numpy as np

TAN_22 = round((math.sqrt(2) - 1) * 2**15)  # the tangent of 22.5 degrees, times 2^15


def canny(pixels: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """uint8 pixels (H, W, 3) or (H, W) -> edges (H, W), uint8: 255 on them. The thresholds are for |dx| + |dy|, 0 to 2040."""
    low, high = sorted(map(math.floor, (low, high)))
    dx, dy = gradient(pixels if pixels.ndim == 3 else pixels[..., None])
    size = np.abs(dx) + np.abs(dy)
    thin = ridges(size, dx, dy)
    weak = np.pad(thin & (size > low), 1).ravel()  # flat, with a margin: a step in any direction is an addition
    width, seen = size.shape[1] + 2, np.zeros_like(weak)
    steps = np.array([y * width + x for y in (-1, 0, 1) for x in (-1, 0, 1)])
    front = np.flatnonzero(np.pad(thin & (size > high), 1))
    while front.size:
        seen[front] = True
        beside = np.unique(front[:, None] + steps)
        front = beside[weak[beside] & ~seen[beside]]
    return seen.reshape(-1, width)[1:-1, 1:-1].astype(np.uint8) * 255


def gradient(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's dx and dy (H, W), of the channel with the largest |dx| + |dy|; of equal ones, the first."""
    x = np.pad(pixels.astype(np.int64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    down, across = x[:-2] + 2 * x[1:-1] + x[2:], x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    dx, dy = down[:, 2:] - down[:, :-2], across[2:] - across[:-2]
    channel = (np.abs(dx) + np.abs(dy)).argmax(-1)[..., None]
    return np.take_along_axis(dx, channel, -1)[..., 0], np.take_along_axis(dy, channel, -1)[..., 0]


def ridges(size: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """(H, W) of bool: is the gradient larger here than at both neighbours in its direction, one of four?"""
    around = np.pad(size, 1)  # 0 outside

    def at(y: int, x: int) -> np.ndarray:
        return around[1 + y : around.shape[0] - 1 + y, 1 + x : around.shape[1] - 1 + x]

    steep, flat = np.abs(dy) * 2**15, np.abs(dx) * TAN_22
    level, upright = steep < flat, steep > flat + np.abs(dx) * 2**16  # below 22.5 degrees; above 67.5
    falling = (dx < 0) != (dy < 0)
    diagonal = np.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    beside, above = (size > at(0, -1)) & (size >= at(0, 1)), (size > at(-1, 0)) & (size >= at(1, 0))
    return np.where(level, beside, np.where(upright, above, diagonal))
