"""`minidiff data check`: everything that is wrong with a folder, in one go."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from test_cli import refused

from minidiff.cli.main import main
from minidiff.trainer.dataset import Scan
from minidiff.trainer.pictures import as_table, bucket_sizes, check_scan


def picture(path: Path, colour: tuple[int, ...] = (255, 0, 0), mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def check(folder: Path, prompt: str | None = "p", masks: bool = False, buckets: bool = False) -> Scan:
    scan = Scan(prompt, None, masks).of(folder)
    check_scan(scan, bucket_sizes(32, 4) if buckets else [(32, 32)])
    return scan


def test_all_of_it_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    picture(tmp_path / "small.png", size=(40, 31))
    picture(tmp_path / "twin.png")
    (tmp_path / "metadata.json1").write_text("{}"), (tmp_path / ".DS_Store").write_text("x")

    table = as_table(check(tmp_path), tmp_path).splitlines()
    expected = [
        "error   broken.jpg: not a picture",
        "error   small.png: 40 x 31 pixels are too few for --resolution 32.",
        "error   truncated.png: damaged or cut short",
        f"notice  {tmp_path}: not used: .DS_Store, metadata.json1.",
        "notice  twin.png: the same file as good.png.",
        "3 errors, 2 notices",
    ]
    assert len(table) == 6 and all(line.startswith(text) for line, text in zip(table, expected))


def test_a_good_folder(tmp_path: Path) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", (0, 255, 0))
    assert as_table(check(tmp_path), tmp_path) == "0 errors, 0 notices"


def test_pictures_are_looked_at_even_where_captions_are_wrong(tmp_path: Path) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(9, 9))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a"}\nnonsense\n')
    errors = check(tmp_path, None).errors
    assert len(errors) == 3 and "b.png: 9 x 9 pixels" in errors[2]
    assert "line 1: there is no file" in errors[0] and "line 2: not JSON" in errors[1]


def test_masks_and_buckets(tmp_path: Path) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "a.mask.png", (0, 0, 0)), picture(tmp_path / "b.png", (1, 1, 1))
    assert [f"{tmp_path}/a.mask.png is black all over" in text for text in check(tmp_path, masks=True).errors] == [True]
    wide = picture(tmp_path / "c.png", (2, 2, 2), size=(64, 20))
    assert [f"{wide}: 64 x 20 pixels are too few" in text for text in check(tmp_path).errors] == [True]
    assert check(tmp_path, buckets=True).errors == []


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_pictures(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    scan = check(tmp_path / name)
    assert len(scan.errors) == 1 and not scan.notices


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(9, 9))
    check = ["data", "check", str(tmp_path), "--resolution", "32"]
    assert "mend what is marked as an error above. --skip_bad" in refused(capsys, [*check, "--instance_prompt", "p"])
    assert "marked as an error above." in refused(capsys, ["data", "check", str(tmp_path / "nope")])


def test_the_model_says_the_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.png", size=(127, 200))
    assert "127 x 200 pixels are too few for --resolution 128" in seen(capsys, tmp_path, "--instance_prompt", "p")
    assert "a.png: 127 x 200 pixels" not in seen(capsys, tmp_path, "--instance_prompt", "p", "--resolution", "64")
    said = refused(capsys, ["data", "check", str(tmp_path), "--resolution", "65"])
    assert "--resolution 65: this model needs a multiple of 32, such as 64 or 96" in said


def test_each_picture_through_the_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A drawing of the pocket's world comes back; noise does not."""
    shutil.copy("lessons/data/dog/01.png", tmp_path / "a.png")
    Image.effect_noise((128, 128), 200).convert("RGB").save(tmp_path / "b.png")
    said = seen(capsys, tmp_path, "--instance_prompt", "p")
    levels = {name: float(level) for level, name in re.findall(r"^ *([\d.]+) dB  (.*)$", said, re.MULTILINE)}
    assert levels["a.png"] > 20 > levels["b.png"] and "Below 20 dB (PSNR) the VAE loses" in said


def seen(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The table that `minidiff data check` prints."""
    with suppress(SystemExit):
        main(["data", "check", *map(str, words)])
    return capsys.readouterr().out


@pytest.mark.parametrize("resolution", ["7", "8193", "1" + "0" * 400])
def test_absurd_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str], resolution: str) -> None:
    said = refused(capsys, ["data", "check", str(tmp_path), "--resolution", resolution, "--aspect_ratio_buckets"])
    assert f"--resolution must lie in 8 … 8192; it is {resolution}" in said
