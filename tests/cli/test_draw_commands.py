"""The drawing commands from their flags to their files, on a tiny model; and what wrong flags get to hear."""

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_adapters import shake
from tiny_ip_adapters import picture, tiny_ip_adapter, tiny_tower_folder

from minidiff.cli import draw_commands as drawing
from minidiff.cli.draw_commands import lora_names
from minidiff.cli.main import main
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.errors import SettingsError
from minidiff.core.inject import adapter_weights, inject
from minidiff.draw.canny import canny
from minidiff.draw.images import read_png_text, save_png
from minidiff.draw.lora_tags import in_lora_dir
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.controlnet import write_controlnet
from minidiff.files.lora_file import save_lora
from minidiff.files.word_file import save_embedding

DOG = "a photo of a red dog"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def loras(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two LoRAs: dog.safetensors and chalk.v2.safetensors."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("dog", "chalk.v2")):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
        inject(pipe.unet, 2, seed=seed)
        shake(pipe.unet, size=0.5 + seed)
        save_lora(adapter_weights(pipe.adaptable), folder / f"{name}.safetensors")
    return folder


def run(tiny_folder: Path, *argv: str) -> None:
    command, *rest = argv
    main([command, *rest, "--pretrained_model_name_or_path", str(tiny_folder), "--num_inference_steps", "3"])


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def like(a: str, b: str) -> bool:
    """Are these the same picture, one of them in WebP, which loses some of it?"""
    grey = [pixels(path).mean(axis=-1).ravel() for path in (a, b)]
    return bool(np.corrcoef(*grey)[0, 1] > 0.9)


def same(a: str, b: str) -> bool:
    return np.array_equal(pixels(a), pixels(b))


def refused(capsys: pytest.CaptureFixture[str], tiny_folder: Path, *argv: str) -> str:
    """Code 2 and a message, and no file."""
    before = sorted(Path().iterdir())
    with pytest.raises(SystemExit) as leave:
        run(tiny_folder, *argv)
    said = capsys.readouterr().err
    assert leave.value.code == 2 and "Traceback" not in said and sorted(Path().iterdir()) == before, said
    return said


# --- sample --------------------------------------------------------------------------------------------------------------


def test_the_same_pixels_from_a_picture(tiny_folder: Path, loras: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting that matters travels in the file: prompt language, sampler, LoRAs, an input picture, a mask."""
    run(tiny_folder, "sample", "the beach", "--output", "start.png")
    Image.new("L", (16, 16), 255).crop((0, 0, 16, 16)).save("mask.png")
    run(
        *(tiny_folder, "sample", f"({DOG}:1.3) [in the] snow", "--sampler", "euler_a", "--use_karras_sigmas", "False"),
        *("--image", "start.png", "--mask_image", "mask.png", "--strength", "0.7", "--seed", "11", "--clip_skip", "1"),
        *("--lora", str(loras / "dog.safetensors"), "--lora_weight", "0.4"),
        *("--negative_prompt", "blue", "--output", "first.png"),
    )
    files = ["--lora", str(loras / "dog.safetensors"), "--pretrained_model_name_or_path", str(tiny_folder)]  # from elsewhere
    main(["sample", "--from", "first.png", "--output", "again.png", *files])
    assert same("first.png", "again.png") and not same("first.png", "start.png")
    main(["sample", "--from=first.png", "--seed", "12", "--output", "other.png", *files])
    assert not same("first.png", "other.png")
    assert "Clip skip: 2" in read_png_text("other.png")["parameters"]
    capsys.readouterr()
    said = refused(capsys, tiny_folder, "sample", "--from", "first.png", "--output", "first.png")
    assert "--output first.png is the file of --from, too; choose another name" in said
    with pytest.raises(SystemExit) as leave:
        main(["sample", "a dog", "--from"])
    assert leave.value.code == 2 and "--from: expected one argument" in capsys.readouterr().err


def test_seed_minus_one_is_a_new_seed_in_the_picture(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        run(tiny_folder, "sample", "the beach", "--seed", "-1", "--output", name)
    seeds = re.findall(r"^seed (\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(set(seeds)) == 2 and f"Seed: {seeds[0]}," in read_png_text("a.png")["parameters"]
    run(tiny_folder, "sample", "the beach", "--seed", seeds[0], "--output", "again.png")
    assert same("a.png", "again.png") and not same("a.png", "b.png")


@pytest.mark.parametrize("bundled", [False, True], ids=["beside", "bundled"])
def test_the_word_of_a_lora_is_loaded_with_it(
    tiny_folder: Path, loras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bundled: bool
) -> None:
    """It stands in a file beside the LoRA, in the same folder, or in the LoRA's own file."""
    (both := tmp_path / "pivotal").mkdir()
    tensors, vectors = load_file(loras / "dog.safetensors"), torch.randn(1, 24)
    if bundled:
        tensors["bundle_emb.<my-dog>.emb_params"] = vectors
    else:
        save_embedding(both, "<my-dog>", vectors)
    save_file(tensors, both / "pytorch_lora_weights.safetensors")
    prompt = ("sample", "a <my-dog>", "--lora", str(both))
    run(tiny_folder, *prompt, "--output", "a.png")
    assert f"{'bundled' if bundled else 'diffusers'} style, <my-dog>, 1 vector of width 24" in capsys.readouterr().err
    run(tiny_folder, *prompt, "--textual_inversion", str(both), "--output", "b.png")
    assert same("a.png", "b.png")


def test_one_of_several_is_as_if_alone(tiny_folder: Path) -> None:
    run(tiny_folder, "sample", DOG, "--num_images_per_prompt", "2", "--seed", "4", "--output", "p.png")
    run(tiny_folder, "sample", DOG, "--seed", "5", "--output", "alone.png")
    assert same("p-1.png", "alone.png") and not same("p-0.png", "p-1.png")


def test_a_lora_in_the_prompt(tiny_folder: Path, loras: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """<lora:NAME:w> is --lora NAME at w, for that prompt alone; a file's dots may be in NAME."""
    run(tiny_folder, "sample", DOG, "--output", "plain.png")
    for name in ("dog", "chalk.v2"):
        run(tiny_folder, "sample", f"{DOG} <lora:{name}:0.6>", "--lora_dir", str(loras), "--output", "tag.png")
        flags = ["--lora", str(loras / f"{name}.safetensors"), "--lora_weight"]
        run(tiny_folder, "sample", f"{DOG} ", *flags, "0.6", "--output", "flag.png")
        assert same("tag.png", "flag.png") and not same("tag.png", "plain.png")
        run(tiny_folder, "sample", f"{DOG} <lora:{name}:0.6>", *flags, "1", "--output", "wins.png")
        assert same("tag.png", "wins.png")
    said = refused(capsys, tiny_folder, "sample", f"{DOG} <lora:cat:1>", "--lora_dir", str(loras), "--output", "no.png")
    assert "<lora:cat>: no such file" in said and "chalk.v2, dog" in said
    with pytest.raises(SettingsError, match="no such file"):
        in_lora_dir(str(loras), "../loras/dog")  # a prompt does not walk through the disk
    assert lora_names(["a/dog", "b/dog.safetensors", "c.v2"]) == ["dog", "dog-1", "c_v2"]


def test_a_picture_as_a_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    """--ip_adapter, its scale, and the same pixels again from the picture; words look past the pictures' tokens."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    save_file(tiny_ip_adapter(pipe.unet).state_dict(), tmp_path / "ip.safetensors")
    tiny_tower_folder(tmp_path)
    picture(0).save("look.png")
    adapter = ("--ip_adapter", "ip.safetensors", "--ip_adapter_image", "look.png", "look.png")
    run(tiny_folder, "sample", DOG, "--output", "plain.png")
    run(tiny_folder, "sample", DOG, *adapter, "--output", "look-1.png")
    run(tiny_folder, "sample", DOG, *adapter, "--ip_adapter_scale", "0", "--output", "look-0.png")
    assert same("plain.png", "look-0.png") and not same("plain.png", "look-1.png")
    main(["sample", "--from", "look-1.png", "--pretrained_model_name_or_path", str(tiny_folder), "--output", "again.png"])
    assert same("again.png", "look-1.png")
    run(tiny_folder, "attention", DOG, *adapter, "--output", "attention.png")


def test_a_picture_that_is_followed(tiny_folder: Path, tmp_path: Path) -> None:
    """--controlnet, with edges that are given or made; its scale; a tile net sees --image; and the same pixels again."""
    unet = StableDiffusionPipeline.from_pretrained(tiny_folder).unet
    net = ControlNetModel.from_unet(unet, (8, 16)).requires_grad_(False)
    for p in net.parameters():
        p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    write_controlnet(net, tmp_path / "net")
    picture(0).resize((64, 64)).save("photo.png")
    small = Image.open("photo.png").convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
    small.save("small.png")
    Image.fromarray(canny(np.asarray(small))).convert("RGB").save("edges.png")
    follow = ("--controlnet", "net", "--control_image")
    run(tiny_folder, "sample", DOG, "--width", "32", "--height", "32", "--output", "plain.png")
    run(tiny_folder, "sample", DOG, *follow, "edges.png", "--output", "edges-1.png")
    run(tiny_folder, "sample", DOG, *follow, "photo.png", "--hint", "canny", "--width", "32", "--output", "made.png")
    run(tiny_folder, "sample", DOG, *follow, "edges.png", "--controlnet_conditioning_scale", "0", "--output", "edges-0.png")
    assert same("edges-1.png", "made.png") and same("plain.png", "edges-0.png") and not same("plain.png", "made.png")
    main(["sample", "--from", "made.png", "--pretrained_model_name_or_path", str(tiny_folder), "--output", "again.png"])
    assert same("again.png", "made.png")
    run(tiny_folder, "sample", DOG, "--controlnet", "net", "--image", "small.png", "--output", "tile.png")
    run(tiny_folder, "sample", DOG, "--image", "small.png", "--output", "no-tile.png")
    assert not same("tile.png", "no-tile.png")


def test_a_note_where_something_differs(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn again with another torch than it was made with, a picture may differ: stderr says so, and it is drawn."""
    run(tiny_folder, "sample", DOG, "--output", "first.png")
    texts = read_png_text("first.png")
    about = json.loads(texts["minidiff"])
    about["versions"]["torch"] = "1.0"
    save_png(Image.open("first.png"), "older.png", texts | {"minidiff": json.dumps(about)})
    for name, noted in (("first.png", False), ("older.png", True)):
        capsys.readouterr()
        main(["sample", "--from", name, "--output", "again.png", "--pretrained_model_name_or_path", str(tiny_folder)])
        assert ("Note: older.png was made with torch '1.0' (here " in capsys.readouterr().err) == noted
    assert same("first.png", "again.png")


FOREIGN = ["a dog, drawn by minidiff", "a dog\nSteps: 20, Seed: 1, Model: minidiff-merge, Version: v1.9", "minidiff"]


@pytest.mark.parametrize("text", FOREIGN)
def test_a_picture_that_only_names_minidiff_is_left_alone(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    save_png(Image.new("RGB", (8, 8)), "theirs.png", {"parameters": text})
    said = refused(capsys, tiny_folder, "sample", DOG, "--output", "theirs.png")
    assert "theirs.png is there already, and minidiff did not draw it" in said
    os.symlink("nowhere.png", "link.png")
    assert "link.png is there already" in refused(capsys, tiny_folder, "sample", DOG, "--output", "link.png")


def test_what_is_read_is_not_written_over(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though minidiff drew it."""
    run(tiny_folder, "sample", DOG, "--output", "p-0.png")
    for name in ("mask.png", "other.png"):
        run(tiny_folder, "sample", DOG, "--output", name)
    os.symlink("p-0.png", "link.png")
    kept = {path: path.read_bytes() for path in Path().iterdir()}
    inputs = ["--image", "link.png", "--mask_image", "mask.png"]
    for flags, said in (
        (["--output", "p-0.png"], "--output p-0.png is the file of --image, too"),
        (["--output", "p.png", "--num_images_per_prompt", "2"], "--output p-0.png is the file of --image, too"),
        (["--output", "mask.png"], "--output mask.png is the file of --mask_image, too"),
        (["--ip_adapter", "a/b", "--ip_adapter_image", "other.png", "--output", "other.png"], "of --ip_adapter_image"),
    ):
        assert said in refused(capsys, tiny_folder, "sample", DOG, *inputs, *flags)
    sheet = ["sheet", DOG, "--columns", "image=p-0.png,other.png", "--output", "other.png"]
    assert "--output other.png is the file of --image, too" in refused(capsys, tiny_folder, *sheet)
    assert kept == {path: path.read_bytes() for path in Path().iterdir()}


@pytest.mark.parametrize("command", ["sample", "sheet", "morph"])
def test_a_place_that_cannot_be_written_is_told_first(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    Path("file").touch()
    monkeypatch.setattr(drawing, "read_model", lambda *_: pytest.fail("a model was loaded"))
    ending = "webp" if command == "morph" else "png"
    for output in (f"file/a.{ending}", f"new/folder/{'a' * 300}.{ending}"):
        said = refused(capsys, tiny_folder, command, DOG, "--output", output)
        assert "Check path, permissions and free space" in said


# --- sheets, loops, strips -----------------------------------------------------------------------------------------------


def test_a_sheet_over_two_settings(tiny_folder: Path, loras: Path) -> None:
    lora = ["--lora", str(loras / "dog.safetensors")]
    run(tiny_folder, "sheet", DOG, *lora, "--columns", "lora_weight=0,1", "--rows", "sampler=ddim,unipc,heun", "--tile", "32")
    assert "Steps: 3" in read_png_text("outputs/sheet.png")["parameters"]
    run(tiny_folder, "sheet", DOG, *lora, "--columns", "guidance=1,5", "--tile", "32", "--output", "one.png")
    run(tiny_folder, "sheet", DOG, "the snow", "--columns", "seed=0..2", "--tile", "32", "--output", "prompts.png")
    three, one, two = (Image.open(name) for name in ("outputs/sheet.png", "one.png", "prompts.png"))
    assert three.height > one.height and two.width > one.width


def test_a_sheet_can_compare_models(tiny_folder: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.unet.conv_out.weight.zero_()
    pipe.save_pretrained(tmp_path / "other")
    columns = f"pretrained_model_name_or_path={tiny_folder},{tmp_path / 'other'}"
    main(["sheet", DOG, "--columns", columns, "--num_inference_steps", "2", "--tile", "32"])
    sheet = pixels("outputs/sheet.png")
    assert sheet.shape[1] > 64


def test_a_loop(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_folder, "morph", DOG, "the snow", "--frames", "3", "--fps", "10", "--output", "m.webp")
    assert "2 keyframes x 3 frames = 6 frames, there and back: 0.6 s" in capsys.readouterr().err
    run(tiny_folder, "sample", DOG, "--output", "key.png")
    loop = Image.open("m.webp")
    assert loop.n_frames == 6
    assert like("m.webp", "key.png")
    run(tiny_folder, "morph", DOG, "the snow", "--seeds", "5", "--sampler", "euler_a", "--frames", "1", "--output", "n.webp")
    run(tiny_folder, "sample", DOG, "--seed", "5", "--sampler", "euler_a", "--output", "key.png")
    assert like("n.webp", "key.png")  # fresh noise of that seed
    Image.new("RGB", (8, 8)).save("holiday.webp")
    said = refused(capsys, tiny_folder, "morph", DOG, "--output", "holiday.webp")
    assert "is there already" in said
    said = refused(capsys, tiny_folder, "morph", DOG, "--sampler", "euler_a", "--output", "n.gif")
    assert "euler_a draws fresh noise" in said


def test_a_prompt_names_no_folder_above(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    for name in ("..", ".", ""):
        with pytest.raises(SettingsError, match="no such file or folder"):
            in_lora_dir(str(tmp_path / "loras"), name)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_a_loop_is_drawn_over_its_own_file(tiny_folder: Path, ending: str) -> None:
    for prompt in (DOG, "the snow, “neu”"):
        run(tiny_folder, "morph", prompt, "--frames", "1", "--output", f"m.{ending}")
    assert Image.open(f"m.{ending}").n_frames == 3


def test_a_sheet_is_checked_before_its_first_tile(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a later tile cannot be costs no earlier one."""
    monkeypatch.setattr(drawing, "load", lambda *_: pytest.fail("a model was loaded"))
    for flags, said in (
        (["--columns", "steps=2,1001"], "--num_inference_steps must lie in 1 … 1000; it is 1001"),
        (["--columns", "eta=0,2"], "--eta must lie in 0 … 1; it is 2"),
        (["--columns", "eta=0,1", "--rows", "sampler=none,euler"], "only ddim and tcd have one"),
        (["--columns", "sampler=euler,ddim", "--use_karras_sigmas", "True"], "only these samplers take Karras sigmas"),
        (["--columns", "width=16,0"], "--width must lie in 1 … 8192; it is 0"),
        (["--columns", "clip_skip=0,-1"], "--clip_skip must lie in 0 … 100; it is -1"),
        (["--columns", "lora=none,nowhere"], "nowhere: no such file or folder"),
        (["--columns", f"model={tiny_folder},nowhere"], "nowhere: there is no such folder"),
        (["--columns", "seed=0,1", "--num_images_per_prompt", "2"], "num_images_per_prompt does nothing with --columns"),
        (["--columns", ""], '"" is no axis'),
        (["--num_images_per_prompt", "401"], "401 pictures; a sheet holds 400 at most"),
    ):
        with pytest.raises(SystemExit):
            main(["sheet", DOG, "--pretrained_model_name_or_path", str(tiny_folder), *flags])
        assert said in capsys.readouterr().err, flags


def test_a_filmstrip_and_attention(tiny_folder: Path) -> None:
    run(tiny_folder, "filmstrip", DOG, "--count", "3")
    run(tiny_folder, "attention", f"({DOG}:1.1) on the beach")
    for name in ("outputs/filmstrip.png", "outputs/attention.png"):
        assert "Seed: 0" in read_png_text(name)["parameters"]


def test_tokens(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["tokens", f"({DOG}:1.3)", "--pretrained_model_name_or_path", str(tiny_folder), "--trigger", "dog"])
    said = capsys.readouterr().out
    assert "x1.30" in said and '"dog" is one token' in said


# --- bad input -----------------------------------------------------------------------------------------------------------

WRONG = [
    (["sample"], "minidiff sample needs a prompt"),
    (["sample", DOG, "--sampler", "euler-a"], 'sampler "euler-a" is unknown'),
    (["sample", DOG, "--sampler", "eular"], 'Did you mean "euler"?'),
    (["sample", DOG, "--sampler", "ddim", "--use_karras_sigmas", "True"], "only these samplers take Karras sigmas"),
    (["sample", DOG, "--sampler", "euler", "--eta", "0.5"], "only ddim and tcd have one"),
    (["sample", DOG, "--strength", "0.5"], "strength was given and there is no image to work on"),
    (["sample", DOG, "--mask_image", "m.png"], "--mask_image m.png: no such file"),
    (["sample", DOG, "--image", "none.png"], "none.png: no such file"),
    (["sample", DOG, "--image", "none.png", "--strength", "1.5"], "--strength must lie in 0 … 1; it is 1.5"),
    (["sample", DOG, "--ip_adapter", "."], "--ip_adapter and --ip_adapter_image need each other"),
    (["sample", DOG, "--controlnet", "."], "--controlnet and --control_image need each other"),
    (["sample", DOG, "--controlnet", ".", "--image", "dog.png", "--hint", "canny"], "--hint needs --control_image"),
    (["sample", DOG, "--tile_size", "15"], "tile_size is 15"),
    (["sample", DOG, "--clip_skip", "9"], "clip_skip is 9; this text encoder has 2 layers"),
    (["sample", "(" * 9999 + DOG], "the weights around this multiply to inf"),
    (["sample", "--from", "none.png"], "none.png: no such file"),
    (
        ["sample", DOG, "--tokenizer", "words"],
        "--tokenizer words: no such file",
    ),
    (["sample", DOG, "--textual_inversion", ""], "--textual_inversion must name a file or folder"),
    (["attention", "dog " * 401], "401 pictures; a sheet holds 400 at most"),
    (["sheet", DOG, "--columns", "sampler=ddim,eular"], 'Did you mean "euler"?'),
    (["sheet", DOG, "--columns", "guidence=1,2"], "guidance"),
    (["sheet", DOG, "--columns", "seed=0..1000"], "by 399 at most"),
    (["sheet", DOG, "--columns", "seed=0,1", "--rows", "seed=2,3"], "rows and columns are both seed"),
    (["sheet", DOG, "the snow", "--columns", "seed=0,1", "--rows", "eta=0,1"], "three axes"),
    (["morph", DOG, "--seeds", "1"], "a loop needs two prompts or seeds"),
    (["morph", DOG, "--output", "m.mp4"], "m.mp4"),
    (["morph", DOG, "--frames", "100000"], "--frames must lie in 1 … 1000; it is 100000"),
    (["filmstrip", DOG, "--count", "0"], "--count must lie in 1 … 50; it is 0"),
    (["filmstrip", DOG, "--compile"], "a compiled U-Net hides its layers; leave --compile out"),
    (["attention", DOG, "--compile"], "a compiled U-Net hides its layers; leave --compile out"),
    (["tokens"], "minidiff tokens needs a prompt"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=[" ".join(argv)[:60] for argv, _ in WRONG])
def test_wrong_flags(capsys: pytest.CaptureFixture[str], tiny_folder: Path, argv: list[str], message: str) -> None:
    flags = ["--pretrained_model_name_or_path", str(tiny_folder)]
    flags += [] if argv[0] == "tokens" else ["--num_inference_steps", "3"]
    with pytest.raises(SystemExit) as leave:
        main([*argv, *flags])
    said = capsys.readouterr().err
    assert leave.value.code == 2 and message in said and "Traceback" not in said, said
    assert not list(Path().iterdir())


def test_a_note_comes_once(tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture is read to measure a step and to draw, and the prompt is parsed three times."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` has one of its own
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save("two.gif", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run(tiny_folder, "sample", "a red [dog", "--image", "two.gif", "--strength", "0.7")
    said = capsys.readouterr().err
    assert said.count("only the first is used") == said.count("without its closing one") == 1
