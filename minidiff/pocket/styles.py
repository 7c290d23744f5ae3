"""The four ways to paint a scene and an object: photo, drawing, watercolor, pixel art.

Objects are painted on a canvas OVER times as large and averaged down (no ringing, unlike Lanczos: a VAE would spend its
capacity on the halos). All that is soft - shadows, light, washes - is computed on tiny images and enlarged.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minidiff.pocket.drawing import INK, RGB, Shape, fill, mix, outline, silhouette
from minidiff.pocket.scenes import Scene

OVER = 4
PAPER: RGB = (253, 251, 246)
LINE = 0.55  # how far an outline's colour lies from its fill towards ink: black lines cost the VAE 3 dB
EDGE = 13  # cells along the watercolor's wavy border
SOFT = 32  # side of the images on which soft things are computed


def photo(scene: Scene, shapes: Sequence[Shape], shadow: Shape, size: int, rng: random.Random) -> Image.Image:
    """Smooth colours, a background slightly out of focus, light from the upper left, a soft shadow."""
    picture = soften(backdrop(scene, size).reduce(2), 1.0)
    mask = silhouette([shape for shape in shapes if not shape.detail], size * 2).reduce(2)
    lay(picture, scene.halo, mask, 2.0, 0.42)
    lay(picture, scene.shadow, silhouette([shadow], SOFT * OVER), 1.2, 0.75)
    canvas = enlarged(picture, size * OVER)
    paint(canvas, shapes)
    return lit(canvas.reduce(OVER), mask)


def drawing(scene: Scene, shapes: Sequence[Shape], shadow: Shape, size: int, rng: random.Random) -> Image.Image:
    """Coloured pencil on paper: a pale scene, flat fills, outlines in a darker tone of each fill."""
    pencil = bleached(scene.shadow, 0.55)
    canvas = enlarged(backdrop(scene, size, paper=0.66, line=pencil), size * OVER)
    fill(ImageDraw.Draw(canvas), shadow, size * OVER, pencil)
    paint(canvas, shapes, line=[mix(shape.fill, INK, LINE) for shape in shapes], width=0.024)
    return soften(canvas.reduce(OVER), 0.5)


def watercolor(scene: Scene, shapes: Sequence[Shape], shadow: Shape, size: int, rng: random.Random) -> Image.Image:
    """Thin washes with uneven pigment, soft edges, and a border of bare paper."""
    picture = soften(backdrop(scene, size, paper=0.36).reduce(2), 2.6)
    lay(picture, bleached(scene.shadow, 0.3), silhouette([shadow], SOFT * OVER), 1.6, 0.8)
    picture = on_paper(picture, rng, darkest=0.66, border=True)
    canvas = enlarged(picture, size * OVER)
    washed = [replace(shape, fill=mix(shape.fill, PAPER, 0.04 if shape.detail else 0.12)) for shape in shapes]
    rims = [mix(shape.fill, (60, 40, 80), 0.4) for shape in washed]
    paint(canvas, washed, line=rims, width=0.016)
    return on_paper(soften(canvas.reduce(OVER), 0.8), rng, darkest=0.8)


def pixel_art(scene: Scene, shapes: Sequence[Shape], shadow: Shape, size: int, rng: random.Random) -> Image.Image:
    """A 32 x 32 sprite in few colours, striped skies included, enlarged to blocks."""
    scene = replace(scene, far=[snapped(shape) for shape in scene.far], near=[snapped(shape) for shape in scene.near])
    canvas = enlarged(backdrop(scene, size, bands=5), size * OVER)
    pen = ImageDraw.Draw(canvas)
    fill(pen, shadow, canvas.width, mix(scene.shadow, scene.ground[1], 0.25))
    for shape in shapes:  # only the outer contour stays visible: the fills come on top
        if not shape.detail:
            outline(pen, shape, canvas.width, canvas.width * 2 / SOFT, mix(shape.fill, INK, LINE))
    paint(canvas, [snapped(shape) for shape in shapes])
    return enlarged(enlarged(canvas, SOFT), size)  # the middle of each block: no in-between colours


def snapped(shape: Shape) -> Shape:
    """A small detail moved and stretched onto whole blocks, as a pixel artist would place an eye."""
    low, high = shape.points.min(axis=0) * SOFT, shape.points.max(axis=0) * SOFT
    if not shape.detail or (high - low).max() > 5:
        return shape
    blocks = (high - low).round().clip(1)
    points = ((shape.points * SOFT - low) / (high - low) * blocks + (low + (high - low - blocks) / 2).round()) / SOFT
    return replace(shape, points=points)


def backdrop(scene: Scene, size: int, paper: float = 0.0, line: RGB | None = None, bands: int = SOFT) -> Image.Image:
    """The scene at twice the size: bleached by `paper`, outlined with `line`, its gradients in so many `bands`."""
    side = 2 * size
    far, near = ([replace(shape, fill=bleached(shape.fill, paper)) for shape in part] for part in (scene.far, scene.near))
    picture = gradient(scene.sky, 0.0, side, paper, bands)
    paint(picture, far, line)
    picture.paste(gradient(scene.ground, 0.5, side, paper, bands), mask=silhouette([scene.edge], side))
    if line:
        outline(ImageDraw.Draw(picture), scene.edge, side, 0.02 * side, line)
    paint(picture, near, line)
    return picture


def paint(canvas: Image.Image, shapes: Sequence[Shape], line: RGB | list[RGB] | None = None, width: float = 0.02) -> None:
    """Fills the shapes back to front; with `line` (one colour, or one for each) each large one gets its outline."""
    pen, scale = ImageDraw.Draw(canvas), canvas.width
    for i, shape in enumerate(shapes):
        fill(pen, shape, scale)
        if line and not shape.detail:
            outline(pen, shape, scale, width * scale, line[i] if isinstance(line, list) else line)


def gradient(colours: tuple[RGB, RGB], start: float, side: int, paper: float, bands: int) -> Image.Image:
    """A vertical gradient that begins at height `start`; few bands show as stripes, SOFT of them are smooth."""
    share = np.clip((np.linspace(0, 1, SOFT) - start) / (1 - start), 0, 1)
    share = (share * (bands - 1)).round() / (bands - 1) if bands < SOFT else share
    top, bottom = (np.asarray(bleached(colour, paper)) for colour in colours)
    column = top + (bottom - top) * share[:, None, None]  # H 1 3
    smooth = Image.Resampling.BILINEAR if bands == SOFT else Image.Resampling.NEAREST
    return Image.fromarray(column.round().astype(np.uint8)).resize((side, side), smooth)


def soften(picture: Image.Image, radius: float) -> Image.Image:
    """Blur with a radius given in pixels of a 128-pixel picture."""
    return picture.filter(ImageFilter.GaussianBlur(radius * picture.width / 128))


def tiny(mask: Image.Image, radius: float) -> Image.Image:
    """The mask's soft neighbourhood, SOFT pixels wide; `radius` in these pixels."""
    return mask.resize((SOFT, SOFT), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(radius))


