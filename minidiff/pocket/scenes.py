"""The eight places of the pocket world: a sky, a ground, and a few big quiet things.

Coordinates are parts of the frame, (0, 0) top left to (1, 1) bottom right. Backgrounds are paler or darker than any object,
so that every colour stands out everywhere; the smallest thing, a star or a window, is 0.04: five pixels of 128.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from minidiff.pocket.drawing import RGB, Point, Shape, box, details, ellipse, mix, polygon

CLOUD: RGB = (250, 252, 255)


@dataclass(frozen=True)
class Scene:
    """`sky` and `ground` are vertical gradients (top, bottom); `far` is drawn on the sky, `near` on the ground."""

    sky: tuple[RGB, RGB]
    ground: tuple[RGB, RGB]
    edge: Shape  # the ground's outline: its fill is not used
    far: list[Shape]
    near: list[Shape]
    shadow: RGB
    halo: RGB  # laid softly around the object, darker by day and lighter at night


def land(rng: random.Random, horizon: float, height: float, fill: RGB = CLOUD) -> Shape:
    """Everything below a wavy horizon; a second, higher wave makes the far hills."""
    phase, swing = rng.uniform(0, 6.28), rng.uniform(0.7, 1.3)
    steps = [-0.05 + i * 1.1 / 16 for i in range(17)]  # past the frame: its sides get no outline
    top = [(x, horizon + height * math.sin(phase + 6.28 * swing * x)) for x in steps]
    return polygon([*top, (1.05, 1.05), (-0.05, 1.05)], fill)


def cloud(x: float, y: float, size: float) -> list[Shape]:
    beside = [ellipse(x + way * size * 0.7, y, size * 0.6, size * 0.4, CLOUD) for way in (-1, 1)]
    return details(*beside, ellipse(x, y - size * 0.15, size * 0.8, size * 0.55, CLOUD))


def stars(points: list[Point], radius: float, fill: RGB) -> list[Shape]:
    """Four fat points each: thin ones would be lost on the way through the VAE."""
    rays = [(radius if i % 2 == 0 else radius * 0.5, math.pi * i / 4) for i in range(8)]
    return details(*(polygon([(x + r * math.sin(a), y - r * math.cos(a)) for r, a in rays], fill) for x, y in points))


def spread(rng: random.Random, count: int, top: float, bottom: float) -> list[Point]:
    """`count` points from left to right that keep their distance from one another."""
    return [((i + rng.uniform(0.25, 0.75)) / count, rng.uniform(top, bottom)) for i in range(count)]


def side(rng: random.Random, inner: float = 0.14, outer: float = 0.3) -> float:
    """An x in the left or the right part of the frame: the object mostly covers the middle."""
    x = rng.uniform(inner, outer)
    return x if rng.random() < 0.5 else 1 - x


def beach(rng: random.Random) -> Scene:
    x, shore = side(rng), rng.uniform(0.58, 0.64)
    ground = land(rng, shore, 0.018)
    foam = Shape(ground.points - (0, 0.035), (236, 250, 250))
    sun = ellipse(x, rng.uniform(0.13, 0.2), 0.095, 0.095, (255, 226, 104))
    sea = box(-0.05, rng.uniform(0.36, 0.41), 1.05, 1.0, (76, 182, 208))
    return Scene(((150, 216, 246), (214, 242, 250)), ((250, 228, 176), (238, 206, 148)), ground,
                 [sun, *cloud(1 - x, rng.uniform(0.12, 0.24), 0.12), sea, foam], [], (168, 132, 92), (150, 140, 120))


def snow(rng: random.Random) -> Scene:
    ground = land(rng, rng.uniform(0.6, 0.66), 0.025)
    x = side(rng)
    firs = [shape for at, size in ((x, 1.0), (x + (0.22 if x < 0.5 else -0.22), 0.72)) for shape in fir(at, 0.66, size)]
    flakes = details(*(ellipse(fx, fy, 0.021, 0.021, CLOUD) for fx, fy in spread(rng, 6, 0.05, 0.4)))
    return Scene(((112, 142, 184), (172, 196, 222)), ((222, 233, 246), (188, 208, 234)), ground,
                 [*firs, *flakes], [], (112, 138, 184), (104, 128, 172))


def fir(x: float, foot: float, size: float) -> list[Shape]:
    """Two green-grey triangles and a white cap."""
    wide, tall = 0.14 * size, 0.44 * size
    needles: RGB = (92, 132, 138)
    return [polygon([(x - wide, foot), (x, foot - tall * 0.75), (x + wide, foot)], needles),
            polygon([(x - wide * 0.8, foot - tall * 0.4), (x, foot - tall), (x + wide * 0.8, foot - tall * 0.4)], needles),
            *details(polygon([(x - wide * 0.4, foot - tall * 0.7), (x, foot - tall), (x + wide * 0.4, foot - tall * 0.7)],
                             (244, 248, 255)))]


def meadow(rng: random.Random) -> Scene:
    ground = land(rng, rng.uniform(0.6, 0.66), 0.03)
    hill = land(rng, rng.uniform(0.48, 0.52), 0.05, (186, 222, 146))
    x = side(rng)
    blooms = [bloom for i, (fx, fy) in enumerate(spread(rng, 4, 0.76, 0.94))
              for bloom in (ellipse(fx, fy, 0.034, 0.03, ((255, 250, 240), (250, 190, 210))[i % 2]),
                            ellipse(fx, fy, 0.016, 0.015, (250, 208, 90)))]
    return Scene(((150, 206, 240), (216, 238, 244)), ((168, 212, 112), (138, 190, 88)), ground,
                 [*cloud(x, rng.uniform(0.14, 0.24), 0.13), hill], details(*blooms), (84, 132, 62), (104, 140, 84))


def night(rng: random.Random) -> Scene:
    ground = land(rng, rng.uniform(0.64, 0.7), 0.03)
    hill = land(rng, rng.uniform(0.54, 0.58), 0.05, (40, 46, 96))
    x, y = side(rng), rng.uniform(0.14, 0.2)
    crescent = [ellipse(x, y, 0.1, 0.1, (255, 240, 184)), *details(ellipse(x + 0.045, y - 0.025, 0.085, 0.085, (24, 32, 92)))]
    beside = [point for point in spread(rng, 5, 0.06, 0.42) if abs(point[0] - x) > 0.15]
    return Scene(((18, 26, 84), (60, 66, 148)), ((46, 58, 112), (30, 38, 84)), ground,
                 [*stars(beside, 0.042, (255, 244, 190)), *crescent, hill], [], (16, 18, 48), (104, 112, 176))


def moon(rng: random.Random) -> Scene:
    ground = land(rng, rng.uniform(0.54, 0.6), 0.02)
    x, y = side(rng), rng.uniform(0.15, 0.2)
    earth = [ellipse(x, y, 0.115, 0.115, (82, 150, 226)),
             *details(ellipse(x - 0.03, y - 0.03, 0.05, 0.042, (120, 190, 122)),
                      ellipse(x + 0.045, y + 0.045, 0.036, 0.03, (120, 190, 122)))]
    beside = [point for point in spread(rng, 4, 0.06, 0.44) if abs(point[0] - x) > 0.17]
    craters = [half for cx, cy in spread(rng, 3, 0.66, 0.92) for half in
               (ellipse(cx, cy, 0.12, 0.045, (128, 128, 138)), ellipse(cx, cy + 0.012, 0.1, 0.032, (148, 148, 157)))]
    return Scene(((12, 12, 20), (30, 28, 42)), ((186, 186, 194), (152, 152, 162)), ground,
                 [*stars(beside, 0.036, (236, 238, 250)), *earth], details(*craters), (92, 92, 104), (104, 104, 118))


def room(rng: random.Random) -> Scene:
    height = rng.uniform(0.66, 0.72)
    floor = box(-0.05, height, 1.05, 1.05, CLOUD)
    x = side(rng, 0.2, 0.3)
    panes = [box(left, 0.12, left + 0.1, 0.42, (164, 214, 240)) for left in (x - 0.12, x + 0.02)]
    window = [box(x - 0.16, 0.08, x + 0.16, 0.46, (248, 248, 250)), *details(*panes)]
    board = box(-0.05, height - 0.045, 1.05, height, (244, 240, 248))
    other = 1 - x
    art = [box(other - 0.1, 0.14, other + 0.1, 0.36, (176, 140, 116)),
           *details(box(other - 0.065, 0.175, other + 0.065, 0.325, (246, 228, 196)))]
    rug = ellipse(rng.uniform(0.4, 0.6), 0.88, 0.42, 0.09, (196, 178, 206))
    return Scene(((222, 208, 230), (234, 222, 238)), ((224, 184, 146), (206, 162, 122)), floor,
                 [*window, *art, *details(board)], [rug], (134, 100, 84), (150, 130, 156))


def city(rng: random.Random) -> Scene:
    street = box(-0.05, rng.uniform(0.68, 0.73), 1.05, 1.05, CLOUD)
    walls: tuple[RGB, ...] = ((150, 164, 188), (178, 166, 184), (134, 152, 172), (166, 174, 186))
    first, shapes, left = rng.randrange(4), [], rng.uniform(-0.12, 0.0)
    for i in range(4):
        width = rng.uniform(0.26, 0.31)
        shapes += tower(left, width, rng.uniform(0.12, 0.42), walls[(first + i) % 4])
        left += width + 0.015
    kerb = box(-0.05, street.points[0, 1] - 0.03, 1.05, street.points[0, 1] + 0.02, (206, 206, 212))
    dashes = details(*(box(x - 0.1, 0.9, x + 0.1, 0.94, (236, 234, 226)) for x in (0.1, 0.5, 0.9)))
    return Scene(((206, 222, 238), (244, 228, 214)), ((140, 142, 154), (122, 124, 138)), street,
                 [*shapes, *details(kerb)], dashes, (72, 74, 90), (108, 112, 132))


def tower(left: float, width: float, top: float, wall: RGB) -> list[Shape]:
    """A block with two columns of large lit windows."""
    lit = mix(wall, (255, 240, 176), 0.75)
    rows = [top + 0.05 + 0.13 * i for i in range(5) if top + 0.13 * i < 0.56]
    columns = (left + width * 0.3 - 0.035, left + width * 0.7 - 0.035)
    panes = details(*(box(x, y, x + 0.07, y + 0.075, lit) for y in rows for x in columns))
    return [box(left, top, left + width, 0.8, wall), *panes]


def desert(rng: random.Random) -> Scene:
    ground = land(rng, rng.uniform(0.62, 0.68), 0.03)
    x = side(rng, 0.12, 0.22)
    mesa_x, green = 1 - x, (104, 150, 110)
    mesa = polygon([(mesa_x - 0.26, 0.7), (mesa_x - 0.17, 0.4), (mesa_x + 0.15, 0.4), (mesa_x + 0.24, 0.7)], (206, 124, 98))
    sun = ellipse(0.5 + rng.uniform(-0.12, 0.12), rng.uniform(0.13, 0.18), 0.09, 0.09, (255, 240, 196))
    cactus = [box(x - 0.035, 0.34, x + 0.035, 0.76, green, 0.035), box(x - 0.115, 0.42, x - 0.065, 0.56, green, 0.025),
              *details(box(x - 0.115, 0.53, x, 0.58, green, 0.025)), box(x + 0.065, 0.47, x + 0.115, 0.6, green, 0.025),
              *details(box(x, 0.57, x + 0.115, 0.62, green, 0.025))]
    return Scene(((250, 176, 142), (254, 222, 180)), ((240, 194, 138), (224, 170, 112)), ground,
                 [sun, mesa], cactus, (150, 100, 72), (160, 116, 92))


BUILDERS: dict[str, Callable[[random.Random], Scene]] = {
    scene.__name__: scene for scene in (beach, snow, meadow, night, moon, room, city, desert)
}
