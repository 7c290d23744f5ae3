"""Folders of pictures: what is read, and what is said when it cannot be."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from minidiff.config import TINY_VAE
from minidiff.errors import DataError
from minidiff.models.vae import AutoencoderKL
from minidiff.train.data import LatentData, check_pictures, order, square
from minidiff.train.folders import Example, read_folder
from minidiff.train.settings import FineTuneSettings


def picture(path: Path, size: tuple[int, int] = (40, 32), colour: tuple[int, int, int] = (255, 0, 0)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.PNG", "a.jpg"):
        picture(tmp_path / name)
    return tmp_path


def captions(examples: list[Example]) -> dict[str, str]:
    return {e.path.name: e.caption for e in examples}


def test_one_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".DS_Store", "Thumbs.db", "notes.md"):
        (folder / name).write_text("x")
    picture(folder / ".thumbs" / "a.png"), picture(folder / ".hidden.png")
    assert captions(read_folder(folder, "a sks dog")) == {"a.jpg": "a sks dog", "b.PNG": "a sks dog"}
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "Thumbs.db" in notice and ".hidden.png" in notice


def test_sidecars(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_text("\ufeffa red\nsquare\n", "utf-8")
    (folder / "b.caption").write_text("another")
    assert captions(read_folder(folder, None)) == {"a.jpg": "a red square", "b.PNG": "another"}
    assert capsys.readouterr().err == ""


def jsonl(folder: Path, *rows: object) -> None:
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_metadata_jsonl(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(folder / "sub" / "c.png")
    jsonl(folder, {"file_name": "sub/c.png", "prompt": "c", "width": 3}, {"file_name": "./a.jpg", "prompt": " a "})
    assert captions(read_folder(folder, None)) == {"c.png": "c", "a.jpg": "a"}
    assert "b.PNG" in capsys.readouterr().err
    jsonl(folder, {"file_name": "a.jpg", "text": "by text", "caption": "by caption"})
    assert captions(read_folder(folder, None)) == {"a.jpg": "by text"}
    assert captions(read_folder(folder, None, "caption")) == {"a.jpg": "by caption"}
    jsonl(folder, {"file_name": "a.jpg", "words": "the only strings", "n": 1})
    assert captions(read_folder(folder, None)) == {"a.jpg": "the only strings"}


def test_metadata_csv(folder: Path) -> None:
    (folder / "metadata.csv").write_text('file_name,text\na.jpg,"red, square"\nb.PNG,"two\nlines"\n')
    assert captions(read_folder(folder, None)) == {"a.jpg": "red, square", "b.PNG": "two\nlines"}
    (folder / "metadata.csv").write_text("file_name,text\nb.PNG,x\na.jpg,red, square\n")
    with pytest.raises(DataError, match="line 3: more fields"):
        read_folder(folder, None)


A, B = {"file_name": "a.jpg", "text": "x"}, {"file_name": "b.PNG", "text": "y"}
BAD_METADATA: dict[str, tuple[list[str], str]] = {
    "not JSON": ([json.dumps(A), "{'file_name': 'b.PNG'}"], r"metadata.jsonl, line 2: not JSON.*one object per line"),
    "pretty": (json.dumps(A, indent=1).splitlines(), "line 1: an object spread over.*one object per line"),
    "a list": ([json.dumps([A, B])], "line 1: not an object"),
    "empty": (["", ""], "is empty"),
    "no file_name": ([json.dumps(A), '{"file": "b.PNG", "text": "y"}'], 'line 2: no "file_name"; .*file, text'),
    "absent": ([json.dumps(A), '{"file_name": "b.png", "text": "y"}'], 'line 2: there is no file.* mean "b.PNG"'),
    "outside": ([json.dumps(A), '{"file_name": "x/../../b.PNG", "text": "y"}'], "line 2: .*leads out of the folder"),
    "absolute": (['{"file_name": "/etc/passwd", "text": "y"}'], "line 1: .*leads out of the folder"),
    "twice": ([json.dumps(A), json.dumps(B), '{"file_name": "./a.jpg", "text": "z"}'], "line 3: .*already on line 1"),
    "no caption": ([json.dumps(A), '{"file_name": "b.PNG"}'], 'line 2: no "text"; .*file_name'),
    "empty caption": ([json.dumps(A), '{"file_name": "b.PNG", "text": " "}'], 'line 2: "text" is empty'),
    "deep": (["[" * 100_000], "line 1: not JSON"),
    "long name": ([json.dumps({"file_name": "a" * 5000, "text": "y"})], "line 1: there is no file"),
    "half a letter": (['{"file_name": "a.jpg", "text": "\\ud800"}'], "half of a UTF-16 pair"),
    "number": (['{"file_name": "a.jpg", "text": 3}'], 'line 1: "text" is 3, not a text'),
    "which": (['{"file_name": "a.jpg", "fr": "un", "en": "a"}'], "--caption_column; it has file_name, fr, en"),
    "none": (['{"file_name": "a.jpg"}'], "--caption_column; it has file_name"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata(folder: Path, case: str) -> None:
    lines, message = BAD_METADATA[case]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        read_folder(folder, None)


def test_a_caption_may_hold_any_line_separator_but_the_newline(folder: Path) -> None:
    row = json.dumps({"file_name": "a.jpg", "text": "a\u2028b"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(row + "\r\n", "utf-8")
    assert [e.caption for e in read_folder(folder, None)] == ["a\u2028b"]


def test_a_column_that_is_not_there(folder: Path) -> None:
    jsonl(folder, {"file_name": "a.jpg", "prompt": "a"})
    with pytest.raises(DataError, match='no column "promt".*it has file_name, prompt.*Did you mean "prompt"'):
        read_folder(folder, None, "promt")


def remove_pictures(folder: Path) -> None:
    (folder / "a.jpg").unlink(), (folder / "b.PNG").unlink()


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def both_tables(folder: Path) -> None:
    write("metadata.csv", b"")(folder), write("metadata.jsonl", b"")(folder)


def both_captions(folder: Path) -> None:
    write("a.txt", b"x")(folder), write("a.caption", b"x")(folder)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no captions": (lambda folder: None, r"2 of 2 pictures have no caption \(a.jpg, b.PNG\).*--instance_prompt"),
    "one without": (write("a.txt", b"x"), r"1 of 2 pictures have no caption \(b.PNG\)"),
    "misnamed table": (write("metadata.json1", b""), 'Is metadata.json1 meant to be "metadata.jsonl"'),
    "empty sidecar": (write("a.txt", b" \n"), "a.txt is empty"),
    "two sidecars": (both_captions, "a.jpg has two captions, a.txt and a.caption"),
    "two tables": (both_tables, "both metadata.csv and metadata.jsonl"),
    "not UTF-8": (write("a.txt", b"\xff\xfe\x00x"), "a.txt is not UTF-8"),
    "table is a folder": (lambda folder: (folder / "metadata.jsonl").mkdir(), "cannot be read"),
    "table is a dead link": (lambda folder: (folder / "metadata.jsonl").symlink_to("nowhere"), "cannot be read"),
    "open quote": (write("metadata.csv", b'file_name,text\na.jpg,"dog\n'), "not CSV"),
    "no pictures": (lambda folder: [remove_pictures(folder), write("a.heic", b"")(folder)], "no pictures.*holds .heic"),
    "nested": (lambda folder: [remove_pictures(folder), picture(folder / "train" / "a.png")], "train has; point there"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder(folder: Path, case: str) -> None:
    spoil, message = BAD_FOLDERS[case]
    spoil(folder)
    with pytest.raises(DataError, match=message):
        read_folder(folder, None)


def test_no_folder(folder: Path) -> None:
    with pytest.raises(DataError, match="no folder that exists"):
        read_folder(folder / "x", "p")
    with pytest.raises(DataError, match="a file, not a folder"):
        read_folder(folder / "a.jpg", "p")


def test_all_bad_pictures_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.png").write_bytes((folder / "b.PNG").read_bytes()[:60])
    picture(folder / "d.png", (20, 90))
    examples = read_folder(folder, "p")
    with pytest.raises(DataError) as error:
        check_pictures(examples, 32, skip_bad=False)
    message = str(error.value)
    assert "2 of 4" in message and "c.png" in message and "d.png: its shorter side is 20" in message
    assert "--skip_bad" in message
    left = check_pictures(examples, 32, skip_bad=True)
    assert [e.path.name for e in left] == ["a.jpg", "b.PNG"] and "c.png" in capsys.readouterr().err
    with pytest.raises(DataError, match="4 of 4"):
        check_pictures(examples, 64, skip_bad=True)


def test_square() -> None:
    wide = Image.new("RGB", (80, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (40, 0, 80, 40))  # left half red, right half blue
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    x = square(wide, 20)  # 40 x 20, its middle: half and half
    assert x.shape == (3, 20, 20) and torch.equal(x[:, 5, 2], red) and torch.equal(x[:, 5, 17], blue)
    assert torch.equal(square(wide, 20, flip=True), x.flip(-1))
    for place, colour in ((0.0, red), (1.0, blue)):
        assert torch.equal(square(wide, 20, (place, 0.3))[:, :, 3:17], colour[:, None, None].expand(3, 20, 14))
    for size in ((33, 77), (77, 33), (32, 32), (3, 200)):  # no rounding leaves it a pixel short
        assert square(Image.new("RGB", size), 32).shape == (3, 32, 32)


def test_exif_rotation(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), (255, 0, 0))
    image.paste((0, 0, 255), (0, 16, 32, 32))  # red above blue, on its side in the file
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.rotate(180).save(tmp_path / "a.png", exif=exif)
    x = latents([Example(tmp_path / "a.png", "p")]).moments
    picture_upright = tmp_path / "b.png"
    image.save(picture_upright)
    y = latents([Example(picture_upright, "p")]).moments
    assert torch.equal(x[0, False][0], y[0, False][0])


def encode(prompts: list[str]) -> Tensor:
    """(B, 77, D) that tells which prompt it was."""
    return torch.tensor([float(len(p)) for p in prompts])[:, None, None].expand(-1, 77, 24)


def latents(examples: list[Example], **changes: object) -> LatentData:
    torch.manual_seed(0)
    settings = replace(FineTuneSettings(train_batch_size=2, seed=3), **changes)  # type: ignore[arg-type]
    return LatentData(examples, settings, 32, AutoencoderKL(TINY_VAE).eval(), encode, 1000)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    return [Example(picture(tmp_path / f"{i}.png", colour=c), "p" * (i + 1)) for i, c in enumerate(colours)]


def test_batches_are_pure_and_cover_each_epoch(examples: list[Example]) -> None:
    data = latents(examples)
    batch = data.batch(4, 0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "latents": ((2, 4, 16, 16), torch.float32),
        "noise": ((2, 4, 16, 16), torch.float32),
        "t": ((2,), torch.int64),
        "text": ((2, 77, 24), torch.float32),
    }
    again = latents(examples).batch(4, 0)  # out of order, in another process: the same
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    lengths = [int(data.batch(step, 0)["text"][j, 0, 0]) for step in range(3) for j in range(2)]
    assert sorted(lengths[:3]) == sorted(lengths[3:]) == [1, 2, 3]
    assert len({tuple(order(3, 3, epoch)) for epoch in range(20)}) == 6


def test_micro_batches_are_the_big_batch(examples: list[Example]) -> None:
    big = latents(examples, train_batch_size=4).batch(2, 0)
    small = latents(examples, train_batch_size=2, gradient_accumulation_steps=2)
    parts = [small.batch(2, micro) for micro in (0, 1)]
    for key in big:
        assert torch.equal(big[key], torch.cat([part[key] for part in parts]))


def test_latents_are_drawn_from_the_posterior(examples: list[Example]) -> None:
    """z = mean + sigma eps, times the scaling factor; eps differs from sample to sample."""
    data = latents(examples[:1])
    z = torch.stack([data.sample(n)["latents"] for n in range(200)]) / TINY_VAE.scaling_factor
    mean, logvar = data.moments[0, False]
    noise = (z - mean) / (0.5 * logvar).exp()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    t = torch.stack([data.sample(n)["t"] for n in range(2000)])
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean() - 499.5) < 25


def test_caption_dropout_and_flips(examples: list[Example]) -> None:
    data = latents(examples, proportion_empty_prompts=0.25, random_flip=True)
    empty = [float(data.sample(n)["text"][0, 0]) == 0 for n in range(400)]
    assert 0.18 < sum(empty) / 400 < 0.32
    assert set(data.moments) == {(i, flip) for i in range(3) for flip in (False, True)}
    assert set(latents(examples).moments) == {(i, False) for i in range(3)}


def test_cached_or_not(examples: list[Example]) -> None:
    cached, fresh = latents(examples), latents(examples, cache_latents=False)
    assert torch.equal(cached.batch(1, 0)["latents"], fresh.batch(1, 0)["latents"])
    random = latents(examples, cache_latents=False, center_crop=False)
    assert torch.equal(random.batch(1, 0)["latents"], random.batch(1, 0)["latents"])


def test_facts_follow_content_not_place(examples: list[Example], tmp_path: Path) -> None:
    facts = latents(examples).facts
    assert facts["pictures"] == 3 and facts["side"] == 32
    moved = [Example(e.path.rename(tmp_path / f"moved{i}.png"), e.caption) for i, e in enumerate(examples)]
    assert latents(moved).facts == facts
    assert latents([*moved[:2], replace(moved[2], caption="other")]).facts != facts