def lay(picture: Image.Image, colour: RGB, mask: Image.Image, radius: float, strength: float) -> None:
    """Lays a colour over the picture, softly around the mask."""
    soft = tiny(mask, radius).point(lambda value: round(value * strength))
    picture.paste(colour, mask=soft.resize(picture.size, Image.Resampling.BICUBIC))


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """Each pixel becomes a block, so that averaging the blocks later gives back exactly this picture."""
    return picture.resize((side, side), Image.Resampling.NEAREST)


def bleached(colour: RGB, paper: float) -> RGB:
    """The colour thinned towards white paper; some chroma is put back, or dark blue would turn into grey."""
    pale = np.asarray(mix(colour, PAPER, paper), float)
    vivid = pale.mean() + (pale - pale.mean()) * (1 + 1.5 * paper)
    red, green, blue = (int(value) for value in vivid.round().clip(0, 255))
    return red, green, blue


def lit(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Light from the upper left: a soft relief of the silhouette, its slope along the light's direction."""
    padded = np.pad(np.asarray(tiny(mask, 2.0), np.float32), 2)
    slope = padded[4:, 4:] - padded[:-4, :-4]  # > 0 where the object begins, seen from the light
    relief = Image.fromarray(slope / 255).resize(picture.size, Image.Resampling.BICUBIC)
    light = (np.asarray(relief) * np.asarray(mask, np.float32) / 255)[..., None]  # H W 1
    colours = np.asarray(picture, np.float32)  # H W 3
    highlight = 0.24 * (255 - colours) + 0.2 * colours  # part white, part the colour itself: dark brown must not go grey
    shaded = colours + light.clip(0) * highlight + light.clip(max=0) * 0.46 * colours
    return Image.fromarray(shaded.round().clip(0, 255).astype(np.uint8))


def on_paper(picture: Image.Image, rng: random.Random, darkest: float, border: bool = False) -> Image.Image:
    """Uneven pigment (5 x 5 random strengths from `darkest` to 1, enlarged), with or without a wavy border of bare paper."""
    strength = enlarged_grid([[rng.uniform(darkest, 1.0) for _ in range(5)] for _ in range(5)], picture.size)
    if border:
        depths = [[min(x, y, EDGE - 1 - x, EDGE - 1 - y) for x in range(EDGE)] for y in range(EDGE)]  # cells from the edge
        grid = [[rng.uniform(0.4, 1.0) if depth == 1 else min(depth, 1) for depth in row] for row in depths]
        strength = strength * np.clip(enlarged_grid(grid, picture.size) * 2 - 0.4, 0, 1)
    paper, colours = np.asarray(PAPER, np.float32), np.asarray(picture, np.float32)
    result = paper + (colours - paper) * strength[..., None].clip(0, 1)
    return Image.fromarray(result.round().clip(0, 255).astype(np.uint8))


def enlarged_grid(values: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """A smooth surface, H W, through a few values."""
    return np.asarray(Image.fromarray(np.array(values, np.float32)).resize(size, Image.Resampling.BICUBIC))


Painter = Callable[[Scene, Sequence[Shape], Shape, int, random.Random], Image.Image]
PAINTERS: dict[str, Painter] = {"photo": photo, "drawing": drawing, "watercolor": watercolor, "pixel art": pixel_art}
