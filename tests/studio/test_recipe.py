"""A picture says how it was made, and is made again from that, to the pixel; hashes, places, and hostile recipes."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import minidiff
from minidiff.cli import draw_commands as drawing
from minidiff.cli.flags import Sample
from minidiff.core.errors import DataError, MinidiffError, SettingsError
from minidiff.draw.images import read_png_text, save_png
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.lora_file import save_lora
from minidiff.files.word_file import save_embedding
from minidiff.studio import hashes, replay
from minidiff.studio.foreign import read_a1111
from minidiff.studio.hashes import HASHES, cache_file, model_sha256, remember_place, remembered_place, sha256_of
from minidiff.studio.recipe import NOT_PIXELS, TEXTS, chunks, parameters, public_path, recipe, with_named_loras
from minidiff.studio.replay import check_origin, read_origin

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_adapters import random_adapter  # noqa: E402


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a working folder of the test's own."""
    hashes._remembered.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def draw(s: Sample, path: str | Path) -> Image.Image:
    """As `minidiff sample` does."""
    pipe = drawing.load(s, [s.prompt or ""])
    pipe.set_progress_bar_config(disable=True)
    image = drawing.draw(pipe, s, s.prompt)
    save_png(image, path, chunks(s, pipe, s.seed, image))
    return Image.open(path)


def load(s: Sample) -> StableDiffusionPipeline:
    return drawing.load(s, [])


def settings(model: Path, **changes: Any) -> Sample:
    plain = Sample(prompt="a red dog", pretrained_model_name_or_path=str(model), num_inference_steps=2, seed=7)
    return replace(plain, **changes)


def again(s: Sample, **changes: Any) -> Sample:
    """What the picture of these settings gives back."""
    return replace(s, output="picture-again.png", device="cpu", torch_dtype="float32", **changes)


def altered(path: str, **changes: Any) -> None:
    """Write other values into the recipe of a picture: settings=…, or a whole text="…"."""
    texts = read_png_text(path)
    about = json.loads(texts["minidiff"])
    for name, value in changes.items():
        about[name] = {**about[name], **value} if isinstance(value, dict) else value
    with Image.open(path) as image:
        image.load()
        save_png(image, path, texts | {"minidiff": changes.get("text", json.dumps(about))})


