"""Pictures in and out: any file a camera or an editor writes -> RGB; tensors -> files, contact sheets.

Shapes: B pictures, 3 channels, H rows, W columns; values of tensors lie in [-1, 1].
"""

import contextlib
import functools
import io
import itertools
import json
import math
import re
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from minidiff.core.errors import DataError, MinidiffError
from minidiff.files.atomic import write_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # whatever the file is called; EPS would run Ghostscript
MAX_PIXELS = 100_000_000  # more is a mistake or a decompression bomb: a small file that fills the memory
# What Pillow raises for a damaged file, by format and by the place of the damage.
READ_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error)


def load_image(path: Path | str, under: str = "white") -> Image.Image:
    """A picture of any usual kind as 8-bit RGB, the way a viewer shows it.

    Turned upright by its EXIF mark, 16 bits scaled to 8, transparency laid over white (or the colour `under`), CMYK and
    wide-gamut colours brought to sRGB, the first frame of an animation (with a warning). Raises DataError for anything else.
    """
    path = Path(path)
    with open_image(path) as image:
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a JPEG with a preview behind it
            warnings.warn(f"{path}: {getattr(image, 'n_frames', '')} frames; only the first is used.", stacklevel=2)
        try:
            profile = image.info.get("icc_profile")
            upright = ImageOps.exif_transpose(image)  # reads the pixels too
            return _to_srgb(opaque(_to_8_bit(upright, path), under), profile)
        except READ_ERRORS as error:
            raise DataError(f"{path}: damaged or cut short ({error}). Copy it again, or leave it out.") from error


def open_image(path: Path) -> Image.Image:
    """Open a picture: only the header is read. DataError for a file that cannot be a picture."""
    if not path.is_file():
        there = "is a folder, not a picture" if path.is_dir() else "is no ordinary file" if path.exists() else "no such file"
        hint = "Addresses are not read: download it first" if path.parts[:1] in (("http:",), ("https:",)) else "Check the path"
        raise DataError(f"{path}: {there}. {hint}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes). Copy it again, or leave it out.")
    huge = f"{path}: more than {MAX_PIXELS // 1_000_000} million pixels. Reduce it first; training needs 512 on a side."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is our own
            Image.init()  # else Pillow knows half of the formats
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(huge) from error
    except READ_ERRORS as error:
        foreign = path.suffix.lower() in (".heic", ".heif", ".raw", ".svg")
        hint = "Convert it to PNG or JPEG" if foreign else "Leave it out"
        hint = "A git-LFS pointer: run `git lfs pull`" if path.read_bytes().startswith(b"version https://git-lfs") else hint
        raise DataError(f"{path}: not a picture that can be read here (JPEG, PNG, WebP, …). {hint}.") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(huge)
    return image


def _to_8_bit(image: Image.Image, path: Path) -> Image.Image:
    """16-bit gray -> L. Pillow's own conversion clips: all but the darkest 1/256 would be white."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError(f"{path}: 32 bits a channel, of unknown range. Save it with 8 or 16 bits.")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def opaque(image: Image.Image, under: str = "white") -> Image.Image:
    """Lay the transparent parts over a colour -> RGB. A picture without transparency stays as it is."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, under), image).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Any mode without transparency -> RGB, the embedded colour profile applied where there is one."""
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                target = ImageCms.createProfile("sRGB")
                image = ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that cannot be read: the numbers are taken for sRGB, as browsers do
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W), fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> RGB pictures. What lies outside is clipped; NaN and infinity are an error."""
    bad = [i for i, picture in enumerate(pictures) if not picture.isfinite().all()]
    if bad:
        raise MinidiffError(
            f"picture {bad[0] + 1} of {len(pictures)} holds NaN or infinity, so it would be black. Where half precision "
            "overflowed, run in float32 or bfloat16; where training diverged, take an earlier checkpoint."
        )
    bytes_ = ((pictures.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in bytes_]


def save_png(image: Image.Image, path: Path | str, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `text` chunks in it, whole or not at all. A1111's key is `parameters`: see `generation_text`."""
    chunks, png = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)  # tEXt; where Latin-1 does not hold the text, iTXt
    with _naming(path):
        image.save(png, format="PNG", pnginfo=chunks)
    write_picture(path, png.getvalue())


