"""Pictures in and out: any file a camera or an editor writes -> RGB; tensors -> files, contact sheets.

Shapes: B pictures, 3 channels, H rows, W columns; values of tensors lie in [-1, 1].
"""

import contextlib
import io
import json
import math
import struct
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from minidiff.core.errors import DataError
from minidiff.files.atomic import write_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # whatever the file is called; EPS would run Ghostscript
# What Pillow raises for a damaged file, by format and by the place of the damage.
READ_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error)


def load_image(path: Path | str) -> Image.Image:
    """A picture of any usual kind as 8-bit RGB, the way a viewer shows it. Raises DataError for anything else.

    Turned upright by its EXIF mark, 16 bits scaled to 8, transparency laid over white, CMYK and wide-gamut colours brought to
    sRGB, the first frame of an animation (with a warning).
    """
    with open_image(Path(path)) as image:
        profile = image.info.get("icc_profile")
        return _to_srgb(opaque(_upright(image, path)), profile)


def load_mask(path: Path | str) -> Image.Image:
    """A mask as RGBA, or RGB where it has no transparency; otherwise like `load_image`, but for the colour profile."""
    with open_image(Path(path)) as image:
        upright = _upright(image, path)
        return upright.convert("RGBA" if upright.has_transparency_data else "RGB")


def load_weights(path: Path | str) -> Image.Image:
    """A training mask, L: how much each pixel counts. That is its alpha channel, if it has one, else its brightness."""
    mask = load_mask(path)
    return mask.getchannel("A") if mask.mode == "RGBA" else mask.convert("L")


def _upright(image: Image.Image, path: Path | str) -> Image.Image:
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a JPEG with a preview behind it
        warnings.warn(f"{path}: {getattr(image, 'n_frames', '')} frames; only the first is used.", stacklevel=3)
    return _to_8_bit(ImageOps.exif_transpose(image), path)  # reads the pixels too


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a picture; only the header is read at first. DataError for a file that is no picture, or a damaged one."""
    if not path.is_file():
        raise DataError(f"{path}: {'is no picture file' if path.exists() else 'no such file'}. Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a mistake, or a small file that fills the memory
            Image.init()  # else Pillow knows half of the formats
            opened = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: more than 89 million pixels. Reduce it first; training needs 512 on a side.") from error
    except READ_ERRORS as error:
        lfs = path.read_bytes().startswith(b"version https://git-lfs")
        hint = "A git-LFS pointer: run `git lfs pull`" if lfs else "Convert it to PNG or JPEG, or leave it out"
        raise DataError(f"{path}: not a picture that can be read here (JPEG, PNG, WebP, …). {hint}.") from error
    with opened as image:
        try:
            yield image
        except READ_ERRORS as error:
            raise DataError(f"{path}: damaged or cut short ({error}). Copy it again, or leave it out.") from error


def _to_8_bit(image: Image.Image, path: Path | str) -> Image.Image:
    """16-bit gray -> L. Pillow's own conversion clips: all but the darkest 1/256 would be white."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError(f"{path}: 32 bits a channel, of unknown range. Save it with 8 or 16 bits.")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def opaque(image: Image.Image) -> Image.Image:
    """Lay the transparent parts over white -> RGB. A picture without transparency stays as it is."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Any mode without transparency -> RGB, the embedded colour profile applied, unless its curves are those of sRGB."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = {"GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space, "RGB")
            to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
            cube = np.mgrid[0:256:51, 0:256:51, 0:256:51].reshape(3, 36, 6).transpose(1, 2, 0)  # (36, 6, 3), all colours
            moved = np.asarray(to_srgb.apply(Image.fromarray(cube.astype(np.uint8)).convert(mode))) - cube
            if np.abs(moved).max() > 2 or mode != "RGB":
                image = to_srgb.apply(image.convert(mode))
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that cannot be read: the numbers are taken for sRGB, as browsers do
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W), fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


def finished(pictures: Tensor, output_type: str) -> Any:
    """Pictures (B, 3, H, W) in [-1, 1] as "pil"; as "pt", which is in [0, 1]; or as "np", which is (B, H, W, 3)."""
    if output_type == "pil":
        return to_pil(pictures)
    pictures = pictures.float().cpu() / 2 + 0.5
    return pictures if output_type == "pt" else pictures.permute(0, 2, 3, 1).numpy()


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> RGB pictures. Numbers outside are clipped."""
    bytes_ = ((pictures.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in bytes_]


def save_png(image: Image.Image, path: Path | str, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `text` chunks in it, whole or not at all. A1111's key is `parameters`: see `generation_text`."""
    chunks, png = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)  # tEXt; where Latin-1 does not hold the text, iTXt
    image.save(png, format="PNG", pnginfo=chunks)
    write_bytes(Path(path), png.getvalue())


def read_png_text(path: Path | str) -> dict[str, str]:
    """The text chunks of a PNG, wherever they stand in the file; {} for a picture of another format."""
    with open_image(Path(path)) as image:
        image.load()  # chunks may follow the pixels
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}


