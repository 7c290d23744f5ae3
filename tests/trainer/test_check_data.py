"""`minidiff data check`: everything that is wrong with a folder, in one go."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import refused

from minidiff.trainer.buckets import bucket_sizes
from minidiff.trainer.check_data import Problem, as_table, check_dataset


def picture(path: Path, colour: tuple[int, ...] = (255, 0, 0), mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def found(folder: Path, **options: object) -> dict[str, str]:
    """File -> what is said of it."""
    problems = check_dataset(folder, "p", None, 32, **options)  # type: ignore[arg-type]
    return {p.what.removeprefix(f"{folder}/").partition(":")[0]: f"{p.kind}: {p.what}" for p in problems}


def test_all_of_it_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    picture(tmp_path / "small.png", size=(40, 31))
    picture(tmp_path / "twin.png")
    picture(tmp_path / "cmyk.tif", (0, 255, 0, 0), "CMYK")
    picture(tmp_path / "clear.png", (1, 2, 3, 4), "RGBA")
    Image.fromarray(np.arange(40 * 32, dtype=np.uint16).reshape(32, 40)).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 32), (0, 0, 9)).save(tmp_path / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", (40, 32), (0, i, 0)) for i in (50, 200)]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "metadata.json1").write_text("{}"), (tmp_path / ".DS_Store").write_text("x")

    table = as_table(check_dataset(tmp_path, "p", None, 32), tmp_path).splitlines()
    expected = {
        "error   broken.jpg: not a picture",
        "error   small.png: its shorter side is 31 pixels",
        "error   truncated.png: damaged or cut short",
        "notice  clear.png: transparent; laid over white",
        "notice  cmyk.tif: CMYK; brought to RGB",
        "notice  deep.png: 16 bits a channel; brought to 8",
        "notice  film.webp: 2 frames; only the first is used",
        "notice  turned.jpg: on its side; turned",
        "notice  twin.png: the same picture as good.png",
    }
    assert all(any(line.startswith(text) for line in table) for text in expected)
    assert any("not used: .DS_Store, metadata.json1" in line for line in table)
    assert table[-1] == "3 errors, 7 notices" and len(table) == 11
    assert [line[:5] for line in table[:3]] == ["error"] * 3


def test_a_good_folder(tmp_path: Path) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", (0, 255, 0))
    assert check_dataset(tmp_path, "p", None, 32) == []
    assert as_table([], tmp_path) == "0 errors, 0 notices"


def test_pictures_are_looked_at_even_where_captions_are_wrong(tmp_path: Path) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(9, 9))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a"}\nnonsense\n')
    problems = check_dataset(tmp_path, None, None, 32)
    errors = [p.what for p in problems if p.kind == "error"]
    assert len(errors) == 3 and "b.png: its shorter side is 9" in errors[2]
    assert "line 2: not JSON" in errors[0] and "line 1: there is no file" in errors[1]


def test_captions(tmp_path: Path) -> None:
    for i, caption in enumerate(("a photo of a sks dog", "asks a dog", "Sks " * 80)):
        picture(tmp_path / f"{i}.png", (i, 0, 0))
        (tmp_path / f"{i}.txt").write_text(caption)
    problems = check_dataset(tmp_path, None, None, 32, trigger="sks", count_tokens=lambda text: len(text.split()))
    assert {p.kind for p in problems} == {"notice"} and len(problems) == 2
    assert '1.png: the word "sks" is not in its caption, "asks a dog"' in problems[0].what
    assert "2.png: its caption has 80 tokens, and CLIP reads 75" in problems[1].what


def test_masks_and_buckets(tmp_path: Path) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "a.mask.png", (0, 0, 0)), picture(tmp_path / "b.png", (1, 1, 1))
    assert "a.mask.png is black all over" in found(tmp_path, masks=True)[f"{'a.mask.png is black all over'}"]
    wide = picture(tmp_path / "c.png", (2, 2, 2), size=(64, 20))
    assert "shorter side is 20" in found(tmp_path)[wide.name]
    assert wide.name not in found(tmp_path, buckets=bucket_sizes(32, 4))


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_pictures(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    problems = check_dataset(tmp_path / name, "p", None, 32)
    assert [p.kind for p in problems] == ["error"] and isinstance(problems[0], Problem)


def test_skipping_is_offered_only_where_it_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(9, 9))
    check = ["data", "check", str(tmp_path), "--resolution", "32"]
    assert "above, or train with --skip_bad." in refused(capsys, [*check, "--instance_prompt", "p"])
    assert "mend what is marked as an error above." in refused(capsys, check)  # a picture without a caption cannot be skipped
    assert "marked as an error above." in refused(capsys, ["data", "check", str(tmp_path / "nope")])


@pytest.mark.parametrize("resolution", ["7", "8193", "1" + "0" * 400])
def test_absurd_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str], resolution: str) -> None:
    said = refused(capsys, ["data", "check", str(tmp_path), "--resolution", resolution, "--aspect_ratio_buckets"])
    assert f"--resolution must lie in 8 … 8192; it is {resolution}" in said
