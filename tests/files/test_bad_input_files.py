"""Bad input, case by case: adapters and models. Each message says what is wrong, where, and what to do.

The cases are numbered 1 to 25; those about sampling and training are in test_bad_input_training.py.

    case                                        test here        also, from near
    1   an adapter of which nothing matches     case_01          test_lora_files: what_does_not_fit
    2   of which a part matches; strict=False   case_02 (two)    test_lora_files: what_does_not_fit, strict_false
    3   down without up, two ranks              case_03          test_lora_files: what_does_not_fit
    4   peft's tensors without their config     case_04          test_lora_files: a_peft_folder_and_its_file_alone
    5   alpha NaN, 0, negative                  case_05 (two)    test_lora_files: kohyas_alpha, alphas_that_are_no_strength
    6   LoKr, LoHa, OFT, IA3                    case_06          test_lora_files: what_does_not_fit; test_inspect
    7   pickles                                 case_07 (three)  test_pickles; test_convert; test_word_file
    8   cut off, no safetensors, git-LFS        case_08 (two)    test_weights: broken_files; test_cli: broken_weights
    9   another family; other input channels    case_09 (three)  test_weights: single files; test_pipeline: broken_folder
    10  NaN and infinity in a checkpoint        case_10          test_weights: non_finite_tensors, asked_dtype
    11  words: width, number, known, spaces     case_11          test_word_file: files_that_are_refused

A new word may be without <>: any word of one's own will do (test_textual_inversion), so that part of case 11 is no error.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from test_cli import refused
from torch import Tensor

from minidiff.cli.main import main
from minidiff.core.errors import AdapterError
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.weights import read_header, save

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # (16, 24) in the tiny model
KOHYA = f"lora_unet_{TO_K.replace('.', '_')}"
GOOD = {f"unet.{TO_K}.lora_A.weight": (2, 24), f"unet.{TO_K}.lora_B.weight": (16, 2)}
OTHER = "down_blocks.7.attentions.0.transformer_blocks.0.attn2"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
Shapes = dict[str, tuple[int, ...]]


def written(path: Path, shapes: Shapes, tensors: dict[str, Tensor] | None = None) -> Path:
    save({key: torch.ones(shape) for key, shape in shapes.items()} | (tensors or {}), path)
    return path


def sample(model: Path, *more: object) -> list[str]:
    """A command line; the picture goes beside where the tests look for it."""
    return ["sample", "a dog", "--pretrained_model_name_or_path", str(model), "--num_inference_steps", "1", *map(str, more)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pipe(tiny_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_folder)


def changed(tiny_folder: Path, home: Path, name: str, **values: object) -> Path:
    """The tiny model with other values in one of its JSON files; its other files are the old ones."""
    for path in tiny_folder.rglob("*"):
        if path.is_file() and path.relative_to(tiny_folder) != Path(name):
            (link := home / path.relative_to(tiny_folder)).parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    (home / name).write_text(json.dumps(json.loads((tiny_folder / name).read_text()) | values))
    return home


# --- adapters ------------------------------------------------------------------------------------------------------------


def test_case_01_adapter_without_matching_keys(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {f"base_model.model.{OTHER}.to_k.lora_A.weight": (2, 1024), f"base_model.model.{OTHER}.to_k.lora_B.weight": (9, 2)}
    path = written(tmp_path / "sd2.safetensors", shapes)
    said = refused(capsys, sample(tiny_folder, "--lora", path))
    assert f"{path} is a LoRA in the peft style for SD 2.x (cross-attention width 1024); this model needs one for an" in said
    assert not (tmp_path / "picture.png").exists()


def test_case_02_adapter_that_matches_in_part(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = {f"unet.{OTHER}.{name}.lora_{x}.weight": (2, 2) for name in ("to_k", "to_q", "to_v") for x in "AB"}
    path = written(tmp_path / "half.safetensors", GOOD | half)
    said = refused(capsys, sample(tiny_folder, "--lora", path))
    assert f"{path}: 2 of 8 tensors match" in said and "6 without a layer: " in said
    assert all(key in said for key in sorted(half)[:5])


def test_case_02_strict_false_goes_on_with_the_part_that_matches(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    stranger = {f"unet.{OTHER}.to_q.lora_{x}.weight": (2, 2) for x in "AB"}
    path = written(tmp_path / "half.safetensors", GOOD | stranger)
    with pytest.raises(AdapterError, match="2 of 4 tensors match"):
        pipe.load_lora_weights(path)
    loaded = pipe.load_lora_weights(path, strict=False)
    assert list(loaded.modules) == [f"unet.{TO_K}"] and "2 tensors that match nothing were left out" in str(loaded)
    pipe.set_adapters("default", [0.5])
    with pytest.raises(AdapterError, match="0 of 2 tensors match"):
        pipe.load_lora_weights(written(tmp_path / "none.safetensors", stranger), "other", strict=False)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({f"unet.{TO_K}.lora_A.weight": (2, 24)}, "lora_A.weight (2, 24) and not the other half: the file is incomplete. Get"),
        (GOOD | {f"unet.{TO_K}.lora_B.weight": (16, 3)}, "not fit each other: down is (2, 24), up is (16, 3). The file is"),
    ],
)
def test_case_03_half_a_pair_or_two_ranks(
    shapes: Shapes, says: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.safetensors", shapes)
    said = refused(capsys, sample(tiny_folder, "--lora", path))
    assert f"{path}: unet.{TO_K}" in said and says in said


def test_case_04_peft_tensors_without_config(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {f"base_model.model.{key.removeprefix('unet.')}": shape for key, shape in GOOD.items()}
    path = written(tmp_path / "adapter_model.safetensors", shapes)
    for command in (sample(tiny_folder, "--lora", path), ["convert", str(path), str(tmp_path / "new.safetensors")]):
        said = refused(capsys, command)
        assert f"{path}: alpha is unknown, because adapter_config.json is not beside it. Name the whole folder" in said
        assert "minidiff convert --alpha" in said
    main(["convert", str(path), str(tmp_path / "new.safetensors"), "--alpha", "4"])
    assert "alpha/r 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("alpha", "says"),
    [(math.nan, f"{KOHYA}.alpha has NaN"), (-1.0, f"alpha of unet.{TO_K} is -1.0; it must be a positive number")],
)
def test_case_05_alpha_that_is_no_strength(
    alpha: float, says: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_alpha(tmp_path, alpha)
    assert f"{path}: {says}" in refused(capsys, sample(tiny_folder, "--lora", path))


def test_case_05_alpha_zero_stands_for_the_rank_with_a_notice(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    loaded = pipe.load_lora_weights(with_alpha(tmp_path, 0.0))
    assert "alpha is 0 in 1 layers, which stands for the rank" in str(loaded)
    assert loaded.scales == {f"unet.{TO_K}": 1.0}


def with_alpha(folder: Path, alpha: float) -> Path:
    shapes = {f"{KOHYA}.lora_down.weight": (2, 24), f"{KOHYA}.lora_up.weight": (16, 2)}
    return written(folder / "x.safetensors", shapes, {f"{KOHYA}.alpha": torch.tensor(alpha)})


@pytest.mark.parametrize(
    ("key", "kind"), [("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"), ("oft_blocks", "OFT"), ("on_input", "IA3")]
)
def test_case_06_other_kinds_of_adapter(
    key: str, kind: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.safetensors", {f"{KOHYA}.{key}": (2, 2)})
    said = refused(capsys, sample(tiny_folder, "--lora", path))
    assert f"{path}: unsupported adapter type {kind}; minidiff reads LoRA, LoCon and DoRA" in said
    assert "minidiff merge extract" in said


# --- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--lora", "--textual_inversion"])
def test_case_07_pickles_are_not_opened(
    ending: str,
    flag: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save({"a": torch.zeros(2)}, path := tmp_path / f"model{ending}")
    monkeypatch.delattr(torch, "load")
    said = refused(capsys, sample(tiny_folder, flag, path))
    assert f"{path} is a PyTorch pickle (zip), which can run code when opened" in said
    assert " NEW.safetensors" in said and "make it: minidiff convert " in said


def test_case_07_a_part_of_a_model_as_a_pickle(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = changed(tiny_folder, tmp_path / "model", "unet/config.json")
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")
    said = refused(capsys, sample(model))
    unet = model / "unet"
    assert f"{unet} has its weights only as a pickle (diffusion_pytorch_model.bin)" in said
    assert f"minidiff convert {unet}/diffusion_pytorch_model.bin {unet}/model.safetensors --to safetensors" in said


def test_case_07_training_from_a_single_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({}, path := tmp_path / "model.ckpt")
    (tmp_path / "x").mkdir()
    data = ["--instance_data_dir", "x", "--instance_prompt", "a sks dog", "--output_dir", str(tmp_path / "out")]
    said = refused(capsys, ["train", "lora", "--pretrained_model_name_or_path", str(path), *data])
    assert f"{path} is a file, not a model folder; `minidiff convert {path} FOLDER --tokenizer …` makes one" in said


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--lora", "--textual_inversion"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LFS, "is a git-LFS pointer, not the file itself; run `git lfs pull` in its folder"),
        (b"hello, this is no model at all", "is not a safetensors file (no header where one should be). Is it the right one?"),
        (b"\x10\0\0\0\0\0\0\0{", "is damaged or cut off ("),
        (b"", "is empty (0 bytes): an unfinished download? Get it again"),
    ],
    ids=["LFS", "text", "cut", "empty"],
)
def test_case_08_damaged_files(
    flag: str, content: bytes, says: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path := tmp_path / "x.safetensors").write_bytes(content)
    assert f"{path} {says}" in refused(capsys, sample(tiny_folder, flag, path))


def test_case_08_a_pipe_in_a_files_place(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(path := tmp_path / "pipe.safetensors")
    for flag in ("--lora", "--textual_inversion"):
        assert f"{path} is no ordinary file" in refused(capsys, sample(tiny_folder, flag, path))


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_case_08_a_pipe_in_a_tables_place(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(tiny_folder, tmp_path / "model", name) / name
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is no ordinary file" in refused(capsys, sample(tmp_path / "model"))


UNET, TEXT = "model.diffusion_model.input_blocks", "cond_stage_model.transformer.text_model.final_layer_norm.bias"
ATTENTION = f"{UNET}.1.1.transformer_blocks.0.attn2.to_k.weight"
VAE, OPENCLIP = "first_stage_model.quant_conv.bias", "cond_stage_model.model.ln_final.bias"
SD15: Shapes = {f"{UNET}.0.0.weight": (320, 4, 3, 3), ATTENTION: (320, 768), VAE: (8,), TEXT: (768,)}


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (SD15 | {OPENCLIP: (1,)}, "an SD 2.x single file in the LDM layout"),
        (SD15 | {OPENCLIP: (1,), f"{UNET}.0.0.weight": (320, 5, 3, 3)}, "an SD 2.x depth single file"),
        (SD15 | {"conditioner.embedders.0.x": (1,)}, "an SDXL single file"),
        (SD15 | {f"{UNET}.0.0.weight": (320, 9, 3, 3)}, "an SD 1.x inpainting single file"),
        (SD15 | {f"{UNET}.0.0.weight": (320, 8, 3, 3)}, "an SD 1.x InstructPix2Pix single file"),
        (SD15 | {f"{UNET}.0.0.weight": (320, 5, 3, 3)}, "an SD 1.x depth single file"),
        ({f"{KOHYA}.lora_down.weight": (2, 24)}, "a LoRA in the kohya style"),
    ],
)
def test_case_09_single_files_of_another_kind(
    shapes: Shapes, says: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.safetensors", shapes)
    said = refused(capsys, sample(path, "--tokenizer", tiny_folder / "tokenizer"))
    assert f"{path} " in said and f"looks like {says}" in said


@pytest.mark.parametrize(("channels", "what"), [(8, "an image-editing model"), (5, "a depth model")])
def test_case_09_folders_with_other_input_channels(
    channels: int, what: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, name = changed(tiny_folder, tmp_path / "model", "unet/config.json", in_channels=channels), "diffusion_pytorch_model"
    tensors = read_header(tiny_folder / "unet" / f"{name}.safetensors").read()
    save(tensors | {"conv_in.weight": torch.ones(16, channels, 3, 3)}, model / "unet" / f"{name}.safetensors")
    assert f"{model}: the U-Net has {channels} input channels ({what}" in refused(capsys, sample(model))


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type is 'text_proj'; minidiff builds"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "minidiff reads Stable Diffusion 1.x"),
    ],
)
def test_case_09_folders_of_another_family(
    name: str, values: dict[str, object], says: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, sample(changed(tiny_folder, tmp_path / "model", name, **values)))
    assert str(tmp_path / "model" / name) in said and says in said


def test_case_10_nan_in_a_checkpoint(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = changed(tiny_folder, tmp_path / "model", "vae/config.json")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    save(read_header(path).read() | {"quant_conv.bias": torch.full((8,), math.nan)}, path)
    said = refused(capsys, sample(model))
    assert f"{path}: quant_conv.bias has NaN or infinite values (as torch.float32). Get the file again" in said


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"<x>": (1, 1024)}, "its vectors are 1024 wide, as in SD 2.x; this text encoder is 24 wide"),
        ({"<x>": (1, 24), "<y>": (1, 24)}, " holds 2 words, where one is wanted"),
        ({"<x>": (1, 24), "<y>": (1, 24)}, "  2 words: <x>, <y>\nminidiff convert --token makes a file of one"),
        ({"dog": (1, 24)}, '"dog" is in the model\'s vocabulary already'),
        ({"my dog": (1, 24)}, '"my dog" has a space in it; a new word is one word. Take a word of your own, such as <my-dog>'),
    ],
)
def test_case_11_words_in_files(
    shapes: Shapes, says: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.safetensors", shapes)
    said = refused(capsys, sample(tiny_folder, "--textual_inversion", path))
    assert str(path) in said and says in said