def generation_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """How a picture was made, in the form A1111 reads back: prompt, `Negative prompt: …`, `Steps: 20, Sampler: …`."""
    values = {key: str(value) for key, value in settings.items()}
    quoted = {k: json.dumps(v, ensure_ascii=False) if set(v) & set(',:\n"') else v for k, v in values.items()}
    lines = [prompt, f"Negative prompt: {negative_prompt}" if negative_prompt else ""]
    return "\n".join([*filter(None, lines), ", ".join(f"{key}: {value}" for key, value in quoted.items())])


# --- contact sheets ----------------------------------------------------------------------------------------------------

PAPER, INK, HAIRLINE = "#f7f6f2", "#23262d", "#d9d7d0"  # warm and light: a card, on a white page and on a dark one


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | str]], row_labels: Sequence[str] = (), column_labels: Sequence[str] = (),
    title: str = "", tile: int = 256,
) -> Image.Image:  # fmt: skip
    """A labelled grid of pictures, or texts. Each picture is scaled to `tile` pixels on its longer side; texts are wrapped."""
    size, gap = max(14, round(tile * 0.08)), round(tile * 0.05)
    table: list[list[Image.Image | str]] = [["", *column_labels]]
    table += [[label, *row] for label, row in zip(row_labels or [""] * len(rows), rows, strict=True)]
    cells = [[_text(one, tile, size) if isinstance(one, str) else _tile(one, tile) for one in row] for row in table]
    columns = zip_longest(*cells, fillvalue=Image.new("RGB", (0, 0)))
    widths, heights = [max(cell.width for cell in column) for column in columns], [max(c.height for c in row) for row in cells]
    lefts, tops = ([*accumulate([gap + side if side else 0 for side in sizes], initial=gap)] for sizes in (widths, heights))
    heading = _text(title, lefts[-1], max(18, round(tile * 0.11)))
    below = heading.height + gap if title else 0
    sheet = Image.new("RGB", (max(lefts[-1], heading.width + 2 * gap), tops[-1] + below), PAPER)
    sheet.paste(heading, (gap, gap))
    for row, top, height in zip(cells, tops, heights):
        for cell, left, width in zip(row, lefts, widths):
            sheet.paste(cell, (left + (width - cell.width) // 2, below + top + (height - cell.height) // 2))
    return sheet


def _tile(picture: Image.Image, side: int) -> Image.Image:
    return ImageOps.expand(ImageOps.contain(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS), 1, HAIRLINE)


def _text(text: str, width: int, size: int) -> Image.Image:
    """The text as a picture, in lines of about `width` pixels: a letter is 0.6 of `size` wide on average."""
    lines = textwrap.wrap(text, max(1, round(width / (0.6 * size))))
    block, font = "\n".join(lines), _font(size)
    right = ImageDraw.Draw(Image.new("1", (1, 1))).multiline_textbbox((0, 0), block, font, align="center")[2]
    picture = Image.new("RGB", (math.ceil(right), round(1.4 * size * len(lines))), PAPER)
    ImageDraw.Draw(picture).multiline_text((0, 0), block, INK, font, align="center")
    return picture


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # it brings DejaVu Sans, which knows more letters than Pillow's own font

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
