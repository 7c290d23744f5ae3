"""Canny's edges beside OpenCV's: every pixel, of pictures of all kinds."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from minidiff.draw.canny import canny

cv2 = pytest.importorskip("cv2")


def pictures(kind: str, side: tuple[int, int], seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed)
    if kind == "noise":
        return draws.integers(0, 256, (*side, 3), dtype=np.uint8)
    if kind == "blurred":
        noise = Image.fromarray(draws.integers(0, 256, (*side, 3), dtype=np.uint8))
        return np.asarray(noise.filter(ImageFilter.GaussianBlur(1 + seed % 3))) * (1 + seed % 2)
    if kind == "steps":  # few values: many ties
        return draws.integers(0, 2, (*side, 3), dtype=np.uint8) * 60
    image = Image.new("RGB", side[::-1], tuple(draws.integers(0, 256, 3).tolist()))
    for _ in range(6):
        box = sorted(draws.integers(0, side[1], 2).tolist()), sorted(draws.integers(0, side[0], 2).tolist())
        shape = ImageDraw.Draw(image).ellipse if draws.random() < 0.5 else ImageDraw.Draw(image).rectangle
        shape((box[0][0], box[1][0], box[0][1], box[1][1]), tuple(draws.integers(0, 256, 3).tolist()))
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["noise", "blurred", "steps", "shapes"])
@pytest.mark.parametrize("side", [(1, 1), (1, 2), (2, 2), (3, 7), (24, 31), (64, 48)], ids=str)
def test_every_pixel_is_opencvs(kind: str, side: tuple[int, int]) -> None:
    for seed, thresholds in enumerate([(100, 200), (200, 100), (50.5, 120.9), (0, 0), (300, 900), (10, 30)]):
        colour = pictures(kind, side, seed)
        for pixels in (colour, np.ascontiguousarray(colour[..., ::-1]), np.ascontiguousarray(colour[..., 0])):
            np.testing.assert_array_equal(canny(pixels, *thresholds), cv2.Canny(pixels, *thresholds))


def test_weak_edges_are_kept_where_they_touch_strong_ones() -> None:
    """A step that fades along its length, and the same step without its strong end."""
    fading = np.zeros((8, 64), np.uint8)
    fading[4:] = np.linspace(60, 26, 64).astype(np.uint8)
    assert (canny(fading) > 0).any(0).all() and not canny(fading[:, 32:]).any()
