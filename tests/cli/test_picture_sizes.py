"""--image: what is far too large is told before a model is loaded; enlarging is careful; --resize keeps the shape."""

from pathlib import Path

import pytest
from PIL import Image

from minidiff.cli import draw_commands
from minidiff.cli.draw_flags import Sample, own_side, picture_size
from minidiff.cli.main import main
from minidiff.core.errors import SettingsError
from minidiff.draw.images import read_png_text

POCKET = str(Path(__file__).parents[2] / "checkpoints" / "pocket")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (1200, 900), "red").save("photo.jpg")
    Image.new("RGB", (128, 96), "red").save("small.png")


def settled(**flags: object) -> Sample:
    return Sample(prompt="a dog", pretrained_model_name_or_path=POCKET, **flags).settled()  # type: ignore[arg-type]


def test_a_photograph_asks_for_a_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(draw_commands, "read_model", lambda *_, **__: pytest.fail("a model was read"))
    with pytest.raises(SystemExit) as leave:
        main(["sample", "a dog", "--image", "photo.jpg", "--pretrained_model_name_or_path", POCKET])
    said = capsys.readouterr().err
    assert leave.value.code == 2 and "1200 x 900" in said and "--resize, for 144 x 112" in said


def test_resize_keeps_the_shape_and_a_given_size_is_taken() -> None:
    s = settled(image="photo.jpg", resize=True)
    assert (s.width, s.height, s.strength) == (144, 112, None)
    s = settled(control_image=("photo.jpg",), controlnet=("checkpoints/pocket-canny",), resize=True)
    assert (s.width, s.height) == (144, 112)
    assert settled(image="photo.jpg", width=160) == Sample(
        prompt="a dog", pretrained_model_name_or_path=POCKET, image="photo.jpg", width=160
    )
    for flags in ({"resize": True}, {"resize": True, "image": "photo.jpg", "width": 8}):
        with pytest.raises(SettingsError, match="--resize needs --image"):
            settled(**flags)


def test_sides_are_those_of_the_turned_picture_and_of_the_model(tiny_folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save("turned.jpg", exif=exif)
    assert picture_size("turned.jpg") == (20, 40)
    assert own_side(POCKET) == (128, 8) and own_side(str(tiny_folder)) == (16, 2) and own_side("small.png") == (512, 8)


def test_enlarging_is_careful_by_default() -> None:
    with pytest.warns(UserWarning, match="--strength 0.1"):
        s = settled(image="small.png", width=180)
    assert (s.strength, s.prompt, s.tile_size) == (0.1, "a dog", None)
    with pytest.warns(UserWarning, match="in tiles of 128 pixels"):
        s = settled(image="small.png", width=256)
    assert (s.strength, s.prompt, s.tile_size) == (0.1, "", 128)
    with pytest.warns(UserWarning, match="prompt is left out"):
        s = settled(image="small.png", width=256, tile_size=128, strength=0.3)
    assert (s.strength, s.prompt, s.guidance_scale) == (0.3, "", 1.0)
    assert settled(image="small.png", width=256, mask_image="small.png").strength is None
    assert settled(image="small.png").strength is None


def test_an_enlarged_picture_is_drawn_again_to_the_bit(tiny_folder: Path) -> None:
    Image.new("RGB", (16, 16), "red").save("tiny.png")
    flags = ["--pretrained_model_name_or_path", str(tiny_folder)]
    main(["sample", "a dog", "--image", "tiny.png", "--width", "32", "--tile_size", "16", "--output", "a.png", *flags])
    assert "Denoising strength: 0.1" in read_png_text("a.png")["parameters"]
    main(["sample", "--from", "a.png", "--output", "b.png", *flags])
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes() and Image.open("a.png").size == (32, 32)
