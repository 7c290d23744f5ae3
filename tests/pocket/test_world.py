"""The pocket world: deterministic pictures, honest captions, and combinations that training never sees."""

import colorsys
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiff.pocket import world
from minidiff.pocket.world import (
    COLOURS,
    OBJECTS,
    POSES,
    SCENES,
    STYLES,
    Picture,
    caption,
    draw,
    held_out,
    is_held_out,
    random_caption,
    random_picture,
)

CAT = Picture("cat", "blue", "snow", "photo")


def pixels(picture: Picture, seed: int = 0, size: int = 128) -> np.ndarray:
    return np.asarray(draw(picture, seed, size), dtype=float)


@pytest.mark.parametrize("style", STYLES)
def test_same_seed_same_bytes_other_seed_other_picture(style: str) -> None:
    picture = Picture("dog", "red", "beach", style)
    assert draw(picture, 3).tobytes() == draw(picture, 3).tobytes()
    assert draw(picture, 3).tobytes() != draw(picture, 4).tobytes()


def test_every_word_can_be_drawn() -> None:
    for i in range(max(len(OBJECTS) * 2, len(SCENES) * len(STYLES) * len(POSES))):
        picture = Picture(OBJECTS[i % 16], COLOURS[i % 10], SCENES[i % 8], STYLES[i // 8 % 4], POSES[i // 32 % 4])
        image = draw(picture, i)
        assert (image.size, image.mode) == ((128, 128), "RGB")


def test_every_colour_of_every_object_has_its_own_shapes() -> None:
    for name in OBJECTS:
        fills = {colour: [shape.fill for shape in world.coloured(name, colour)] for colour in COLOURS}
        assert len({tuple(fill) for fill in fills.values()}) == len(COLOURS)


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("name", OBJECTS)
def test_object_is_whole_inside_the_frame(name: str, pose: str) -> None:
    rng = random.Random(0)
    for _ in range(8):
        shapes, _ = world.put(world.coloured(name, "red"), pose, rng)
        left, top, right, bottom = world.bounds(shapes)
        assert 0 < left < right < 1 and 0 < top < bottom < 1


@pytest.mark.parametrize("pose", POSES)
def test_what_no_word_says_hardly_varies(pose: str) -> None:
    """Size and place by some per cent of the frame; never a mirror image; a lean is always one to the right."""
    shapes, rng = world.coloured("dog", "red"), random.Random(0)
    drawn = [world.put(shapes, pose, rng)[0] for _ in range(50)]
    frames = np.array([world.bounds(some) for some in drawn])  # left, top, right, bottom
    assert (np.ptp(frames, axis=0) < 0.17).all() and np.ptp(frames[:, 3] - frames[:, 1]) < 0.08
    upright = shapes[0].points - shapes[0].points.mean(axis=0)
    for some in drawn:
        matrix = np.linalg.lstsq(upright, some[0].points - some[0].points.mean(axis=0))[0]
        assert np.linalg.det(matrix) > 0
        angle = np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0]))  # y points down: > 0 is clockwise
        assert 18 <= angle <= 22 if pose == "leaning" else abs(angle) < 1e-6


@pytest.mark.parametrize("colour, hue", [("red", 0), ("yellow", 50), ("green", 135), ("cyan", 183), ("blue", 224),
                                         ("purple", 274)])
def test_the_colour_is_there(colour: str, hue: float) -> None:
    """What changes when only the colour changes is the object: its median colour has the word's hue."""
    picture, other = pixels(Picture("car", colour, "room", "photo")), pixels(Picture("car", "white", "room", "photo"))
    changed = np.abs(picture - other).sum(axis=2) > 60
    assert changed.mean() > 0.06
    found = 360 * colorsys.rgb_to_hsv(*np.median(picture[changed], axis=0) / 255)[0]
    assert abs((found - hue + 180) % 360 - 180) < 12


def test_larger_pictures_are_the_same_drawing() -> None:
    large = np.asarray(draw(CAT, 5, 256).reduce(2), dtype=float)
    assert np.abs(large - pixels(CAT, 5)).mean() < 3


def test_pixel_art_lies_on_a_grid_of_four() -> None:
    image = pixels(Picture("fish", "pink", "night", "pixel art"))
    blocks = image.reshape(32, 4, 32, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_captions() -> None:
    assert caption(Picture("dog", "red", "beach", "photo")) == "a photo of a red dog on the beach"
    assert caption(Picture("cat", "orange", "snow", "watercolor")) == "a watercolor of an orange cat in the snow"
    assert caption(Picture("car", "green", "city", "pixel art", "jumping")) == "a pixel art of a jumping green car in the city"
    assert caption(Picture("umbrella", "white", "night", "drawing", "small")) == "a drawing of a small white umbrella at night"


def test_random_captions_leave_words_out_and_invent_none() -> None:
    rng, picture = random.Random(0), Picture("umbrella", "red", "moon", "drawing", "leaning")
    captions = {random_caption(picture, rng) for _ in range(500)}
    assert {caption(picture), "an umbrella", "a picture of a leaning red umbrella on the moon"} <= captions
    assert {word for text in captions for word in text.split()} <= set(caption(picture).split()) | {"an", "picture"}
    assert all("umbrella" in text for text in captions)


def test_one_combination_in_ten_is_never_trained_on() -> None:
    rng = random.Random(1)
    assert not any(is_held_out(random_picture(rng)) for _ in range(3000))
    tests = held_out(400)
    assert all(is_held_out(picture) for picture in tests) and len(set(tests)) == 400
    assert tests == held_out(400) != held_out(400, seed=1)
    assert {picture.object for picture in tests} == set(OBJECTS)


def test_a_pose_is_held_out_with_its_combination() -> None:
    for picture in held_out(20):
        assert all(is_held_out(Picture(picture.object, picture.colour, picture.scene, picture.style, p)) for p in POSES)


def test_pictures_of_the_lessons_are_what_the_code_draws(tmp_path: Path) -> None:
    committed = Path(world.__file__).parents[2] / "lessons/data"
    script = runpy.run_path(str(committed / "draw.py"))
    script["write_chalk"](tmp_path / "chalk")
    script["write_dog"](tmp_path / "dog", size=64)
    for folder in ("chalk", "dog"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(p.name for p in (committed / folder).iterdir())
    for path in sorted((tmp_path / "chalk").glob("*.png")):
        with Image.open(path) as drawn, Image.open(committed / "chalk" / path.name) as kept:
            assert drawn.tobytes() == kept.tobytes(), path.name
    kept = (committed / "chalk" / "metadata.jsonl").read_bytes()
    assert (tmp_path / "chalk" / "metadata.jsonl").read_bytes() == kept
