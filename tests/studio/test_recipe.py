"""A picture says how it was made, and is made again from that, to the pixel; hashes, and hostile recipes."""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from PIL import Image

import minidiff
from minidiff.cli import draw_commands as drawing
from minidiff.cli.draw_flags import Sample
from minidiff.core.errors import DataError, SettingsError
from minidiff.draw.images import read_png_text, save_png
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.lora_file import save_lora
from minidiff.files.values import printable
from minidiff.files.word_file import save_embedding
from minidiff.studio.a1111 import parameters, read_a1111, with_named_loras
from minidiff.studio.hashes import HASHES, model_sha256, sha256_of
from minidiff.studio.recipe import NOT_PIXELS, PROMPTS, Origin, check_origin, public_path, read_origin, recipe_texts

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_adapters import random_adapter  # noqa: E402


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def draw(s: Sample, path: str | Path) -> Image.Image:
    """As `minidiff sample` does."""
    pipe = drawing.load(s, [s.prompt or ""])
    pipe.set_progress_bar_config(disable=True)
    image = drawing.draw(pipe, s, s.prompt)
    save_png(image, path, recipe_texts(vars(s), pipe, image.size))
    return Image.open(path)


def read(path: str | Path) -> tuple[Origin, Sample]:
    """As `minidiff sample --from` does."""
    origin = read_origin(path, Sample)
    return origin, Sample(output=f"{origin.path.stem}-again.png", **origin.settings)


def notes(origin: Origin, s: Sample) -> list[str]:
    return check_origin(origin, vars(s))


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
    files: dict[str, Any] = {"lora": (lora,), "textual_inversion": (word,), "pretrained_model_name_or_path": str(tiny_folder)}
    first = settings(tiny_folder, lora_weight=(0.7,), prompt="a <toy>, sks", **files, **drawn)
    image = draw(first, "picture.png")
    origin, found = read("picture.png")
    asked = replace(found, **files)  # they lie outside the working folder, so the picture does not say where
    assert asked == again(first)
    assert notes(origin, asked) == []
    assert draw(asked, "again.png").tobytes() == image.tobytes() and len(set(image.tobytes())) > 20
    assert read_png_text("again.png") == read_png_text("picture.png")
    other = replace(asked, seed=8, lora=(), lora_weight=())
    assert notes(origin, other) == [] and draw(other, "other.png").tobytes() != image.tobytes()


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
    assert about["machine"] | {"kernels": ""} == {"device": "cpu", "dtype": "float32", "threads": "1", "kernels": ""}


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
    neither = {"sampler", "tokenizer"}
    texts = {name for name, hint in get_type_hints(Sample).items() if str in (hint, *get_args(hint)) or "str, ..." in str(hint)}
    assert texts - HASHES.keys() - set(PROMPTS) - set(NOT_PIXELS) <= neither, "sort the new flag into HASHES or NOT_PIXELS"


@dataclass(frozen=True)
class Later(Sample):
    """A setting that another version has; by reflection, what the dataclass has, the recipe has."""

    extra: tuple[float, ...] = ()


def stored(s: Sample) -> dict[str, Any]:
    """The settings in the JSON of its picture."""
    found: dict[str, Any] = json.loads(recipe_texts(vars(s), load(s), (32, 32))["minidiff"])["settings"]
    return found


def test_a_new_setting_is_stored_and_read_at_once(tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, "model")
    s = Later(**{f.name: getattr(settings(Path("model")), f.name) for f in fields(Sample)}, extra=(0.1, 2.0))
    assert set(stored(s)) == {f.name for f in fields(Later)} - set(NOT_PIXELS)
    save_png(Image.new("RGB", (32, 32)), "picture.png", recipe_texts(vars(s), load(s), (32, 32)))
    assert any("does not have the settings ['extra']." in note for note in read_origin("picture.png", Sample).notes)
    assert Later(output="picture-again.png", **read_origin("picture.png", Later).settings) == again(s, sampler="ddim")


