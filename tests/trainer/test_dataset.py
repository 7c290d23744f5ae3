"""Folders of pictures: what is read, and what is said when it cannot be."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from minidiff.core.errors import DataError
from minidiff.trainer.dataset import Example, Scan, read_folder


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
    assert capsys.readouterr().err == f"Note: {folder}: captions of several lines are read as one: a.jpg.\n"


def test_captions_win_over_the_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_text("a red square")
    assert captions(read_folder(folder, "p")) == {"a.jpg": "a red square", "b.PNG": "p"} and not capsys.readouterr().err
    assert captions(read_folder(folder, "p", captions=False)) == {"a.jpg": "p", "b.PNG": "p"}
    assert capsys.readouterr().err == f"Note: {folder}: not used: a.txt.\n"


def test_a_table_wins_over_the_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And over files beside the pictures, which are then named."""
    picture(folder / "c.png"), (folder / "a.txt").write_text("beside a"), (folder / "b.txt").write_text("beside b")
    jsonl(folder, {"file_name": "a.jpg", "text": "row a"}, {"file_name": "c.png", "text": ""})
    assert captions(read_folder(folder, "p")) == {"a.jpg": "row a", "b.PNG": "beside b", "c.png": "p"}
    assert capsys.readouterr().err == f"Note: {folder}: not used: a.txt.\n"
    jsonl(folder, {"file_name": "a.jpg", "text": "row a"})
    assert captions(read_folder(folder, None)) == {"a.jpg": "row a"}
    assert capsys.readouterr().err == f"Note: {folder}: not used: b.PNG, c.png, a.txt, b.txt.\n"
    jsonl(folder, {"file_name": "a.jpg", "score": 3})  # a table without captions
    assert captions(read_folder(folder, "p")) == {"a.jpg": "p", "b.PNG": "beside b", "c.png": "p"}


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.jpg.txt", "a.jpg.CAPTION"])
def test_names_of_sidecars(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / name).write_text("a red square")
    assert captions(read_folder(tmp_path, None)) == {"a.jpg": "a red square"} and not capsys.readouterr().err


def test_kohyas_folder_from_above_and_from_inside(tmp_path: Path) -> None:
    (tmp_path / "img" / "10_sks dog").mkdir(parents=True), (tmp_path / "log").mkdir()
    picture(tmp_path / "img" / "10_sks dog" / "a.png")
    for folder in (tmp_path, tmp_path / "img", tmp_path / "img" / "10_sks dog"):
        (example,) = read_folder(folder, None)
        assert (example.caption, example.repeats, example.path.name) == ("sks dog", 10, "a.png")
    (example,) = read_folder(tmp_path / "img" / "10_sks dog", "a prompt of its own")
    assert (example.caption, example.repeats) == ("a prompt of its own", 1)


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
    with pytest.raises(DataError, match="line 3: not CSV .more fields"):
        read_folder(folder, None)


A, B = {"file_name": "a.jpg", "text": "x"}, {"file_name": "b.PNG", "text": "y"}
BAD_METADATA: dict[str, tuple[list[str], str]] = {
    "not JSON": ([json.dumps(A), "{'file_name': 'b.PNG'}"], r"metadata.jsonl, line 2: not JSON.*one object per line"),
    "pretty": (json.dumps(A, indent=1).splitlines(), "line 1: not JSON.*one object per line, such as"),
    "a list": ([json.dumps([A, B])], "line 1: not an object"),
    "empty": (["", ""], "is empty"),
    "no file_name": ([json.dumps(A), '{"file": "b.PNG", "text": "y"}'], 'line 2: no "file_name" .*file, text'),
    "absent": ([json.dumps(A), '{"file_name": "b.png", "text": "y"}'], 'line 2: there is no file.* mean "b.PNG"'),
    "outside": ([json.dumps(A), '{"file_name": "x/../../b.PNG", "text": "y"}'], "line 2: there is no file 'x/../../b.PNG' in"),
    "absolute": (['{"file_name": "/etc/passwd", "text": "y"}'], "line 1: there is no file '/etc/passwd' in"),
    "twice": ([json.dumps(A), json.dumps(B), '{"file_name": "./a.jpg", "text": "z"}'], "line 3: .*already on line 1"),
    "no caption": ([json.dumps(A), '{"file_name": "b.PNG"}'], 'line 2: "text" is None, not a text in quotes'),
    "empty caption": ([json.dumps(A), '{"file_name": "b.PNG", "text": " "}'], 'line 2: "text" is empty'),
    "deep": (["[" * 100_000], "line 1: not JSON"),
    "long name": ([json.dumps({"file_name": "a" * 5000, "text": "y"})], "line 1: there is no file"),
    "NUL": (['{"file_name": "a.jpg", "text": "\\u0000"}'], 'line 1: "text" is empty'),
    "invisible": (['{"file_name": "a.jpg", "text": " \\u200b\\ufeff"}'], 'line 1: "text" is empty'),
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
    "misnamed table": (write("metadata.json1", b""), "Give them a metadata.jsonl"),
    "empty sidecar": (write("a.txt", b" \n"), "a.txt is empty"),
    "two sidecars": (both_captions, "a.jpg has two captions, a.txt and a.caption"),
    "two tables": (both_tables, "both metadata.csv and metadata.jsonl"),
    "not UTF-8": (write("a.txt", b"\xff\xfe\x00x"), "a.txt cannot be read as UTF-8"),
    "table is a folder": (lambda folder: (folder / "metadata.jsonl").mkdir(), "cannot be read"),
    "table is a dead link": (lambda folder: (folder / "metadata.jsonl").symlink_to("nowhere"), "cannot be read"),
    "invisible sidecar": (write("a.txt", "\u200b\0".encode()), "a.txt is empty"),
    "open quote": (write("metadata.csv", b'file_name,text\na.jpg,"dog\n'), "not CSV"),
    "no pictures": (lambda folder: [remove_pictures(folder), write("a.heic", b"")(folder)], "no pictures.*holds .heic"),
    "nested": (lambda folder: [remove_pictures(folder), picture(folder / "train" / "a.png")], "no pictures.*holds train"),
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


def test_every_mistake_is_collected(folder: Path) -> None:
    """read_folder names the first and says how many there are; Scan has them all, and what is right."""
    jsonl(folder, {"file_name": "c.png", "text": "c"}, {"file_name": "b.PNG", "text": "b"}, {"file_name": "a.jpg", "text": ""})
    scan = Scan(None).of(folder)
    assert [e.caption for e in scan.examples] == ["b"] and len(scan.errors) == 2
    assert "line 1: there is no file 'c.png'" in scan.errors[0] and 'line 3: "text" is empty' in scan.errors[1]
    with pytest.raises(DataError, match=r"line 1: there is no file.*\n1 more: minidiff data check .* lists them all"):
        read_folder(folder, None)


def test_a_picture_without_a_caption_is_no_stray(folder: Path) -> None:
    (folder / "notes.md").write_text("x")
    scan = Scan(None).of(folder)
    assert len(scan.errors) == 1 and scan.notices == [f"{folder}: not used: notes.md."]


def test_kohya_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "10_sks dog" / "a.png"), picture(tmp_path / "10_sks dog" / "b.png")
    (tmp_path / "10_sks dog" / "b.txt").write_text("a sks dog asleep")
    picture(tmp_path / "2_dog" / "c.png"), picture(tmp_path / "other" / "d.png")
    found = read_folder(tmp_path, None)
    assert [(e.path.name, e.caption, e.repeats) for e in found] == [
        ("a.png", "sks dog", 10),
        ("b.png", "a sks dog asleep", 10),
        ("c.png", "dog", 2),
    ]
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "not used: other" in notice
    assert [e.caption for e in read_folder(tmp_path, "the prompt")] == ["the prompt", "a sks dog asleep", "the prompt"]
    assert {e.caption for e in read_folder(tmp_path, "one prompt", captions=False)} == {"one prompt"}
    picture(tmp_path / "e.png")  # a folder with pictures of its own is no folder of folders
    assert captions(read_folder(tmp_path, "p")) == {"e.png": "p"}


