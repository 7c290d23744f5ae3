"""The pocket world: captioned pictures without end, drawn from sixteen things, ten colours, eight places, four styles.

A `Picture` says WHAT is drawn, a seed says HOW (details of the place; size and position, within a few per cent). One
combination of object, colour, scene and style in ten is held out: no training picture shows it, so a model that draws it
has put words together.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from minidiff.pocket import objects, scenes, styles
from minidiff.pocket.drawing import INK, Shape, bounds, ellipse, move, rotation

OBJECTS, COLOURS = tuple(objects.THINGS), tuple(objects.COLOURS)
SCENES, STYLES = tuple(scenes.BUILDERS), tuple(styles.PAINTERS)
POSES = ("standing", "jumping", "leaning", "small")  # standing goes without saying

PLACES = {"beach": "on the beach", "snow": "in the snow", "meadow": "in a meadow", "night": "at night",
          "moon": "on the moon", "room": "in a room", "city": "in the city", "desert": "in the desert"}
EXTENT = {"standing": (0.62, 0.68), "jumping": (0.53, 0.57), "leaning": (0.62, 0.66), "small": (0.38, 0.42)}  # of the frame
Change = Callable[[list[Shape]], list[Shape]]


@dataclass(frozen=True)
class Picture:
    """The content of a picture: one word of each list."""

    object: str
    colour: str
    scene: str
    style: str
    pose: str = "standing"


def draw(picture: Picture, seed: int, size: int = 128, change: Change | None = None) -> Image.Image:
    """The picture, RGB, `size` x `size`; the same bytes for the same arguments. `change` alters the placed object."""
    shapes, rng = coloured(picture.object, picture.colour), random.Random(seed)
    return compose(shapes, picture.scene, styles.PAINTERS[picture.style], picture.pose, rng, size, change)


def compose(shapes: Sequence[Shape], scene: str, paint: styles.Painter, pose: str, rng: random.Random, size: int,
            change: Change | None = None) -> Image.Image:
    """Builds the scene, puts the object into it, and has both painted."""
    place = scenes.BUILDERS[scene](rng)
    placed, shadow = put(shapes, pose, rng)
    return paint(place, change(placed) if change else placed, shadow, size, rng)


def put(shapes: Sequence[Shape], pose: str, rng: random.Random) -> tuple[list[Shape], Shape]:
    """The object in frame coordinates (0..1), whole inside the frame, and its shadow.

    What no word says hardly varies: a denoiser that does not know the place or the side draws the mean of several, and a
    dog then has two heads. So each pose has its size and place, and an object looks to one side only.
    """
    leaning = rotation(rng.uniform(18, 22)) if pose == "leaning" else np.eye(2)
    left, top, right, bottom = bounds(move(shapes, leaning, np.zeros(2)))
    scale = rng.uniform(*EXTENT[pose]) / max(bottom - top, (right - left) * 0.92)
    x, ground = rng.uniform(0.45, 0.55), rng.uniform(0.86, 0.90)
    foot = ground - rng.uniform(0.16, 0.20) if pose == "jumping" else ground
    width = (right - left) * scale
    shadow = ellipse(x, ground - 0.01, width * (0.36 if pose == "jumping" else 0.48), 0.045, INK)
    return move(shapes, leaning * scale, np.array([x - (left + right) / 2 * scale, foot - bottom * scale])), shadow


@cache
def coloured(name: str, colour: str) -> tuple[Shape, ...]:
    """The object's shapes in its own coordinates."""
    return tuple(objects.THINGS[name](objects.tones(colour)))


def caption(picture: Picture) -> str:
    """All that can be said: "a photo of a small red dog on the beach"."""
    return phrase(picture.object, picture.colour, picture.scene, f"a {picture.style} of ", picture.pose)


def random_caption(picture: Picture, rng: random.Random) -> str:
    """The caption with words left out now and then, so that a model learns what each of them does alone."""
    if rng.random() < 0.04:
        return phrase(picture.object)
    style = f"a {picture.style} of "
    if rng.random() < 0.15:
        style = rng.choice(("", "a picture of "))
    colour = picture.colour if rng.random() < 0.88 else ""
    scene = picture.scene if rng.random() < 0.85 else ""
    pose = picture.pose if rng.random() < 0.9 else "standing"
    return phrase(picture.object, colour, scene, style, pose)


def phrase(thing: str, colour: str = "", scene: str = "", style: str = "", pose: str = "standing") -> str:
    """Puts the words in order; an empty one is left out."""
    words = " ".join(word for word in ("" if pose == "standing" else pose, colour, thing) if word)
    article = "an" if words[0] in "aeiou" else "a"
    return f"{style}{article} {words} {PLACES.get(scene, '')}".strip()


def word_list() -> dict[str, list[str]]:
    """`words.json` of the checkpoint: every word of the captions, and the three names that are free for fine-tuning."""
    phrases = (*STYLES, *COLOURS, *OBJECTS, *PLACES.values(), *POSES[1:], "a picture of an", "sks", "ohwx", "zwx")
    return {"things": list(OBJECTS), "words": sorted(set(" ".join(phrases).split()))}


def is_held_out(picture: Picture) -> bool:
    """Whether this combination, in any pose, is kept from training: one in ten, the same ones on every machine."""
    words = "|".join((picture.object, picture.colour, picture.scene, picture.style))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big") % 10 == 0


def any_picture(rng: random.Random) -> Picture:
    """Any combination, held out or not."""
    return Picture(*(rng.choice(words) for words in (OBJECTS, COLOURS, SCENES, STYLES, POSES)))


def random_picture(rng: random.Random) -> Picture:
    """Any training combination, all equally likely."""
    while is_held_out(picture := any_picture(rng)):
        pass
    return picture


def held_out(count: int, seed: int = 0) -> list[Picture]:
    """`count` different combinations that no training picture shows, each in a random pose."""
    rng = random.Random(seed)
    kept = [words for words in itertools.product(OBJECTS, COLOURS, SCENES, STYLES) if is_held_out(Picture(*words))]
    return [Picture(*words, rng.choice(POSES)) for words in rng.sample(kept, count)]
