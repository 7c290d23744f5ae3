"""The sixteen things of the pocket world.

Each thing is a list of large shapes, back to front, in a box of about -1..1 both ways, its feet at y = 1 (y points down),
looking to the right. Its colour comes in three tones; everything else is a quiet neutral, so that the colour's word has one
meaning. Details are 0.1 and more: about four pixels of a 128-pixel picture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from minidiff.pocket.drawing import INK, RGB, WHITE, Shape, blob, box, details, ellipse, mix, polygon, stroke

GLASS: RGB = (206, 232, 242)
CREAM: RGB = (250, 238, 214)
STEEL: RGB = (128, 134, 148)
BARK: RGB = (122, 98, 84)
BEAK: RGB = (246, 176, 64)
STEM: RGB = (104, 150, 92)

COLOURS: dict[str, RGB] = {
    "red": (222, 44, 44), "orange": (246, 132, 28), "yellow": (252, 212, 44), "green": (44, 158, 72),
    "cyan": (48, 206, 214), "blue": (46, 92, 216), "purple": (138, 70, 190), "pink": (250, 138, 184),
    "brown": (134, 82, 48), "white": (240, 241, 245),
}


@dataclass(frozen=True)
class Tones:
    """A colour with a lighter and a darker neighbour."""

    base: RGB
    light: RGB
    dark: RGB


def tones(colour: str) -> Tones:
    """White turns darker towards cool grey, the others towards a deep wine red: shadows that are not dirty."""
    base = COLOURS[colour]
    if colour == "white":
        return Tones(base, WHITE, (192, 198, 213))
    return Tones(base, mix(base, WHITE, 0.42), mix(base, (70, 16, 44), 0.28))


def eye(x: float, y: float, rim: RGB, radius: float = 0.14) -> list[Shape]:
    """A big friendly eye; the rim keeps it visible on a white face."""
    return details(ellipse(x, y, radius + 0.035, radius + 0.035, rim), ellipse(x, y, radius, radius, WHITE),
                   ellipse(x + 0.02, y + 0.02, radius * 0.66, radius * 0.7, INK))


def wheel(x: float, y: float) -> list[Shape]:
    return [ellipse(x, y, 0.27, 0.27, INK), *details(ellipse(x, y, 0.12, 0.12, (224, 226, 232)))]


PETALS = [(0.43 * math.sin(a), -0.34 - 0.43 * math.cos(a), math.degrees(a)) for a in (2 * math.pi * i / 6 for i in range(6))]
DOTS = [(0.21 * math.cos(a), 0.3 + 0.21 * math.sin(a)) for a in (2 * math.pi * (i + 0.25) / 5 for i in range(5))]
DOME = [(-1.0, 0.06), (-0.9, -0.42), (-0.5, -0.82), (0.0, -0.94), (0.5, -0.82), (0.9, -0.42), (1.0, 0.06)]
SPIRAL = [(-0.24 + r * math.cos(a), 0.12 + r * math.sin(a)) for r, a in ((0.06 + 0.052 * i, 0.8 * i - 1.0) for i in range(8))]

THINGS: dict[str, Callable[[Tones], list[Shape]]] = {
    "dog": lambda c: [
        stroke([(-0.72, 0.2), (-0.95, -0.05), (-0.98, -0.36)], 0.2, c.dark),
        box(-0.5, 0.4, -0.26, 0.96, c.dark, 0.1), box(0.2, 0.4, 0.44, 0.96, c.dark, 0.1),
        box(-0.78, 0.3, -0.5, 1.0, c.base, 0.12), box(-0.08, 0.4, 0.2, 1.0, c.base, 0.12),
        blob([(-0.84, 0.2), (-0.6, -0.06), (0.0, -0.02), (0.42, 0.1), (0.4, 0.56), (-0.1, 0.66), (-0.74, 0.6)], c.base),
        ellipse(0.44, -0.38, 0.5, 0.46, c.base),
        ellipse(-0.06, -0.34, 0.16, 0.38, c.dark, 14), ellipse(0.94, -0.34, 0.16, 0.38, c.dark, -14),
        *details(ellipse(0.46, -0.16, 0.29, 0.2, c.light), ellipse(0.46, -0.24, 0.13, 0.09, INK)),
        *eye(0.26, -0.5, c.dark), *eye(0.64, -0.5, c.dark),
    ],
    "cat": lambda c: [
        stroke([(0.36, 0.86), (0.82, 0.8), (0.92, 0.4), (0.74, 0.12)], 0.2, c.dark),
        blob([(-0.28, -0.1), (0.28, -0.1), (0.5, 0.5), (0.5, 0.98), (-0.5, 0.98), (-0.5, 0.5)], c.base),
        *details(ellipse(0.0, 0.46, 0.24, 0.34, c.light)),
        ellipse(-0.24, 0.9, 0.2, 0.12, c.light), ellipse(0.24, 0.9, 0.2, 0.12, c.light),
        polygon([(-0.56, -0.4), (-0.6, -1.0), (-0.1, -0.72)], c.base),
        polygon([(0.56, -0.4), (0.6, -1.0), (0.1, -0.72)], c.base),
        *details(polygon([(-0.46, -0.56), (-0.5, -0.84), (-0.24, -0.7)], c.dark),
                 polygon([(0.46, -0.56), (0.5, -0.84), (0.24, -0.7)], c.dark)),
        ellipse(0.0, -0.34, 0.62, 0.44, c.base),
        *details(ellipse(0.0, -0.14, 0.22, 0.15, c.light), polygon([(-0.1, -0.24), (0.1, -0.24), (0.0, -0.1)], INK)),
        *eye(-0.27, -0.4, c.dark, 0.15), *eye(0.27, -0.4, c.dark, 0.15),
    ],
    "house": lambda c: [
        box(0.36, -0.86, 0.6, -0.3, STEEL),
        box(-0.76, -0.2, 0.76, 1.0, c.base),
        polygon([(-1.0, -0.06), (0.0, -1.0), (1.0, -0.06)], c.dark),
        box(-0.2, 0.4, 0.2, 1.0, CREAM, 0.06),
        box(-0.6, 0.14, -0.3, 0.46, GLASS), box(0.3, 0.14, 0.6, 0.46, GLASS),
        ellipse(0.0, -0.4, 0.15, 0.15, GLASS),
    ],
    "car": lambda c: [
        blob([(-0.7, 0.2), (-0.48, -0.32), (0.0, -0.42), (0.34, -0.3), (0.62, 0.2)], c.base),
        polygon([(-0.48, 0.12), (-0.36, -0.2), (-0.1, -0.25), (-0.1, 0.12)], GLASS),
        polygon([(0.06, 0.12), (0.06, -0.25), (0.26, -0.18), (0.44, 0.12)], GLASS),
        blob([(-1.0, 0.3), (-0.8, 0.12), (0.0, 0.14), (0.7, 0.16), (1.0, 0.36), (1.0, 0.68), (0.0, 0.74), (-1.0, 0.68)],
             c.base),
        *details(box(-1.0, 0.54, 1.0, 0.7, c.dark, 0.08), ellipse(0.9, 0.36, 0.1, 0.11, (255, 240, 170))),
        *wheel(-0.54, 0.73), *wheel(0.54, 0.73),
    ],
    "boat": lambda c: [
        stroke([(0.0, 0.5), (0.0, -0.94)], 0.11, BARK),
        polygon([(0.1, -0.92), (0.1, 0.26), (0.84, 0.26)], c.light),
        polygon([(-0.1, -0.66), (-0.1, 0.26), (-0.66, 0.26)], c.light),
        blob([(-0.98, 0.4), (0.0, 0.46), (0.98, 0.4), (0.66, 0.9), (0.0, 1.0), (-0.66, 0.9)], c.base),
        *details(*(ellipse(x, 0.68, 0.11, 0.11, WHITE) for x in (-0.36, 0.0, 0.36))),
    ],
    "tree": lambda c: [
        polygon([(-0.14, 0.2), (0.14, 0.2), (0.22, 1.0), (-0.22, 1.0)], BARK),
        ellipse(-0.42, 0.08, 0.4, 0.34, c.dark), ellipse(0.42, 0.08, 0.4, 0.34, c.dark),
        ellipse(0.0, 0.1, 0.42, 0.38, c.base),
        ellipse(-0.32, -0.34, 0.42, 0.4, c.base), ellipse(0.34, -0.3, 0.42, 0.4, c.base),
        ellipse(0.0, -0.58, 0.42, 0.4, c.base), *details(ellipse(0.0, -0.2, 0.44, 0.4, c.base)),
        *details(ellipse(-0.16, -0.62, 0.17, 0.13, c.light, -30), ellipse(-0.46, -0.3, 0.13, 0.11, c.light, -30)),
    ],
    "bird": lambda c: [
        stroke([(-0.12, 0.6), (-0.12, 0.95)], 0.11, BEAK), stroke([(0.2, 0.6), (0.2, 0.95)], 0.11, BEAK),
        polygon([(-0.5, 0.28), (-1.0, -0.16), (-0.98, 0.28), (-0.6, 0.5)], c.dark),
        polygon([(0.62, -0.58), (1.02, -0.38), (0.62, -0.22)], BEAK),
        blob([(0.3, -0.92), (0.68, -0.56), (0.62, 0.1), (0.36, 0.6), (-0.2, 0.72), (-0.66, 0.36), (-0.4, -0.1),
              (-0.1, -0.6)], c.base),
        *details(blob([(0.5, -0.02), (0.42, 0.44), (0.06, 0.62), (0.14, 0.2)], c.light)),
        blob([(-0.62, 0.2), (-0.3, -0.12), (0.12, 0.02), (0.0, 0.4), (-0.4, 0.46)], c.dark),
        *eye(0.36, -0.5, c.dark, 0.16),
    ],
    "mushroom": lambda c: [
        blob([(-0.22, -0.1), (0.22, -0.1), (0.26, 0.5), (0.38, 0.92), (0.0, 1.0), (-0.38, 0.92), (-0.26, 0.5)], CREAM),
        *details(ellipse(0.0, 0.02, 0.6, 0.15, (214, 196, 170))),
        blob([(-0.98, 0.0), (-0.86, -0.5), (-0.4, -0.92), (0.4, -0.92), (0.86, -0.5), (0.98, 0.0), (0.5, 0.04), (0.0, -0.04),
              (-0.5, 0.04)], c.base),
        *details(*(ellipse(x, y, rx, ry, c.dark if c.light == WHITE else WHITE)
                   for x, y, rx, ry in ((-0.5, -0.34, 0.17, 0.17), (0.06, -0.6, 0.19, 0.17), (0.52, -0.28, 0.16, 0.16)))),
    ],
    "cup": lambda c: [
        stroke([(0.46, -0.3), (0.9, -0.34), (0.96, 0.12), (0.5, 0.4)], 0.17, c.dark),
        blob([(-0.7, -0.62), (0.0, -0.62), (0.7, -0.62), (0.66, 0.2), (0.46, 0.9), (0.0, 0.98), (-0.46, 0.9), (-0.66, 0.2)],
             c.base),
        ellipse(0.0, -0.6, 0.72, 0.24, c.light),
        *details(ellipse(0.0, -0.56, 0.54, 0.15, (104, 68, 52)), ellipse(-0.13, 0.18, 0.17, 0.16, CREAM),
                 ellipse(0.13, 0.18, 0.17, 0.16, CREAM), polygon([(-0.28, 0.25), (0.28, 0.25), (0.0, 0.56)], CREAM)),
    ],
    "robot": lambda c: [
        stroke([(0.0, -0.7), (0.0, -0.94)], 0.1, STEEL), ellipse(0.0, -0.94, 0.12, 0.12, c.dark),
        box(-0.4, 0.6, -0.12, 1.0, STEEL, 0.08), box(0.12, 0.6, 0.4, 1.0, STEEL, 0.08),
        stroke([(-0.5, 0.16), (-0.74, 0.3), (-0.76, 0.56)], 0.19, STEEL),
        stroke([(0.5, 0.16), (0.76, 0.0), (0.8, -0.26)], 0.19, STEEL),
        box(-0.54, 0.0, 0.54, 0.8, c.base, 0.12),
        *details(box(-0.3, 0.18, 0.3, 0.58, c.dark, 0.08), ellipse(-0.13, 0.38, 0.09, 0.09, (255, 232, 130)),
                 ellipse(0.13, 0.38, 0.09, 0.09, WHITE)),
        box(-0.62, -0.78, 0.62, -0.04, c.base, 0.16),
        *eye(-0.26, -0.48, c.dark, 0.16), *eye(0.26, -0.48, c.dark, 0.16),
        *details(box(-0.22, -0.24, 0.22, -0.13, INK, 0.05)),
    ],
    "fish": lambda c: [
        blob([(-0.5, 0.14), (-0.98, -0.36), (-0.9, 0.14), (-0.98, 0.64)], c.dark),
        blob([(-0.36, -0.26), (-0.1, -0.7), (0.36, -0.6), (0.4, -0.2)], c.dark),
        blob([(-0.2, 0.5), (0.0, 0.98), (0.3, 0.88), (0.3, 0.5)], c.dark),
        blob([(-0.7, 0.14), (-0.36, -0.24), (0.2, -0.42), (0.74, -0.2), (0.98, 0.16), (0.72, 0.5), (0.2, 0.7), (-0.36, 0.52)],
             c.base),
        *details(blob([(-0.3, 0.34), (0.2, 0.3), (0.72, 0.36), (0.24, 0.6)], c.light),
                 ellipse(0.0, 0.2, 0.2, 0.13, c.dark, -20)),
        *eye(0.54, -0.02, c.dark, 0.17),
    ],
    "flower": lambda c: [
        stroke([(0.0, 0.0), (0.04, 0.5), (0.0, 0.96)], 0.14, STEM),
        ellipse(0.3, 0.6, 0.3, 0.14, STEM, -28), ellipse(-0.28, 0.74, 0.3, 0.14, STEM, 28),
        *[ellipse(x, y, 0.25, 0.3, c.base if i % 2 else mix(c.base, c.dark, 0.5), turn)
          for i, (x, y, turn) in enumerate(PETALS)],
        ellipse(0.0, -0.34, 0.24, 0.24, (255, 226, 128)),
        *details(ellipse(-0.09, -0.37, 0.055, 0.06, INK), ellipse(0.09, -0.37, 0.055, 0.06, INK)),
    ],
    "rocket": lambda c: [
        box(-0.24, 0.7, 0.24, 1.0, STEEL, 0.05),
        blob([(-0.3, 0.2), (-0.74, 0.6), (-0.7, 1.0), (-0.28, 0.8)], c.dark),
        blob([(0.3, 0.2), (0.74, 0.6), (0.7, 1.0), (0.28, 0.8)], c.dark),
        blob([(0.0, -1.0), (0.3, -0.64), (0.43, -0.1), (0.4, 0.5), (0.28, 0.86), (-0.28, 0.86), (-0.4, 0.5), (-0.43, -0.1),
              (-0.3, -0.64)], c.base),
        *details(blob([(0.0, -1.0), (0.2, -0.8), (0.32, -0.56), (0.0, -0.5), (-0.32, -0.56), (-0.2, -0.8)], c.dark)),
        ellipse(0.0, -0.1, 0.26, 0.26, WHITE),
        *details(ellipse(0.0, -0.1, 0.17, 0.17, (92, 132, 164)), box(-0.36, 0.42, 0.36, 0.58, c.light, 0.04)),
    ],
    "umbrella": lambda c: [
        stroke([(0.0, -0.9), (0.0, 0.3), (0.0, 0.74), (0.16, 0.93), (0.34, 0.76)], 0.13, STEEL),
        ellipse(0.0, -0.94, 0.08, 0.1, STEEL),
        blob([*DOME, (0.66, -0.08), (0.33, 0.06), (0.0, -0.08), (-0.33, 0.06), (-0.66, -0.08)], c.base),
        *details(blob([(0.0, -0.92), (0.28, -0.46), (0.33, 0.04), (0.0, -0.08), (-0.33, 0.04), (-0.28, -0.46)], c.light)),
    ],
    "teapot": lambda c: [
        stroke([(-0.5, -0.24), (-0.92, -0.24), (-0.94, 0.3), (-0.5, 0.6)], 0.17, c.dark),
        blob([(0.4, 0.2), (0.66, -0.06), (0.84, -0.46), (1.04, -0.4), (0.9, 0.2), (0.5, 0.72)], c.base),
        ellipse(0.0, 0.28, 0.7, 0.62, c.base),
        box(-0.4, 0.8, 0.4, 1.0, c.dark, 0.08),
        ellipse(0.0, -0.3, 0.42, 0.17, c.dark), ellipse(0.0, -0.52, 0.13, 0.13, c.dark),
        *details(*(ellipse(x, y, 0.13, 0.13, CREAM) for x, y in DOTS), ellipse(0.0, 0.3, 0.12, 0.12, c.dark)),
    ],
    "snail": lambda c: [
        stroke([(0.6, 0.5), (0.46, -0.2)], 0.11, c.light), stroke([(0.72, 0.5), (0.88, -0.2)], 0.11, c.light),
        blob([(-1.0, 0.98), (-0.5, 0.72), (0.3, 0.7), (0.4, 0.26), (0.68, 0.12), (0.96, 0.32), (0.92, 0.76), (0.66, 1.0)],
             c.light),
        ellipse(-0.24, 0.12, 0.66, 0.66, c.base),
        *details(stroke(SPIRAL, 0.13, c.dark)),
        *eye(0.44, -0.22, c.dark, 0.15), *eye(0.88, -0.22, c.dark, 0.15),
        *details(stroke([(0.68, 0.62), (0.78, 0.66), (0.86, 0.6)], 0.08, INK)),
    ],
}  # fmt: skip