def test_bad_kohya_folders(tmp_path: Path) -> None:
    picture(tmp_path / "0_dog" / "a.png")
    with pytest.raises(DataError, match="no pictures.*holds 0_dog"):
        read_folder(tmp_path, None)
    (tmp_path / "0_dog").rename(tmp_path / "1_dog"), (tmp_path / "3_cat").mkdir()
    with pytest.raises(DataError, match="3_cat has no pictures"):
        read_folder(tmp_path, None)


def test_masks_beside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(folder / "a.mask.png"), picture(folder / "lonely.mask.png")
    found = read_folder(folder, "p", masks=True)
    assert {e.path.name: e.mask and e.mask.name for e in found} == {"a.jpg": "a.mask.png", "b.PNG": None}
    notice = capsys.readouterr().err
    assert "without a mask, and so learnt as a whole: b.PNG." in notice and "not used: lonely.mask.png" in notice
    assert "a.mask.png" not in captions(read_folder(folder, "p"))  # no picture, even where masks are not asked for
    assert "not used: a.mask.png" in capsys.readouterr().err


def test_mask_column(folder: Path) -> None:
    picture(folder / "masks" / "m.png")
    jsonl(folder, {"file_name": "a.jpg", "mask": "masks/m.png", "words": "x"}, {"file_name": "b.PNG", "words": "y"})
    assert [e.mask and e.mask.name for e in read_folder(folder, None, masks=True)] == ["m.png", None]
    assert [e.mask for e in read_folder(folder, None)] == [None, None]
    jsonl(folder, {"file_name": "a.jpg", "mask": "masks/n.png", "text": "x"})
    with pytest.raises(DataError, match="line 1: there is no file 'masks/n.png'"):
        read_folder(folder, None, masks=True)


def test_no_mask_at_all(folder: Path) -> None:
    with pytest.raises(DataError, match="no picture has a mask, and --masked_loss needs some: a.mask.png beside a.jpg"):
        read_folder(folder, "p", masks=True)


def test_hints_are_used_wherever_they_lie(folder: Path) -> None:
    """In a column of the metadata, which --no_captions does not leave out, or in a folder inside that of the pictures."""
    edges = [picture(folder / "edges" / name) for name in ("a.png", "b.png")]
    scan = Scan("p", hint_column="conditioning_image", hint_folder=str(folder / "edges")).of(folder)
    assert [e.hint for e in scan.examples] == edges and not scan.notices and not scan.errors
    picture(folder / "c.png")
    rows = [{"file_name": name, "text": "t", "conditioning_image": "c.png"} for name in ("a.jpg", "b.PNG")]
    jsonl(folder, *rows)
    for captions, caption in ((True, "t"), (False, "p")):
        scan = Scan("p", captions=captions, hint_column="conditioning_image").of(folder)
        assert [(e.path.name, e.caption, e.hint) for e in scan.examples] == [
            (name, caption, folder / "c.png") for name in ("a.jpg", "b.PNG")
        ]
        assert scan.notices == [f"{folder}: not used: edges."]
