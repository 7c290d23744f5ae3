"""The command line as a person meets it: help, one real run of each command, and one clear message for each wrong input."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.cli.main import COMMANDS, found, main
from minidiff.core.textual_inversion import initial_vectors
from minidiff.draw.images import read_png_text
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.weights import save
from minidiff.files.word_file import save_embedding
from minidiff.trainer.run import Report
from minidiff.trainer.settings import LoRASettings

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three small pictures, as a user's own folder."""
    folder = tmp_path / "dog"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def train(model: Path, pictures: Path, out: Path, *more: str) -> None:
    main(
        ["train", "lora", "--pretrained_model_name_or_path", str(model), "--instance-data-dir", str(pictures)]
        + ["--instance_prompt", "a photo of a sks dog", "--output_dir", str(out), "--max_train_steps", "2"]
        + ["--validation_steps", "0", "--rank", "2", *more]
    )


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run the command; it must leave with code 2 and one message on stderr, without a traceback."""
    with pytest.raises(SystemExit) as leave:
        main(argv)
    said = capsys.readouterr().err
    assert leave.value.code == 2, said
    assert "Traceback" not in said
    return said


# --- what works ----------------------------------------------------------------------------------------------------------


def test_sample_writes_a_picture_that_says_how_it_was_made(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "dog.png"
    main(
        ["sample", "a red dog", "--pretrained_model_name_or_path", str(tiny_folder), "--num-inference-steps", "2"]
        + ["--output", str(out), "--seed", "7"]
    )
    assert Image.open(out).size == (16, 16)
    assert read_png_text(out)["parameters"].startswith("a red dog\nSteps: 2, Sampler: DDIM")


def test_train_then_sheet(tiny_folder: Path, pictures: Path, tmp_path: Path) -> None:
    train(tiny_folder, pictures, tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    sheet = tmp_path / "sheet.png"
    main(
        ["sheet", "a dog", "a cat", "--lora", str(tmp_path / "out"), "--num_inference_steps", "1"]
        + ["--pretrained_model_name_or_path", str(tiny_folder), "--output", str(sheet)]
    )
    assert min(Image.open(sheet).size) > 500  # two by two


def test_settings_come_from_toml_and_flags_win(tiny_folder: Path, pictures: Path, tmp_path: Path) -> None:
    train(tiny_folder, pictures, tmp_path / "first")
    config = tmp_path / "first" / "train_config.toml"
    flags = ["--instance_data_dir", str(pictures), "--output_dir", str(tmp_path / "second"), "--rank", "3"]
    main(["train", "lora", "--config", str(config), *flags])
    assert "rank = 3" in (tmp_path / "second" / "train_config.toml").read_text()


def test_help_and_version_need_no_torch() -> None:
    code = "import sys; from minidiff.cli.main import main; main(['--help']); main(['--version'])"
    code += "; assert 'torch' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "minidiff train lora" in said and "minidiff 0." in said


@pytest.mark.parametrize("words", [["merge", "--help"], ["train", "-h"]])
def test_help_of_a_group_of_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    listed = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line.startswith(f"  minidiff {words[0]} ")]
    assert listed == [["minidiff", *name.split()] for name in COMMANDS if name.startswith(f"{words[0]} ")] + [
        ["minidiff", words[0], "COMMAND"]
    ]


# --- wrong flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sampel", "a dog"], 'Did you mean "sample"'),
        (["train"], '"train" is no command. minidiff train --help'),
        (["train", "lroa"], 'Did you mean "train lora"'),
        (["train", "lora", "--rnk", "4"], "--rank"),
        (["train", "lora", "--rank", "four"], "four"),
        (["sample", "a dog", "--seed", "9" * 5000], f"it is '{'9' * 59}."),
        (["train", "lora"], "--instance_data_dir"),
        (["train", "lora", "--instance_data_dir", "x"], "--instance_prompt"),
        (["train", "lora", "--config"], "expected one argument"),
        (["train", "lora", "--config", "nowhere.toml"], "nowhere.toml"),
        (["sheet"], "must be one or more, as in"),
        (["sample"], "needs a prompt, before its flags"),
        (["lesson", "99"], "there is no lesson 99"),
        (["sample", "a dog", "--pretrained_model_name_or_path", "nowhere/at-all"], "no such folder"),
        (
            ["sample", "a dog", "--pretrained_model_name_or_path", "runwayml/stable-diffusion-v1-5"],
            "stable-diffusion-v1-5/",
        ),
        (["sample", "a dog", "--pretrained_model_name_or_path", "model.safetensors"], "model.safetensors does not exist"),
        (["pretrain", "--stages", "vea"], "vea"),
        (["pretrain", "--stages"], "--stages names none"),
        (["pretrain", "--pictures", "0"], "--pictures must lie in 1 … 10000000; it is 0"),
        (["pretrain", "--unet_steps", "-1"], "--unet_steps must lie in 1 … 10000000; it is -1"),
        (["judge", "--count", "0"], "--count must lie in 1 … 512; it is 0"),
        (["judge", "--count", "513"], "1 … 512"),
        (["sample", "a \udcff dog"], "not UTF-8"),
        (["sheet", "a dog", "--num_images_per_prompt", "0"], "--num_images_per_prompt must lie in 1 … 1000; it is 0"),
        (["sample", "a dog", "--output", "dog.jpg"], "ends in .png"),
        (["sample", "a dog", "--output", ""], "--output must name a file"),
        (["sheet", "a dog", "--output", "/tmp"], "ends in .png"),
        (["train", "lora", "--output_dir", ""], "--output_dir must name a folder"),
    ],
)
def test_wrong_command_lines(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, argv)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_inference_steps", "0"], "--num_inference_steps must lie in 1 … 1000; it is 0"),
        (["--num_inference_steps", "1001"], "1 … 1000"),
        (["--width", "33"], "multiple of 2"),
        (["--height", "-8"], "--height must lie in 1 … 8192"),
        (["--sampler", "eulera"], 'Did you mean "euler_a"'),
        (["--num_images_per_prompt", "0"], "num_images_per_prompt must lie in 1 … 1000; it is 0"),
        (["--guidance_scale", "nan"], "--guidance_scale must be a finite number; it is nan"),
        (["--device", "cuda:9"], "no GPU"),
        (["--device", "gpu"], "--device gpu"),
        (["--device", "meta"], "--device meta"),
        (["--width", "10000000"], "--width must lie in 1 … 8192"),
        (["--num_images_per_prompt", "1000000000"], "1 … 1000"),
        (["--lora", "x", "--lora_weight", "nan"], "finite"),
        (["--lora", "nowhere"], "nowhere"),
        (["--lora_weight", "1", "2"], "2 numbers for 0 LoRAs"),
    ],
)
def test_wrong_sampling(flags: list[str], says: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if flags == ["--device", "cuda:9"] and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert says in refused(capsys, ["sample", "a dog", "--pretrained_model_name_or_path", str(tiny_folder), *flags])


# --- wrong models --------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def not_a_number(path: Path) -> None:
    """The last two bytes of the data become those of a NaN in fp32."""
    data = bytearray(path.read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(data)


BROKEN_WEIGHTS: list[tuple[Callable[[Path], object], str]] = [
    (cut, "cut off"),
    (pickle, "pickle"),
    (lfs, "git-LFS"),
    (not_a_number, "NaN"),
    (lambda p: p.write_bytes(b""), "empty"),
    (lambda p: p.write_bytes(b"hello, this is no model at all"), "not a safetensors file"),
    (lambda p: p.unlink(), "unet has no .safetensors file. Is it the right folder?"),
    (lambda p: shutil.copy(p.parent.parent / "vae" / p.name, p), "does not fit UNet2DConditionModel"),
]


@pytest.mark.parametrize(("breaks", "says"), BROKEN_WEIGHTS)
def test_broken_weights(breaks: Callable[[Path], object], says: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breaks(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert says in refused(capsys, ["sample", "a dog", "--pretrained_model_name_or_path", str(model)])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("unet/config.json", {"cross_attention_dim": 1024}, "1024"),
        ("unet/config.json", {"block_out_channels": [16]}, "1 levels of 1 layers, with widths (16,)"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
        ("scheduler/scheduler_config.json", {"beta_start": -1}, "beta_start is -1"),
        ("scheduler/scheduler_config.json", {"beta_end": 2}, "beta_end 2"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "zigzag"}, "zigzag"),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": "no"}, "set_alpha_to_one is 'no'"),
        ("unet/config.json", {"sample_size": "64"}, "sample_size is '64'"),
        ("unet/config.json", {"sample_size": [8, 8]}, "sample_size is [8, 8]"),
        ("unet/config.json", {"in_channels": -4}, "in_channels is -4"),
        ("unet/config.json", {"block_out_channels": [16, -32]}, "block_out_channels is [16, -32]"),
        ("unet/config.json", {"block_out_channels": [[16], [32]]}, "block_out_channels is [[16], [32]]"),
        ("unet/config.json", {"layers_per_block": 10**4}, "10000 layers"),
        ("unet/config.json", {"attention_head_dim": -2}, "attention_head_dim is -2"),
        ("unet/config.json", {"attention_head_dim": [2, 4, 4]}, "(2, 4, 4) heads"),
        ("unet/config.json", {"attention_head_dim": [2, 5]}, "(2, 5) heads"),
        ("unet/config.json", {"transformer_layers_per_block": [[1], [2]]}, "transformer_layers_per_block is [[1], [2]]"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type text_time needs"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
        ("unet/config.json", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ("unet/config.json", {"norm_eps": None}, "norm_eps is None"),
        ("unet/config.json", {"norm_num_groups": True}, "norm_num_groups is True"),
        ("unet/config.json", {"num_class_embeds": 3}, "num_class_embeds"),
        ("vae/config.json", {"block_out_channels": []}, "0 levels"),
        ("vae/config.json", {"block_out_channels": [8] * 70}, "70 levels"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
    ],
)
def test_other_kinds_of_model(
    name: str, change: dict[str, object], says: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert says in refused(capsys, ["sample", "a dog", "--pretrained_model_name_or_path", str(model)])


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/vocab.json"])
def test_json_without_end(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / name).write_text("[" * 100_000)
    assert Path(name).name in refused(capsys, ["sample", "a dog", "--pretrained_model_name_or_path", str(model)])


def test_messages_cannot_write_over_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save({"lora_unet_\x1b[2J.lora_down.weight": torch.ones(2, 2)}, path := tmp_path / "x.safetensors")
    for command in (["convert", str(path), str(tmp_path / "new.safetensors")], ["inspect", str(tmp_path / "\x1b[2J")]):
        said = refused(capsys, command)
        assert r"\x1b[2J" in said and said.replace("\n", "").isprintable()


# --- what is there stays there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "name"), [([], "a.png"), (["--num_images_per_prompt", "2"], "a-1.png")])
def test_only_its_own_pictures_are_drawn_over(
    flags: list[str], name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "a dog", "--pretrained_model_name_or_path", str(tiny_folder), "--num_inference_steps", "1", *flags]
    command += ["--output", str(tmp_path / "a.png")]
    for foreign in (b"not a picture at all", tiny_png()):
        (tmp_path / name).write_bytes(foreign)
        assert "choose another name" in refused(capsys, command)
        assert (tmp_path / name).read_bytes() == foreign
    (tmp_path / name).unlink()
    main(command)
    main(command)


def tiny_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_reader_that_leaves_is_no_error_of_ours() -> None:
    """`minidiff --help | head -1`: no traceback, and the exit code of a closed pipe."""
    code = "from minidiff.cli.main import main; main(['--help'])"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_on_a_terminal_that_knows_ascii_alone() -> None:
    code = "from minidiff.cli.main import main; main(['sample', '--help'])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--num_inference_steps N" in done.stdout, done.stderr


# --- wrong data and folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rank", "0"], "rank"),
        (["--rank", "999"], "rank 999"),
        (["--lora_alpha", "-1"], "lora_alpha"),
        (["--lora_targets", "to_out"], "to_out.0"),
        (["--learning_rate", "0"], "learning_rate"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps"),
        (["--resolution", "30"], "multiple of 4"),
        (["--mixed_precision", "fp16"], "needs a GPU"),
        (["--proportion_empty_prompts", "2"], "proportion_empty_prompts"),
    ],
)
def test_wrong_training(
    more: list[str], says: str, tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leave:
        train(tiny_folder, pictures, tmp_path / "out", *more)
    assert leave.value.code == 2 and says in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def broken_picture(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])


def no_pictures(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def tiny_picture(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder / "1.png")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(broken_picture, "1.png"), (no_pictures, "no pictures"), (tiny_picture, "4 pixels"), (shutil.rmtree, "dog")],
)
def test_wrong_pictures(
    spoil: Callable[[Path], None],
    says: str,
    tiny_folder: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(pictures)
    with pytest.raises(SystemExit) as leave:
        train(tiny_folder, pictures, tmp_path / "out")
    assert leave.value.code == 2 and says in capsys.readouterr().err


def test_a_run_is_not_overwritten(
    tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_folder, pictures, tmp_path / "out")
    before = (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes()
    with pytest.raises(SystemExit) as leave:
        train(tiny_folder, pictures, tmp_path / "out", "--learning_rate", "1")
    assert leave.value.code == 2 and "--resume_from_checkpoint" in capsys.readouterr().err
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_a_stopped_training_does_not_pass_for_a_finished_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.trainer.recipes.RECIPES", {LoRASettings: lambda settings: SimpleNamespace(prompt="")})
    monkeypatch.setattr("minidiff.trainer.memory.budgeted", lambda task, settings: nullcontext())
    monkeypatch.setattr("minidiff.cli.first_line.of_training", lambda task, settings: None)
    monkeypatch.setattr("minidiff.trainer.run.fit", lambda task, settings: Report(done=1, finished=False))
    with pytest.raises(SystemExit) as leave:
        main(["train", "lora", "--instance_data_dir", "lessons/data/dog", "--instance_prompt", "a sks dog"])
    assert leave.value.code == 130


def test_a_new_word_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sheet before and after a textual inversion, which starts as a word that the model knows."""
    pipe = StableDiffusionPipeline.from_pretrained(POCKET)
    vectors = initial_vectors(pipe.tokenizer, pipe.text_encoder, "dog", 1)
    save_embedding(tmp_path / "word", "<my-dog>", vectors)
    flags = ["--textual_inversion", str(tmp_path / "word"), "--num_inference_steps", "1", "--guidance_scale", "1"]
    for command, prompt in (("sheet", "a red <my-dog>"), ("sample", "a red <my-dog>")):
        picture = tmp_path / f"{command}.png"
        base = ["--pretrained_model_name_or_path", str(POCKET), "--output", str(picture)]
        main([command, prompt, *base, *flags])
        assert "<my-dog>, 1 vector" in capsys.readouterr().err
        assert "a red <my-dog>" in read_png_text(picture)["parameters"]
    with pytest.raises(SystemExit) as leave:
        main(["sample", "a dog", "--textual_inversion", str(tmp_path / "none"), "--output", str(tmp_path / "no.png")])
    assert leave.value.code == 2 and not (tmp_path / "no.png").exists()