def write_picture(path: Path | str, data: bytes) -> None:
    """Write a file and its folders; any reader sees the old file or the new one whole."""
    with _naming(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(Path(path), data)


def check_writable(path: Path | str) -> None:
    """MinidiffError where `write_picture` could not write; for before long work. It tries, and leaves nothing behind."""
    path = Path(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name).close()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """An OSError inside becomes a message that names the file."""
    try:
        yield
    except OSError as error:
        raise MinidiffError(f"{path}: cannot be written ({error.strerror or error}). Choose another place.") from error


def read_png_text(path: Path | str) -> dict[str, str]:
    """The text chunks of a PNG, wherever they stand in the file; {} for a picture of another format."""
    path = Path(path)
    with open_image(path) as image:
        try:
            image.load()  # chunks may follow the pixels
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
        except READ_ERRORS as error:
            raise DataError(f"{path}: damaged or cut short ({error}).") from error


def generation_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """How a picture was made, in the form A1111 reads back: prompt, `Negative prompt: …`, `Steps: 20, Sampler: …`."""
    values = {key: str(value) for key, value in settings.items()}
    quoted = {k: json.dumps(v, ensure_ascii=False) if set(v) & set(',:\n"') else v for k, v in values.items()}
    lines = [prompt, f"Negative prompt: {negative_prompt}" if negative_prompt else ""]
    return "\n".join([*filter(None, lines), ", ".join(f"{key}: {value}" for key, value in quoted.items())])


# --- contact sheets ----------------------------------------------------------------------------------------------------

PAPER, INK, HAIRLINE = "#f7f6f2", "#23262d", "#d9d7d0"  # warm and light: a card, on a white page and on a dark one


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    tile: int = 256,
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """A labelled grid. Each picture is scaled to `tile` pixels on its longer side; labels are wrapped, never cut off.

    `captions`, in the shape of `rows`, stand under the single pictures.
    """
    _check_labels(rows, row_labels, column_labels, captions)
    grid = [[_scale(image, tile) for image in row] for row in rows]
    cell_w, cell_h = (max(getattr(image, side) for row in grid for image in row) for side in ("width", "height"))
    across, gap, margin = max(map(len, grid)), round(tile * 0.05), round(tile * 0.12)
    # A wide sheet is shown smaller, so its letters are larger, up to what a cell holds.
    size = max(14, min(24, round(tile * 0.08)), min(round(tile * 0.12), across * cell_w // 56))
    ascii_only = all(text.isascii() for text in (title, *row_labels, *column_labels, *itertools.chain(*captions)))
    font = _font(size, ascii_only)
    sides = [_Label(text, font, round(tile * 0.8)) for text in row_labels]
    heads = [_Label(text, font, cell_w - gap) for text in column_labels]
    under = [[_Label(text, font, cell_w - gap) for text in texts] for texts in captions] or [[] for _ in grid]
    left = margin + (max(side.width for side in sides) + 2 * gap if sides else 0)
    width = left + across * (cell_w + gap) - gap + margin
    heading = _Label(title, _font(round(size * 1.4), ascii_only), width - 2 * margin)

    head = max((label.height for label in heads), default=-gap)
    y = margin + (heading.height + gap if title else 0) + head + gap  # where the first row of pictures begins
    bodies = [max([cell_h, *(side.height for side in sides[i : i + 1])]) for i in range(len(grid))]
    feet = [max((label.height + gap // 2 for label in labels), default=0) for labels in under]
    sheet = Image.new("RGB", (width, y + sum(bodies) + sum(feet) + (len(grid) - 1) * gap + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        heading.draw(draw, margin, margin, "la")
    for column, label in enumerate(heads):
        label.draw(draw, left + column * (cell_w + gap) + cell_w / 2, y - gap - label.height, "ma")
    for row, pictures in enumerate(grid):
        for label in sides[row : row + 1]:
            label.draw(draw, margin, y + (bodies[row] - label.height) / 2, "la")
        for column, picture in enumerate(pictures):
            x = left + column * (cell_w + gap)
            x0, y0 = x + (cell_w - picture.width) // 2, y + (bodies[row] - picture.height) // 2
            draw.rectangle((x0 - 1, y0 - 1, x0 + picture.width, y0 + picture.height), outline=HAIRLINE)
            sheet.paste(picture, (x0, y0))
            for label in under[row][column : column + 1]:
                label.draw(draw, x + cell_w / 2, y + bodies[row] + gap // 2, "ma")
        y += bodies[row] + feet[row] + gap
    return sheet


def _check_labels(
    rows: Sequence[Sequence[Image.Image]], sides: Sequence[str], heads: Sequence[str], captions: Sequence[Sequence[str]]
) -> None:
    if len(sides) not in (0, len(rows)) or len(heads) not in (0, max(map(len, rows), default=0)):
        raise ValueError(f"{len(sides)} row and {len(heads)} column labels do not fit the grid")
    if captions and [len(texts) for texts in captions] != [len(row) for row in rows]:
        raise ValueError(f"the captions, {[len(texts) for texts in captions]} in the rows, do not fit the grid")


class _Label:
    """A text in lines of at most `width` pixels, and the width and height that it takes."""

    def __init__(self, text: str, font: ImageFont.FreeTypeFont, width: int) -> None:
        pieces = re.findall(r"\.?[^\s_/.-]+[_/-]*|[_/.-]+|\s+", text)  # a line ends at a space, behind _ / - or before .
        longest = min(width, math.ceil(max(map(font.getlength, pieces), default=0)))
        attempts = (_wrap(pieces, font, narrower) for narrower in range(longest, width + 1, width // 40 + 1))
        self.lines = min([*attempts, _wrap(pieces, font, width)], key=len)  # the narrowest: no last line of one short word
        self.font, self.leading = font, round(font.size * 1.28)
        self.width, self.height = math.ceil(max(map(font.getlength, self.lines))), len(self.lines) * self.leading

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, anchor: str) -> None:
        for line in self.lines:
            draw.text((x, y), line, fill=INK, font=self.font, anchor=anchor)
            y += self.leading


def _wrap(pieces: Sequence[str], font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a piece that is wider is broken anywhere."""
    lines = [""]
    for piece in pieces:
        too_wide = font.getlength(piece) > width
        for part in piece if too_wide else [piece]:
            if font.getlength((lines[-1] + part).rstrip()) > width:
                lines.append("")
            lines[-1] = (lines[-1] + part).lstrip()
    return [line.rstrip() for line in lines]


@functools.cache
def _font(size: int, ascii_only: bool) -> ImageFont.FreeTypeFont:
    """Aileron, which comes with Pillow and knows ASCII alone; DejaVu Sans, which comes with matplotlib, for the rest."""
    if ascii_only and isinstance(font := ImageFont.load_default(size), ImageFont.FreeTypeFont):
        return font
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _scale(image: Image.Image, tile: int) -> Image.Image:
    factor = tile / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