def adapters(model: Path, folder: Path) -> tuple[str, str]:
    """A LoRA and a new word for the tiny model."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    found = random_adapter({"unet": pipe.unet}, seed=1)
    lora = save_lora(found, folder / "ink.safetensors")
    word = save_embedding(folder / "toy.safetensors", "<toy>", torch.randn(2, 24, generator=torch.Generator().manual_seed(3)))
    return str(lora), str(word)


# --------------------------------------------------------------------------------------------------------- round trips


def test_the_same_pixels_again(tiny_folder: Path, home: Path) -> None:
    lora, word = adapters(tiny_folder, home / "elsewhere")
    drawn = {"sampler": "euler_a", "width": 48, "guidance_scale": 3.5, "negative_prompt": "blue, “grün”\n犬"}
    first = settings(tiny_folder, lora=(lora,), lora_weight=(0.7,), textual_inversion=(word,), prompt="a <toy>, sks", **drawn)
    image = draw(first, "picture.png")
    origin = read_origin("picture.png")
    assert origin.settings == again(first)
    assert check_origin(origin, origin.settings) == []
    assert draw(origin.settings, "again.png").tobytes() == image.tobytes() and len(set(image.tobytes())) > 20
    assert read_png_text("again.png") == read_png_text("picture.png")
    other = replace(origin.settings, seed=8, lora=(), lora_weight=())
    assert check_origin(origin, other) == [] and draw(other, "other.png").tobytes() != image.tobytes()


def test_nothing_of_the_makers_machine_is_in_the_picture(tiny_folder: Path, home: Path) -> None:
    lora, word = adapters(tiny_folder, home / "elsewhere")
    draw(settings(tiny_folder, lora=(lora,), textual_inversion=(word,)), "picture.png")
    raw = Path("picture.png").read_bytes()
    assert str(home).encode() not in raw and b"elsewhere" not in raw and str(tiny_folder.parent).encode() not in raw
    about = json.loads(read_png_text("picture.png")["minidiff"])
    assert about["settings"]["lora"] == ["ink.safetensors"] and about["settings"]["lora_weight"] == [1.0]
    assert about["sha256"]["lora"] == [hashlib.sha256(Path(lora).read_bytes()).hexdigest()]
    assert about["settings"]["seed"] == 7 and about["settings"]["sampler"] == "ddim"
    assert set(about["versions"]) == {"minidiff", "torch", "transformers", "python"}
    assert about["machine"] | {"kernels": ""} == {"device": "cpu", "dtype": "float32", "threads": 1, "kernels": ""}


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("checkpoints/pocket", "checkpoints/pocket"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("/home/ada/loras/dog.safetensors", "dog.safetensors"),
        ("~/dog", "dog"),
        ("../ada/dog", "dog"),
        ("out/../../dog", "dog"),
        ("C:\\Users\\Ada\\dog", "dog"),
        ("\\\\server\\share\\dog", "dog"),
        ("~ada", "unnamed"),
        ("/", "unnamed"),
        ("..", "unnamed"),
    ],
)
def test_public_path(path: str, public: str) -> None:
    assert public_path(path) == public == public_path(public)


def test_every_setting_is_sorted() -> None:
    """A new flag that is a text must be a path with a hash, a prompt, or known to be neither."""
    neither = {"sampler"}
    texts = {name for name, hint in get_type_hints(Sample).items() if str in (hint, *get_args(hint)) or "str, ..." in str(hint)}
    assert texts - HASHES.keys() - set(TEXTS) - set(NOT_PIXELS) <= neither, "sort the new flag into HASHES or NOT_PIXELS"


@dataclass(frozen=True)
class Later(Sample):
    """A setting that another version has; by reflection, what the dataclass has, the recipe has."""

    extra: tuple[float, ...] = ()


def test_a_new_setting_is_stored_and_read_at_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = Later(**{f.name: getattr(settings(tiny_folder), f.name) for f in fields(Sample)}, extra=(0.1, 2.0))
    pipe, image = load(s), Image.new("RGB", (32, 32))
    assert set(recipe(s, pipe, 7, (32, 32))["settings"]) == {f.name for f in fields(Later)} - set(NOT_PIXELS)
    assert recipe(s, pipe, 9, (32, 32))["settings"]["seed"] == 9  # the picture's, not the first one's
    save_png(image, "picture.png", chunks(s, pipe, 7, image))
    assert any("extra: [0.1, 2.0]" in note for note in read_origin("picture.png").notes)  # by a version without it
    monkeypatch.setattr(replay, "Sample", Later)
    assert read_origin("picture.png").settings == again(s, sampler="ddim")


def test_from_a_picture_and_a_mask(tiny_folder: Path, home: Path) -> None:
    Image.effect_noise((32, 32), 90).convert("RGB").save(home / "input.png")
    Image.new("L", (32, 32), 0).save(home / "mask.png")
    with Image.open(home / "mask.png") as mask:
        mask.paste(255, (0, 0, 16, 32))
        mask.save(home / "mask.png")
    new: dict[str, Any] = {"image": str(home / "input.png"), "mask_image": str(home / "mask.png"), "strength": 0.6}
    s = settings(tiny_folder, num_inference_steps=5, clip_skip=1, use_karras_sigmas=True, sampler="euler", **new)
    drawn = draw(s, "picture.png")
    texts = read_png_text("picture.png")
    assert "Euler, Schedule type: Karras" in texts["parameters"] and "strength: 0.6, Clip skip: 2" in texts["parameters"]
    stored = json.loads(texts["minidiff"])["settings"]
    assert (stored["image"], stored["mask_image"]) == ("input.png", "mask.png")
    origin = read_origin("picture.png")
    assert origin.settings == again(s) and draw(origin.settings, "again.png").tobytes() == drawn.tobytes()
    plain = replace(s, strength=None)
    for silent, strength in ((plain, 1.0), (replace(plain, mask_image=None), 0.8), (settings(tiny_folder), None)):
        assert recipe(silent, load(silent), 7, (32, 32))["settings"]["strength"] == strength  # as the pipeline has it
    Image.new("RGB", (32, 32), "blue").save(home / "input.png")
    assert "input.png is not the file" in check_origin(origin, origin.settings)[0]
    (home / "input.png").unlink()
    with pytest.raises(SettingsError, match="--image"):
        check_origin(origin, origin.settings)


def test_loras_that_the_prompt_names(tiny_folder: Path, home: Path) -> None:
    """They are stored as files like those of --lora, and drawn at the prompt's weight, wherever they lay."""
    adapters(tiny_folder, home / "outputs.v1")
    s = settings(tiny_folder, prompt="a red dog <lora:ink:0.6>", lora_dir=str(home / "outputs.v1"))
    drawn = draw(s, "picture.png")
    texts = read_png_text("picture.png")
    assert texts["parameters"].startswith("a red dog <lora:ink:0.6>\nSteps") and 'Lora hashes: "ink: ' in texts["parameters"]
    assert json.loads(texts["minidiff"])["settings"]["lora"] == ["ink.safetensors"]
    origin = read_origin("picture.png")
    assert origin.settings.lora == (str(home / "outputs.v1" / "ink.safetensors"),) and origin.settings.lora_weight == (0.6,)
    assert draw(origin.settings, "again.png").tobytes() == drawn.tobytes()
    assert draw(replace(origin.settings, prompt="a red dog"), "flag.png").tobytes() == drawn.tobytes()
    bare = replace(origin.settings, prompt="a red dog", lora=(), lora_weight=())
    assert draw(bare, "bare.png").tobytes() != drawn.tobytes()
    with pytest.raises(SettingsError, match="--lora_dir"):
        with_named_loras(replace(s, prompt="<lora:chalk>"), "<lora:chalk>")