def test_a_foreign_folder_is_left_alone(
    tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leave:
        train(tiny_folder, pictures, pictures)  # the pictures themselves, given as the output folder by mistake
    assert leave.value.code == 2 and "dog" in capsys.readouterr().err
    assert len(list(pictures.iterdir())) == 3


def test_the_nearest_command_may_be_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["trian"])
    assert leave.value.code == 2 and 'Did you mean "train"?' in capsys.readouterr().err


def test_help_names_every_command_and_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    said = capsys.readouterr().out
    for name, (_, _, about) in COMMANDS.items():
        assert f"  minidiff {name:<23} {about}" in said.splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_function_for_its_flags(name: str) -> None:
    asked = next(iter(get_type_hints(found(COMMANDS[name][1])).values()))
    assert issubclass(found(COMMANDS[name][0]), asked)


def test_help_is_quick_to_import() -> None:
    """No bound on the time: what costs the time is what is imported."""
    slow = {"torch", "transformers", "numpy", "PIL", "dataclasses", "inspect"}
    code = f"import sys; from minidiff.cli.main import main; main(['--help']); print('IMPORTED', *{slow} & set(sys.modules))"
    began = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.rstrip().endswith("IMPORTED"), f"{said} after {time.perf_counter() - began:.2f} s"