def test_from_a_picture_and_a_mask(tiny_folder: Path, home: Path) -> None:
    shutil.copytree(tiny_folder, "model")
    Image.effect_noise((32, 32), 90).convert("RGB").save("input.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save("mask.png")
    new: dict[str, Any] = {"image": "input.png", "mask_image": "mask.png", "strength": 0.6}
    s = settings(Path("model"), num_inference_steps=5, clip_skip=1, use_karras_sigmas=True, sampler="euler", **new)
    drawn = draw(s, "picture.png")
    texts = read_png_text("picture.png")
    assert "Euler, Schedule type: Karras" in texts["parameters"] and "strength: 0.6, Clip skip: 2" in texts["parameters"]
    origin, found = read("picture.png")
    assert found == again(s) and notes(origin, found) == [] and draw(found, "again.png").tobytes() == drawn.tobytes()
    plain = replace(s, strength=None)
    for silent, strength in ((plain, 1.0), (replace(plain, mask_image=None), 0.8), (settings(tiny_folder), None)):
        assert stored(silent)["strength"] == strength  # as the pipeline has it
    Image.new("RGB", (32, 32), "blue").save("input.png")
    assert "'input.png' (sha256 " in notes(origin, found)[0] and "is another one" in notes(origin, found)[0]
    Path("input.png").unlink()
    with pytest.raises(SettingsError, match="--image"):
        notes(origin, found)


def test_loras_that_the_prompt_names(tiny_folder: Path, home: Path) -> None:
    """They are stored as files like those of --lora, and drawn at the prompt's weight."""
    shutil.copytree(tiny_folder, "model")
    adapters(tiny_folder, Path("outputs.v1"))
    s = settings(Path("model"), prompt="a red dog <lora:ink:0.6>", lora_dir="outputs.v1")
    drawn = draw(s, "picture.png")
    texts = read_png_text("picture.png")
    assert texts["parameters"].startswith("a red dog <lora:ink:0.6>\nSteps")
    _, found = read("picture.png")
    assert found.lora == ("outputs.v1/ink.safetensors",) and found.lora_weight == (0.6,)
    assert draw(found, "again.png").tobytes() == drawn.tobytes()
    assert draw(replace(found, prompt="a red dog"), "flag.png").tobytes() == drawn.tobytes()
    bare = replace(found, prompt="a red dog", lora=(), lora_weight=())
    assert draw(bare, "bare.png").tobytes() != drawn.tobytes()
    with pytest.raises(SettingsError, match="--lora_dir"):
        with_named_loras(vars(replace(s, prompt="<lora:chalk>")))


# ------------------------------------------------------------------------------------------------------- what differs


def test_a_missing_file_is_one_message_that_names_the_flag(tiny_folder: Path, home: Path) -> None:
    lora, word = adapters(tiny_folder, home / "elsewhere")
    draw(settings(tiny_folder, lora=(lora,), textual_inversion=(word,)), "picture.png")
    other = shutil.copy(word, "other.safetensors")
    origin, found = read("picture.png")
    with pytest.raises(SettingsError, match="--pretrained_model_name_or_path"):
        notes(origin, found)
    found = replace(found, pretrained_model_name_or_path=str(tiny_folder), textual_inversion=(word,))
    with pytest.raises(SettingsError, match=r"ink\.safetensors' \(sha256 .*which is not here; give it with --lora\."):
        notes(origin, found)
    for flag in ((), (other,)):
        assert notes(origin, replace(found, lora=flag)) == []  # the flag wins


def test_what_differs_is_said(tiny_folder: Path, home: Path) -> None:
    shutil.copytree(tiny_folder, "model")
    lora, _ = adapters(tiny_folder, home)
    shutil.copy(lora, "ink.safetensors")
    draw(settings(Path("model"), lora=("ink.safetensors",)), "picture.png")
    save_lora(random_adapter({"unet": load(settings(tiny_folder)).unet}, seed=2), "ink.safetensors")
    altered("picture.png", versions={"torch": "1.0\x1b[2J"}, machine={"threads": 64, "device": "cuda"})
    origin, found = read("picture.png")
    file, versions = notes(origin, found)
    assert "'ink.safetensors' (sha256 " in file and "is another one" in file
    assert r"torch '1.0\x1b[2J' (here " in versions
    assert "threads 64 (here 1)" in versions and "device 'cuda' (here cpu)" in versions
    assert found.device is None and found.torch_dtype is None  # none of them is here


# ------------------------------------------------------------------------------------------------------ A1111's words


def test_parameters_are_read_back(tiny_folder: Path, home: Path) -> None:
    lora, word = adapters(tiny_folder, home)
    s = settings(tiny_folder, lora=(lora,), lora_weight=(0.7,), textual_inversion=(word,), sampler="dpm++_2m", seed=9)
    pipe = load(s)
    text = parameters(vars(s), pipe, (48, 32))
    model = model_sha256(str(tiny_folder))
    assert text.splitlines() == [
        "a red dog <lora:ink:0.7>",
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 5.0, Seed: 9, Size: 48x32, "
        f"Model hash: {model[:10]}, Model: model, Version: minidiff {minidiff.__version__}",
    ]
    found = read_a1111(text)
    same = {"prompt": "a red dog <lora:ink:0.7>", "seed": 9, "width": 48, "height": 32, "sampler": "dpm++_2m"}
    assert (same | {"use_karras_sigmas": False, "num_inference_steps": 2}).items() <= found.items()
    assert parameters(vars(s) | {"prompt": "a <lora:ink:0.7> dog"}, pipe, (8, 8)).count("<lora:") == 1


# -------------------------------------------------------------------------------------------------------------- hashes


def test_a_file_is_read_once_until_it_changes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "a.bin"
    file.write_bytes(b"a" * 1000)
    first = sha256_of(file)
    assert first == hashlib.sha256(b"a" * 1000).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr("minidiff.studio.hashes.sha256", lambda path: pytest.fail("read again"))
        assert sha256_of(file) == first == sha256_of(str(file))
    file.write_bytes(b"b" * 1001)
    assert sha256_of(file) == hashlib.sha256(b"b" * 1001).hexdigest()


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


# ------------------------------------------------------------------------------------------------------------- hostile


@pytest.fixture
def picture(tiny_folder: Path) -> str:
    shutil.copytree(tiny_folder, "model")
    s = settings(Path("model"))
    save_png(Image.new("RGB", (32, 32)), "picture.png", recipe_texts(vars(s), load(s), (32, 32)))
    return "picture.png"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "{"}, "no recipe"),
        ({"text": "[1]"}, "no recipe"),
        ({"text": "{}"}, "no recipe"),
        ({"text": '{"schema": 1, "settings": {}, "sha256": {}, "versions": {}, "machine": {}}'}, "no recipe"),
        ({"text": "[" * 400_000}, "no recipe"),
        ({"settings": {"guidance_scale": float("inf")}}, "not JSON compliant"),
        ({"settings": {"guidance_scale": float("nan")}}, "not JSON compliant"),
        ({"settings": {"lora_weight": [1, -float("inf")]}}, "not JSON compliant"),
        ({"settings": {"seed": 10**4000}}, "seed is inf"),
        ({"settings": {"guidance_scale": 10**400}}, "not JSON compliant"),
        ({"schema": 2}, "kind 2"),
        ({"schema": "\x1b[2J"}, r"kind .x1b"),
        ({"settings": {"prompt": "half a letter \ud800"}}, "no recipe"),
        ({"text": "x" * 1_000_001}, "no recipe"),
        ({"settings": {"num_inference_steps": "20"}}, "num_inference_steps is 20"),
        ({"settings": {"num_inference_steps": True}}, "num_inference_steps"),
        ({"settings": {"lora": "x"}}, "lora is x"),
        ({"settings": {"prompt": ["x\x1b"] * 9999}}, "prompt is"),
        ({"versions": None}, "no recipe"),
        ({"versions": 5}, "no recipe"),
        ({"sha256": []}, "no recipe"),
    ],
)
def test_hostile_recipes_are_one_clear_message(picture: str, changes: dict[str, Any], words: str) -> None:
    altered(picture, **changes)
    with pytest.raises(DataError, match=f"picture.png.*{words}") as error:
        read_origin(picture, Sample)
    assert len(str(error.value)) < 400 and printable(str(error.value)) == str(error.value)