# ------------------------------------------------------------------------------------------------------- what differs


def test_files_are_found_again(tiny_folder: Path, home: Path) -> None:
    """As typed; beside the picture; where the hash was last seen. The same bytes go before the same name."""
    lora, _ = adapters(tiny_folder, home / "elsewhere")
    draw(settings(tiny_folder, lora=(lora,)), "picture.png")
    Path("ink.safetensors").write_bytes(b"of the same name")
    assert read_origin("picture.png").settings.lora == (lora,)
    cache_file().unlink()
    shutil.copy(lora, "ink.safetensors")
    assert read_origin("picture.png").settings.lora == ("ink.safetensors",)
    Path("album").mkdir()
    shutil.move("picture.png", "album/picture.png")
    shutil.move("ink.safetensors", "album/ink.safetensors")
    assert read_origin("album/picture.png").settings.lora == (str(Path("album", "ink.safetensors")),)


def test_a_missing_file_is_one_message_that_names_the_flag(tiny_folder: Path, home: Path) -> None:
    lora, word = adapters(tiny_folder, home / "elsewhere")
    draw(settings(tiny_folder, lora=(lora,), textual_inversion=(word,)), "picture.png")
    other = shutil.copy(word, "other.safetensors")
    Path(lora).unlink()
    origin = read_origin("picture.png")
    with pytest.raises(SettingsError, match=r"ink\.safetensors \(sha256 .*which is not here; give it with --lora\."):
        check_origin(origin, origin.settings)
    for flag in ((), (other,)):
        assert check_origin(origin, replace(origin.settings, lora=flag)) == []  # the flag wins
    cache_file().unlink()
    origin = read_origin("picture.png")
    with pytest.raises(SettingsError, match="--pretrained_model_name_or_path"):
        check_origin(origin, replace(origin.settings, lora=()))


def test_what_differs_is_said(tiny_folder: Path, home: Path) -> None:
    lora, _ = adapters(tiny_folder, home)
    shutil.copy(lora, "ink.safetensors")
    draw(settings(tiny_folder, lora=("ink.safetensors",)), "picture.png")
    save_lora(random_adapter({"unet": load(settings(tiny_folder)).unet}, seed=2), "ink.safetensors")
    altered("picture.png", versions={"torch": "1.0\x1b[2J"}, machine={"threads": 64, "device": "cuda"})
    origin = read_origin("picture.png")
    notes = check_origin(origin, origin.settings)
    assert len(notes) == 2 and "ink.safetensors is not the file" in notes[0]
    assert "torch 1.0 (here " in notes[1] and "threads 64 (here 1)" in notes[1] and "device cuda (here cpu)" in notes[1]
    assert origin.settings.device is None and origin.settings.torch_dtype is None  # none of them is here


def test_the_picture_itself_is_not_drawn_over(tiny_folder: Path) -> None:
    draw(settings(tiny_folder), "picture.png")
    origin = read_origin("picture.png")
    with pytest.raises(SettingsError, match="choose another name"):
        check_origin(origin, replace(origin.settings, output="../work/picture.png"))


# ------------------------------------------------------------------------------------------------------ A1111's words


