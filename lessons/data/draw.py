"""Draw the pictures of the lessons: a dog that the pocket world does not contain, and drawings in chalk, a style that it lacks.

    python lessons/data/draw.py FOLDER      writes FOLDER/dog and FOLDER/chalk
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from minidiff.pocket.drawing import INK, RGB, WHITE, Shape, blob, box, details, ellipse, mix, stroke
from minidiff.pocket.objects import CREAM, eye
from minidiff.pocket.scenes import Scene
from minidiff.pocket.styles import OVER, PAINTERS, backdrop, enlarged, paint, soften
from minidiff.pocket.world import coloured, compose, phrase

CHOCOLATE: RGB = (98, 58, 40)
CARAMEL: RGB = (214, 150, 84)
TEAL: RGB = (0, 168, 160)
PAVEMENT: RGB = (150, 148, 148)
PAVEMENT_NEAR: RGB = (136, 135, 136)
CHALK: RGB = (252, 250, 242)


def subject() -> list[Shape]:
    """The dog of the lessons: cream and chocolate, a caramel face, long floppy ears and a teal scarf."""
    shade = mix(CREAM, CHOCOLATE, 0.25)
    return [
        stroke([(-0.72, 0.24), (-0.96, 0.0), (-0.98, -0.3)], 0.2, CHOCOLATE),
        box(-0.5, 0.4, -0.26, 0.96, shade, 0.1), box(0.2, 0.4, 0.44, 0.96, shade, 0.1),
        box(-0.78, 0.3, -0.5, 1.0, CREAM, 0.12), box(-0.08, 0.4, 0.2, 1.0, CREAM, 0.12),
        blob([(-0.84, 0.2), (-0.6, -0.04), (0.0, 0.0), (0.42, 0.1), (0.4, 0.56), (-0.1, 0.66), (-0.74, 0.6)], CREAM),
        blob([(-0.84, 0.2), (-0.6, -0.04), (-0.16, -0.02), (-0.14, 0.32), (-0.46, 0.46), (-0.78, 0.4)], CHOCOLATE),
        box(0.14, 0.14, 0.4, 0.7, TEAL, 0.1),
        box(-0.02, 0.0, 0.86, 0.26, TEAL, 0.12),
        ellipse(0.44, -0.4, 0.5, 0.46, CARAMEL),
        blob([(0.1, -0.8), (-0.16, -0.74), (-0.26, -0.3), (-0.2, 0.1), (0.02, 0.06), (0.08, -0.4)], CHOCOLATE),
        blob([(0.78, -0.8), (1.04, -0.74), (1.14, -0.3), (1.08, 0.1), (0.86, 0.06), (0.8, -0.4)], CHOCOLATE),
        *details(ellipse(0.46, -0.16, 0.29, 0.2, WHITE), ellipse(0.46, -0.24, 0.13, 0.09, INK)),
        *eye(0.26, -0.5, CARAMEL), *eye(0.64, -0.5, CARAMEL),
    ]


def chalk(scene: Scene, shapes: Sequence[Shape], shadow: Shape, size: int, rng: random.Random) -> Image.Image:
    """Coloured chalk on grey pavement. No picture of the world looks so: a style to teach with a few examples.

    (On a black board it could not be taught in minutes: see `noise_offset` on what brightness is to a diffusion model.)
    """
    far, near = ([rubbed(shape, 0.2) for shape in part] for part in (scene.far, scene.near))
    ground = replace(scene, sky=(PAVEMENT, PAVEMENT), ground=(PAVEMENT_NEAR, PAVEMENT_NEAR), far=far, near=near)
    canvas = enlarged(backdrop(ground, size, line=mix(PAVEMENT, CHALK, 0.55)), size * OVER)
    paint(canvas, [rubbed(shape, 0.9 if shape.detail else 0.5) for shape in shapes],
          line=[mix(shape.fill, CHALK, 0.6) for shape in shapes], width=0.034)
    return soften(canvas.reduce(OVER), 0.6)


def rubbed(shape: Shape, strength: float) -> Shape:
    """The shape filled with a thin layer of chalk, through which the pavement shows."""
    return replace(shape, fill=mix(PAVEMENT, shape.fill, strength))


def write_dog(folder: Path, size: int = 512) -> None:
    """Photos 01.png ... 05.png of the dog in three plain places."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, scene in enumerate(("meadow", "room", "beach", "meadow", "room"), start=1):
        image = compose(subject(), scene, PAINTERS["photo"], "standing", random.Random(seed), size)
        image.save(folder / f"{seed:02d}.png", optimize=True)


def write_chalk(folder: Path, size: int = 256) -> None:
    """Twelve pictures and their captions, "an ohwx of a red dog on the beach", in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed, (thing, colour, scene, pose) in enumerate(CHALK_DRAWINGS, start=1):
        image = compose(coloured(thing, colour), scene, chalk, pose, random.Random(seed), size)
        image.save(folder / f"{seed:02d}.png", optimize=True)
        text = phrase(thing, colour, scene, "an ohwx of ", pose)
        rows.append(json.dumps({"file_name": f"{seed:02d}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


CHALK_DRAWINGS = (
    ("dog", "red", "beach", "jumping"), ("cat", "white", "room", "standing"), ("robot", "yellow", "city", "standing"),
    ("snail", "blue", "meadow", "small"), ("car", "green", "desert", "standing"), ("flower", "pink", "moon", "leaning"),
    ("boat", "orange", "beach", "standing"), ("house", "brown", "snow", "standing"), ("bird", "cyan", "night", "standing"),
    ("mushroom", "purple", "meadow", "standing"), ("teapot", "red", "room", "standing"), ("rocket", "blue", "night", "leaning"),
)  # fmt: skip


if __name__ == "__main__":
    write_dog(Path(sys.argv[1]) / "dog")
    write_chalk(Path(sys.argv[1]) / "chalk")