def test_hostile_paths_are_defused(picture: str) -> None:
    paths = ["/etc/passwd", "../../secret", "~/x", "\\\\host\\share\\x", "a\0b", "x" * 5000]
    strange = {f"strange{i}\x1b": "\x1b" for i in range(5000)}
    altered(picture, settings={"lora": paths, "lora_weight": [1] * 6, **strange})
    origin, found = read(picture)
    assert found.lora == ("passwd", "secret", "x", "x", "a\0b", "x" * 5000)
    assert len(origin.notes) == 1 and printable(origin.notes[0]) == origin.notes[0] and len(origin.notes[0]) < 1000
    altered(picture, sha256={"lora": ["0" * 64] * 6, "image": [5, None], "x": {}, "tokenizer": "y"})
    for first in range(6):
        origin, found = read(picture)
        origin.settings["lora"] = found.lora[first:]
        with pytest.raises(SettingsError, match="--lora") as error:
            notes(origin, replace(found, lora=found.lora[first:]))
        assert printable(str(error.value)) == str(error.value)


def test_huge_numbers_are_left_to_the_checks_of_the_pipeline(picture: str, tiny_folder: Path) -> None:
    for change in ({"num_inference_steps": 10**9}, {"width": 10**9}, {"height": -8}):
        altered(picture, settings={"num_inference_steps": 2, "width": None, "height": None, **change})
        with pytest.raises(SettingsError):
            draw(read(picture)[1], "again.png")
    altered(picture, settings={"num_inference_steps": 1, "width": None, "height": None, "seed": 2**70})
    draw(read(picture)[1], "again.png")  # any whole number is a seed here


@pytest.mark.parametrize("versions", [{"torch": {"a": []}}, {"torch": "x" * 100_000}])
def test_odd_versions_are_only_a_note(picture: str, versions: object) -> None:
    altered(picture, versions=versions)
    (note,) = notes(*read(picture))
    assert "torch" in note and len(note) < 300


def test_a_lora_in_a_negative_prompt_of_a1111_is_left_out_and_named(tmp_path: Path) -> None:
    text = "a dog\nNegative prompt: blurred <lora:bad:0.5> dark\nSteps: 2, Seed: 3"
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"parameters": text})
    origin = read_origin(tmp_path / "a.png", Sample)
    assert origin.settings["negative_prompt"] == "blurred  dark"
    assert "its negative prompt names <lora:bad:0.5>, which is left out" in origin.notes[-1]
