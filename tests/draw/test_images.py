"""Every kind of picture file in; tensors, PNGs with text, sheets and curves out."""

import io
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from minidiff.core.errors import DataError
from minidiff.draw.images import (
    PAPER,
    _text,
    contact_sheet,
    generation_text,
    load_image,
    read_png_text,
    save_png,
    to_pil,
    to_tensor,
)
from minidiff.trainer.plot import loss_curve, smoothed


def halves(left: str, right: str, size: tuple[int, int] = (8, 4)) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


# ------------------------------------------------------------------------------------------------------------- files


def test_exif_turns_the_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: show after a quarter turn clockwise
    halves("red", "blue").save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert image.size == (4, 8) and image.getpixel((0, 0)) == (255, 0, 0) and image.getpixel((0, 7)) == (0, 0, 255)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    if suffix == "pgm":
        path.write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    assert [pixel[0] for pixel in load_image(path).get_flattened_data()] == [0, 1, 128, 255]


def png(width: int, height: int, bits: int, kind: int, pixels: bytes) -> bytes:
    """A PNG by hand, as its specification says: signature, IHDR, IDAT, IEND."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)), (b"IDAT", zlib.compress(pixels))]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*parts, (b"IEND", b"")]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_sixteen_bit_colour_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 32896, 0)))
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize(
    ("mode", "suffix", "colour", "expected"),
    [
        ("L", "png", 100, (100, 100, 100)),
        ("1", "png", 1, (255, 255, 255)),
        ("LA", "png", (0, 0), (255, 255, 255)),
        ("RGBA", "png", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", "webp", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", "tif", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "jpg", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", "jpg", (128, 128, 128), (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, suffix: str, colour: int | tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (8, 8), colour).save(path)
    image = load_image(path)
    assert image.mode == "RGB"
    assert np.abs(np.subtract(image.getpixel((4, 4)), expected)).max() <= 2


def test_half_transparent_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 0, 0, 51)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 204, 204)


def test_a_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    halves("red", "blue").quantize(2).save(tmp_path / "a.gif", transparency=0)
    colours = {colour for _, colour in load_image(tmp_path / "a.gif").getcolors() or []}
    assert (255, 255, 255) in colours and len(colours) == 2


def test_an_animation_gives_its_first_frame_with_a_notice(tmp_path: Path) -> None:
    first, *rest = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    with pytest.warns(UserWarning, match=r"a\.gif: 3 frames; only the first"):
        assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_a_colour_profile_is_applied_and_a_broken_one_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (2, 2), (10, 200, 90))
    for name, icc in (("good.png", profile), ("bad.png", b"not a profile")):
        image.save(tmp_path / name, icc_profile=icc)
        assert load_image(tmp_path / name).getpixel((0, 0)) == (10, 200, 90)
    # swap the red and green primaries: a profile under which other numbers mean the same colour
    red, green = (profile.index(tag, 128) for tag in (b"rXYZ", b"gXYZ"))
    swapped = bytearray(profile.replace(b"sRGB", b"none").replace(b"s\0R\0G\0B", b"n\0o\0n\0e"))
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    image.save(tmp_path / "swapped.png", icc_profile=bytes(swapped))
    r, g, b = load_image(tmp_path / "swapped.png").getpixel((0, 0))
    assert r > 150 and g < 60 and abs(b - 90) < 40


def linear(profile: bytes, gray: bool = False) -> bytes:
    """The profile with light that is linear in the numbers; its name still says sRGB."""
    data = bytearray(profile)
    for tag in (b"rTRC", b"gTRC", b"bTRC"):
        entry = data.index(tag, 128)
        at = int.from_bytes(data[entry + 4 : entry + 8], "big")
        data[at : at + 14] = b"curv" + bytes(4) + (1).to_bytes(4, "big") + b"\x01\x00"  # one number: gamma 1.0
    if gray:
        data[16:20], entry = b"GRAY", data.index(b"rTRC", 128)
        data[entry : entry + 4] = b"kTRC"
    return bytes(data)


@pytest.mark.parametrize(("mode", "gray"), [("RGB", False), ("RGBA", False), ("L", True), ("LA", True)])
def test_a_profile_of_linear_light_is_applied_whatever_it_is_called(mode: str, gray: bool, tmp_path: Path) -> None:
    """Half the light is 188 of 255 in sRGB (IEC 61966-2-1)."""
    profile = linear(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), gray)
    image = Image.new("L", (2, 2), 128).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=profile)
    assert all(abs(value - 188) <= 1 for value in load_image(tmp_path / "a.png").getpixel((0, 0)))


def test_the_profile_of_srgb_itself_changes_no_number(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert load_image(tmp_path / "a.png").tobytes() == noise.tobytes()


def _broken(path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    contents = {
        "empty": b"",
        "text": b"hello, I am no picture at all",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n",
        "cut": buffer.getvalue()[:3000],
        "header": buffer.getvalue()[:20],
    }
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "is no picture file"),
        ("empty", "not a picture"),
        ("text", "not a picture"),
        ("lfs", "not a picture"),
        ("header", "not a picture|damaged"),
        ("cut", "damaged or cut short"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, kind: str, message: str) -> None:
    _broken(tmp_path / "a.png", kind)
    with pytest.raises(DataError, match=message) as caught:
        load_image(tmp_path / "a.png")
    assert str(caught.value).startswith(str(tmp_path / "a.png"))


@pytest.mark.parametrize("side", [10_001, 20_000])
def test_a_decompression_bomb_is_refused_unread(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png(side, side, 8, 2, b"\0" * 1000))
    with pytest.raises(DataError, match=r"bomb\.png: more than 89 million pixels"):
        load_image(tmp_path / "bomb.png")


def test_float_pictures_have_no_known_range(tmp_path: Path) -> None:
    Image.new("F", (2, 2), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="32 bits"):
        load_image(tmp_path / "a.tif")


# ----------------------------------------------------------------------------------------------------------- tensors


def test_bytes_survive_the_way_to_tensors_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([pixels, pixels[::-1], pixels.T], axis=-1))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    for dtype in (torch.float32, torch.float64):
        assert to_pil(tensor[None].to(dtype))[0].tobytes() == image.tobytes()


def test_to_pil_clips_and_keeps_the_layout() -> None:
    tensor = torch.stack([torch.full((2, 4), value) for value in (-3.0, 0.0, 3.0)])[None]
    (image,) = to_pil(tensor)
    assert image.size == (4, 2) and image.getpixel((3, 1)) == (0, 128, 255)
    assert to_pil(torch.zeros(0, 3, 4, 4)) == []


# --------------------------------------------------------------------------------------------------------------- PNG


def test_png_text_goes_round(tmp_path: Path) -> None:
    text = {"parameters": "a café\nSteps: 20", "note": "日本語 🐕"}
    save_png(halves("red", "blue"), tmp_path / "new" / "a.png", text)
    assert read_png_text(tmp_path / "new" / "a.png") == text
    assert b"tEXtparameters\0a caf\xe9" in (tmp_path / "new" / "a.png").read_bytes()  # what A1111 and exiftool read
    assert os.listdir(tmp_path / "new") == ["a.png"]


def test_no_text_no_chunks(tmp_path: Path) -> None:
    save_png(halves("red", "blue"), tmp_path / "a.png")
    halves("red", "blue").save(tmp_path / "a.jpg")
    assert read_png_text(tmp_path / "a.png") == {} == read_png_text(tmp_path / "a.jpg")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(halves("red", "blue"), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*a\.png"):
        save_png(halves("blue", "red"), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_generation_text_follows_the_grammar_of_a1111() -> None:
    settings = {"Steps": 20, "Sampler": "Euler a", "Seed": 1, "Size": "512x512", "Lora hashes": 'dog: ab, "x": cd'}
    text = generation_text("a dog,\non the beach", "blurry", settings)
    *prompt, negative, last = text.split("\n")
    assert prompt == ["a dog,", "on the beach"] and negative == "Negative prompt: blurry"
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))  # FORMATS, 3.8
    assert {key: json.loads(v) if v[0] == '"' else v for key, v in found.items()} == {k: str(v) for k, v in settings.items()}
    assert generation_text("a dog", "", {"Steps": 1}) == "a dog\nSteps: 1"


# ------------------------------------------------------------------------------------------------- sheets and curves


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (3, 2), (8, 8)])
def test_every_picture_is_whole_on_the_sheet(rows: int, columns: int) -> None:
    pictures = [[Image.new("RGB", (16, 16), "red")] * columns for _ in range(rows)]
    sheet = contact_sheet(pictures, [f"row {i}" for i in range(rows)], ["a column"] * columns, "title", tile=32)
    red = (np.array(sheet) == (255, 0, 0)).all(-1)
    assert red.sum() == rows * columns * 32 * 32
    assert sheet.getpixel((0, 0)) == sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (0xF7, 0xF6, 0xF2)


def ink(picture: Image.Image) -> float:
    """How much darker a picture is than empty paper."""
    return float((np.array(Image.new("L", picture.size, PAPER), dtype=int) - np.array(picture.convert("L"))).sum())


@pytest.mark.parametrize("label", ["x", "a photo of a red dog on the beach " * 6, "unbroken_" * 30, "Käse", ""])
def test_labels_are_never_cut_off(label: str) -> None:
    """In lines that are about as wide as asked, there is as much ink as in one long line."""
    narrow, wide = _text(label, 96, 14), _text(label, 100_000, 14)
    assert narrow.width <= 120 and ink(narrow) == pytest.approx(ink(wide), rel=0.03)
    pictures = [Image.new("RGB", (8, 8), "red")] * 2
    sheet = contact_sheet([pictures, [label] * 2] * 2, [label] * 4, [label] * 2, label, tile=96)
    red = (np.array(sheet) == (255, 0, 0)).all(-1)
    assert red.sum() == 4 * 96 * 96  # no label lies on a picture


def test_captions_stand_under_their_pictures() -> None:
    pictures = [Image.new("RGB", (8, 8), "red")] * 3
    plain = np.array(contact_sheet([pictures, ["", "", ""]], tile=64).convert("L"), dtype=int)
    captioned = np.array(contact_sheet([pictures, ["", "here", ""]], tile=64).convert("L"), dtype=int)
    dark = captioned[plain.shape[0] :]  # the sheet has grown at its lower end
    columns = np.flatnonzero((dark < 128).any(axis=0))
    assert captioned.shape[1] / 3 < columns.min() and columns.max() < captioned.shape[1] * 2 / 3


def test_mixed_sizes_and_ragged_rows() -> None:
    wide, tall = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "red")
    sheet = contact_sheet([[wide, tall], [tall]], tile=40)
    red = (np.array(sheet) == (255, 0, 0)).all(-1)
    assert red.sum() == 3 * 40 * 20
    below = np.argwhere(red[sheet.height // 2 + 1 :])  # the second row has one picture, in the middle of its column
    assert below[:, 1].mean() == np.argwhere(red[:, :43])[:, 1].mean()


def test_smoothed_keeps_lines_and_skips_gaps() -> None:
    np.testing.assert_allclose(smoothed(np.full(9, 3.0), 2.0), 3.0)
    np.testing.assert_allclose(smoothed(np.arange(41.0), 2.0)[6:-6], np.arange(41.0)[6:-6])  # a ramp: no lag
    np.testing.assert_allclose(smoothed(np.array([1.0, np.nan, 1.0, np.inf, 1.0]), 1.0), 1.0)
    assert np.isnan(smoothed(np.array([np.nan]), 1.0)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 40])
def test_loss_curve(tmp_path: Path, count: int) -> None:
    rows = [{"step": i + 1, "loss": 1 / (i + 1), "lr": 1e-4, "grad_norm": 1.0} for i in range(count)]
    loss_curve([{"step": 0, "val_loss": None}, *rows], tmp_path / "loss.png")
    image = load_image(tmp_path / "loss.png")
    assert image.width > 1000 and "#{:02x}{:02x}{:02x}".format(*image.getpixel((0, 0))) == PAPER  # type: ignore


def test_postscript_by_another_name_is_not_run(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript, which is a programming language for whoever made the file."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(DataError, match="not a picture"):
        load_image(tmp_path / "a.png")
