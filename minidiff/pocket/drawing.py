"""Shapes: the few outlines from which every object and scene is cut, like paper.

Everything is a filled polygon, circles too. That makes turning, mirroring and scaling one matrix product, and the same
picture can be drawn at 128 or at 512 pixels without ever being enlarged. x points right, y points DOWN, as in images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

WHITE: RGB = (255, 255, 255)
INK: RGB = (42, 38, 50)


@dataclass(frozen=True, eq=False)
class Shape:
    """One polygon in one colour; `detail` marks the small ones (pupils, buttons), which get no outline in a drawing."""

    points: np.ndarray  # N 2
    fill: RGB
    detail: bool = False


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """The colour that lies `share` of the way from `a` to `b`."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b))
    return red, green, blue


def details(*shapes: Shape) -> list[Shape]:
    """The shapes, marked as details."""
    return [replace(shape, detail=True) for shape in shapes]


def polygon(points: Sequence[Point], fill: RGB) -> Shape:
    return Shape(np.asarray(points, dtype=float), fill)


def ellipse(x: float, y: float, rx: float, ry: float, fill: RGB, turn: float = 0.0) -> Shape:
    """An ellipse around (x, y), turned by `turn` degrees."""
    angle = np.linspace(0, 2 * math.pi, 36, endpoint=False)
    points = np.stack([rx * np.cos(angle), ry * np.sin(angle)], axis=1)
    return Shape(points @ rotation(turn) + (x, y), fill)


def box(left: float, top: float, right: float, bottom: float, fill: RGB, corner: float = 0.0) -> Shape:
    """An upright rectangle whose corners are rounded with radius `corner`."""
    if corner == 0:
        return polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)
    quarter = np.linspace(0, math.pi / 2, 6)
    arc = corner * np.stack([np.cos(quarter), np.sin(quarter)], axis=1)
    centres = [(right - corner, bottom - corner), (left + corner, bottom - corner),
               (left + corner, top + corner), (right - corner, top + corner)]
    arcs = [arc @ rotation(90 * i) + centre for i, centre in enumerate(centres)]
    return Shape(np.concatenate(arcs), fill)


def blob(points: Sequence[Point], fill: RGB) -> Shape:
    """A smooth closed curve through the given points (Catmull-Rom)."""
    return Shape(smooth(points, closed=True), fill)


def stroke(points: Sequence[Point], width: float, fill: RGB) -> Shape:
    """A thick smooth line with round ends through the given points: tails, handles, stems."""
    path = smooth(points, closed=False)
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    aside = np.stack([-along[:, 1], along[:, 0]], axis=1) * width / 2
    half_turn = np.linspace(0, 180, 9)[1:-1]
    end = [path[-1] + aside[-1] @ rotation(-a) for a in half_turn]
    start = [path[0] - aside[0] @ rotation(-a) for a in half_turn]
    return Shape(np.concatenate([path + aside, end, (path - aside)[::-1], start]), fill)


def smooth(given: Sequence[Point], closed: bool) -> np.ndarray:
    """Points on the Catmull-Rom curve: it passes through every given point, with tangent (next - previous) / 2."""
    points = np.asarray(given, dtype=float)
    padded = np.concatenate([points[-1:], points, points[:2]] if closed else [points[:1], points, points[-1:]])
    p0, p1, p2, p3 = (padded[i:len(padded) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, 7, endpoint=False)[None, :, None]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return curve.reshape(-1, 2) if closed else np.concatenate([curve.reshape(-1, 2), points[-1:]])


def rotation(degrees: float) -> np.ndarray:
    """The 2x2 matrix R for which `points @ R` is turned clockwise as seen on the screen."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, s], [-s, c]])


def move(shapes: Sequence[Shape], matrix: np.ndarray, offset: np.ndarray) -> list[Shape]:
    """The shapes after points -> points @ matrix + offset."""
    return [replace(shape, points=shape.points @ matrix + offset) for shape in shapes]


def bounds(shapes: Sequence[Shape]) -> tuple[float, float, float, float]:
    """left, top, right, bottom of all the shapes together."""
    points = np.concatenate([shape.points for shape in shapes])
    return (*points.min(axis=0), *points.max(axis=0))


def fill(pen: ImageDraw.ImageDraw, shape: Shape, scale: float, colour: RGB | int | None = None) -> None:
    """Fills the shape on a canvas of `scale` pixels a unit."""
    pen.polygon((shape.points * scale).ravel().tolist(), fill=shape.fill if colour is None else colour)


def outline(pen: ImageDraw.ImageDraw, shape: Shape, scale: float, width: float, colour: RGB | int) -> None:
    """Draws the shape's edge, `width` pixels thick."""
    points = shape.points * scale
    closed = np.concatenate([points, points[:1]])
    pen.line(closed.ravel().tolist(), fill=colour, width=round(width))
    if len(points) < 12:  # Pillow leaves a notch at a sharp corner: a dot fills it (curves bend too little to need one)
        for x, y in points:
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)


def silhouette(shapes: Sequence[Shape], side: int) -> Image.Image:
    """The pixels of the shapes: 255, all others 0."""
    mask = Image.new("L", (side, side))
    for shape in shapes:
        fill(ImageDraw.Draw(mask), shape, side, 255)
    return mask
