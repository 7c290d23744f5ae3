"""The training data of the pocket checkpoint: the drawn world.

N pictures   B batch
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.draw.progress import progress
from minidiff.files.atomic import whole_file
from minidiff.pocket.world import Picture, draw, random_picture


@dataclass(frozen=True)
class World:
    """The training pictures: what is on them, and their pixels (N, 128, 128, 3), uint8, left on disk."""

    pictures: list[Picture]
    pixels: np.ndarray

    def batch(self, indices: list[int]) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1]."""
        rows = torch.from_numpy(np.stack([self.pixels[i] for i in indices]))
        return rows.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def load_world(home: Path, count: int) -> World:
    """Picture i is `random_picture(Random(i))`, drawn with seed i; drawn once, then read from `world.npy`."""
    path = home / "world.npy"
    pictures = [random_picture(random.Random(i)) for i in range(count)]
    if not path.exists():
        draw_all(pictures, path)
    pixels = np.load(path, mmap_mode="r")
    if len(pixels) < count:
        raise SettingsError(f"{path} holds {len(pixels)} pictures, --pictures asks for {count}; delete it to draw it again.")
    return World(pictures, pixels[:count])


def draw_all(pictures: list[Picture], path: Path) -> None:
    """Draw every picture into one file, which appears under its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), 128, 128, 3)}
    with whole_file(path) as file:  # not mapped into memory: on a full disk that ends the process without a word
        np.lib.format.write_array_header_1_0(file, about)
        for i, picture in enumerate(progress(pictures, "picture", "drawing")):
            file.write(np.asarray(draw(picture, i)).tobytes())


def lookalikes(pictures: list[Picture]) -> list[list[list[int]]]:
    """The pictures of each colour, place and style together, and in these groups those of each object."""
    groups: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for i, p in enumerate(pictures):
        groups.setdefault((p.colour, p.scene, p.style), {}).setdefault(p.object, []).append(i)
    return [list(objects.values()) for objects in groups.values()]


def hard_batch(groups: list[list[list[int]]], count: int, draws: random.Random) -> list[int]:
    """`count` pictures from a few groups, one of each object: all that tells neighbours apart is their shape.

    Of random pictures hardly two share colour, place and style, so that CLIP could tell captions apart without ever
    looking at the object; and then its words for dog and fish would be all but the same to the U-Net.
    """
    indices: list[int] = []
    while len(indices) < count:
        indices += [draws.choice(objects) for objects in draws.choice(groups)]
    return indices[:count]