def test_parameters_are_read_back(tiny_folder: Path, home: Path) -> None:
    lora, word = adapters(tiny_folder, home)
    s = settings(tiny_folder, lora=(lora,), lora_weight=(0.7,), textual_inversion=(word,), sampler="dpm++_2m", seed=9)
    pipe = load(s)
    text = parameters(s, pipe, "a red dog", 9, Image.new("RGB", (48, 32)))
    model, data = model_sha256(str(tiny_folder)), sha256_of(lora, data_only=True)
    assert text.splitlines() == [
        "a red dog <lora:ink:0.7>",
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 5.0, Seed: 9, Size: 48x32, "
        f'Model hash: {model[:10]}, Model: model, Lora hashes: "ink: {data[:12]}", TI hashes: "toy: {sha256_of(word)[:12]}", '
        f"Version: minidiff {minidiff.__version__}",
    ]
    reading = read_a1111(text)
    assert reading.program == f"A1111 minidiff {minidiff.__version__}"
    same = {"prompt": "a red dog", "seed": 9, "width": 48, "height": 32, "sampler": "dpm++_2m", "use_karras_sigmas": False}
    assert same.items() <= reading.settings.items()
    assert parameters(s, pipe, "a <lora:ink:0.7> dog", 9, Image.new("RGB", (8, 8))).count("<lora:") == 1


# -------------------------------------------------------------------------------------------------------------- hashes


def big(path: Path, letter: bytes = b"a", age: float = 100) -> Path:
    path.write_bytes(letter * (hashes.REMEMBERED + 1))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - int(age * 1e9)))
    return path


def test_hashes_are_remembered_until_the_file_changes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = big(home / "a.bin")
    first = sha256_of(file)
    assert first == hashlib.sha256(file.read_bytes()).hexdigest()
    hashes._remembered.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "_digest", lambda *_: pytest.fail("read again"))
        assert sha256_of(file) == first == sha256_of(str(file))
    big(file, b"b", age=50)
    assert sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest() != first
    assert list(json.loads(cache_file().read_text())["files"]) == [str(file)]


def test_a_file_that_has_just_changed_is_not_remembered(home: Path) -> None:
    sha256_of(big(home / "a.bin", age=0))
    assert not cache_file().exists()


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", '{"files": 5, "places": []}', '{"files": {"X": 5}}', "\x00"])
def test_a_broken_cache_costs_nothing_but_time(home: Path, content: str) -> None:
    file = big(home / "a.bin")
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content.replace("X", str(file)))
    assert sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert json.loads(cache_file().read_text())["files"][str(file)]["sha256"] == sha256_of(file)
    assert not list(cache_file().parent.glob("*.part"))


def test_a_cache_that_cannot_be_written_is_no_error(home: Path) -> None:
    (home / "cache").write_text("a file where the folder should be")
    file = big(home / "a.bin")
    assert sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    remember_place("0" * 64, file)
    assert remembered_place("0" * 64) is None


def test_the_cache_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "MAX_ENTRIES", 3)
    for i in range(5):
        remember_place(f"{i}", f"/p{i}")
    assert [remembered_place(f"{i}") for i in range(5)] == [None, None, "/p2", "/p3", "/p4"]


def test_a_cache_home_that_is_relative_is_ignored(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(home))
    assert cache_file() == home / ".cache" / "minidiff" / "hashes.json"


def test_model_hash_is_that_of_coreutils_lines(tiny_folder: Path, home: Path) -> None:
    copy = shutil.copytree(tiny_folder, home / "copy")
    names = [f"{part}/config.json" for part in ("text_encoder", "unet", "vae")]
    names += [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")] + ["text_encoder/model.safetensors"]
    names += ["scheduler/scheduler_config.json", *(f"tokenizer/{p.name}" for p in (copy / "tokenizer").iterdir())]
    lines = "".join(f"{hashlib.sha256((copy / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names))
    assert model_sha256(str(copy)) == hashlib.sha256(lines.encode()).hexdigest() == model_sha256(str(tiny_folder))
    (copy / "README.md").write_text("a card")
    (copy / "unet" / "other.safetensors").write_text("not read by the pipeline")
    assert model_sha256(str(copy)) == model_sha256(str(tiny_folder))
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert model_sha256(str(copy)) != model_sha256(str(tiny_folder))


def test_no_tokenizer_has_no_hash(home: Path) -> None:
    with pytest.raises(MinidiffError, match="there is no tokenizer in it"):
        HASHES["tokenizer"](str(home / "cache"))


def test_data_hash_leaves_the_header_out(home: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.arange(9.0)}, home / f"{name}.safetensors", {"title": name * 20})
    a, b = home / "a.safetensors", home / "b.safetensors"
    assert sha256_of(a) != sha256_of(b) and sha256_of(a, data_only=True) == sha256_of(b, data_only=True)
    assert sha256_of(a, data_only=True) == hashlib.sha256(torch.arange(9.0).numpy().tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- hostile


@pytest.fixture
def picture(tiny_folder: Path) -> str:
    s = settings(tiny_folder)
    image = Image.new("RGB", (32, 32))
    save_png(image, "picture.png", chunks(s, load(s), 7, image))
    return "picture.png"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "{"}, "no JSON"),
        ({"text": "[1]"}, "no recipe"),
        ({"text": "{}"}, "no recipe"),
        ({"text": "[" * 400_000}, "nested too deep"),
        ({"text": '{"schema": 1, "settings": {"guidance_scale": 1e999}}'}, "guidance_scale is inf"),
        ({"text": '{"schema": 1, "settings": {"guidance_scale": NaN}}'}, "guidance_scale is None"),
        ({"text": '{"schema": 1, "settings": {"lora_weight": [1, -1e999]}}'}, "lora_weight"),
        ({"text": '{"schema": 1, "settings": {"seed": ' + "9" * 5000 + "}}"}, "no JSON"),
        ({"settings": {"guidance_scale": 10**400}}, "guidance_scale is 1000"),
        ({"settings": {"lora_weight": [10**400]}}, r"lora_weight is \[1000"),
        ({"settings": {"num_inference_steps": 10**400}}, "num_inference_steps is 1000"),
        ({"settings": {"width": -(2**63)}}, "width is -9223372036854775808"),
        ({"schema": 2}, "kind 2"),
        ({"schema": "\x1b[2J"}, "kind ;"),
        ({"settings": {"num_inference_steps": "20"}}, "num_inference_steps is 20"),
        ({"settings": {"num_inference_steps": True}}, "num_inference_steps"),
        ({"settings": {"lora": "x"}}, "lora is x"),
        ({"settings": {"prompt": ["x\x1b"] * 9999}}, "prompt is"),
    ],
)
def test_hostile_recipes_are_one_clear_message(picture: str, changes: dict[str, Any], words: str) -> None:
    altered(picture, **changes)
    with pytest.raises(DataError, match=f"picture.png.*{words}") as error:
        read_origin(picture)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_hostile_texts_and_paths_are_defused(picture: str) -> None:
    paths = ["/etc/passwd", "../../secret", "~/x", "\\\\host\\share\\x", "a\0b", "x" * 5000]
    strange = {f"strange{i}\x1b": "\x1b" for i in range(5000)}
    altered(picture, settings={"prompt": "a \x1b[31mdog\ud800\u202e", "lora": paths, "lora_weight": [1] * 6, **strange})
    origin = read_origin(picture)
    assert origin.settings.prompt == "a dog"
    assert origin.settings.lora == ("passwd", "secret", "x", "x", "ab", "x" * 5000)
    assert len(origin.notes) == 3 and all(note.isprintable() and len(note) < 1000 for note in origin.notes)
    altered(picture, sha256={"lora": ["0" * 64] * 6, "image": [5, None], "x": {}, "tokenizer": "y"})
    origin = read_origin(picture)
    with pytest.raises(SettingsError, match="--lora") as error:
        check_origin(origin, origin.settings)
    assert str(error.value).isprintable()


def test_huge_numbers_are_left_to_the_checks_of_the_pipeline(picture: str, tiny_folder: Path) -> None:
    for change in ({"num_inference_steps": 10**9}, {"width": 10**9}, {"height": -8}):
        altered(picture, settings={"num_inference_steps": 2, "width": None, "height": None, **change})
        with pytest.raises(SettingsError):
            draw(read_origin(picture).settings, "again.png")
    altered(picture, settings={"num_inference_steps": 1, "width": None, "height": None, "seed": 2**70})
    draw(read_origin(picture).settings, "again.png")  # any whole number is a seed here


@pytest.mark.parametrize("versions", [None, 5, {"torch": {"a": []}}, {"torch": "x" * 100_000}])
def test_odd_versions_are_only_a_note(picture: str, versions: object) -> None:
    altered(picture, versions=versions)
    origin = read_origin(picture)
    notes = check_origin(origin, origin.settings)
    assert len(notes) == 1 and "torch" in notes[0] and len(notes[0]) < 300
