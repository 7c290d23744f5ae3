"""What training prints to type next does what it says; --preset; `minidiff watch`."""

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageShow
from test_cli import refused
from tiny_recipes import draw_pictures

from minidiff.cli.main import COMMANDS, found, main
from minidiff.cli.train_commands import command, drawing
from minidiff.cli.words import settings_of
from minidiff.core.train import train as loop
from minidiff.trainer.checkpoint import CONFIG, latest
from minidiff.trainer.run import read_metrics
from minidiff.trainer.settings import (
    POCKET,
    SD15,
    DreamBoothSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
    preset_values,
)

SKS = ["--instance_data_dir", "dog", "--instance_prompt", "a photo of a sks dog"]


def read(words: list[str]) -> Any:
    """The settings that a `train` command line means."""
    name = " ".join(words[:2])
    return settings_of(name, found(COMMANDS[name][0]), words[2:])


@pytest.mark.parametrize("words", [
    ["train", "lora", *SKS, "--lora_targets", "to_q", "to_k", "--no_cache_latents", "--checkpoints_total_limit", "None"],
    ["train", "lora", "--train_data_dir", "my dog's", "--seed", "-5", "--validation_prompt", "a", "b c"],
    ["train", "lora", *SKS, "--preset", "style", "--rank", "4"],
    ["train", "dreambooth", *SKS, "--class_prompt", "a dog", "--prior_from_base", "--learning_rate", "3e-7"],
    ["train", "pivotal", "--train_data_dir=-dog", "--initializer_token", "dog"],
])  # fmt: skip
def test_the_command_of_settings_gives_the_settings(words: list[str]) -> None:
    settings = read(words)
    typed = shlex.split(command(settings))
    again = read(typed[typed.index("train") :])
    assert {**vars(again), "preset": None} == {**vars(settings), "preset": None}


def test_commands_that_draw() -> None:
    home = Path("out")
    other = LoRASettings(pretrained_model_name_or_path="owner/model")
    assert drawing(LoRASettings(), "a dog", home).endswith("minidiff sample 'a dog' --lora out")
    assert drawing(other, "a dog", home).endswith("--pretrained_model_name_or_path owner/model --lora out")
    assert drawing(PivotalSettings(), "a <dog>", home).endswith("'a <dog>' --lora out")
    assert drawing(TextualInversionSettings(), "a", home).endswith("a --textual_inversion out")
    assert drawing(DreamBoothSettings(), "a", home).endswith("a --pretrained_model_name_or_path out")


def test_printed_commands_work(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by Ctrl-C; gone on with what is printed; then longer with what is printed; each checkpoint draws."""
    pictures, out = draw_pictures(tmp_path / "my pictures"), tmp_path / "out"
    few = "--max_train_steps 3 --validation_steps 0 --train_batch_size 2 --resolution 16 --rank 2 --device cpu".split()
    base = ["--pretrained_model_name_or_path", str(tiny_folder), "--output_dir", str(out)]
    prompt = ["--instance_data_dir", str(pictures), "--instance_prompt", "a photo of a (sks) dog"]

    def stopped(*arguments: Any) -> Any:
        for update in loop(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            yield update

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as leave:
        patch.setattr("minidiff.trainer.run.train", stopped)
        main(["train", "lora", *base, *prompt, *few])
    assert leave.value.code == 130 and [row["step"] for row in read_metrics(out)] == [1]
    resume, draw = printed(capsys)
    assert shlex.split(draw)[-4:] == [*base[:2], "--lora", str(out / "checkpoint-1")] and r"\(sks\)" in draw
    main(shlex.split(resume))
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3]
    draw, longer = printed(capsys)
    assert shlex.split(draw)[-1] == str(out)
    main(shlex.split(longer))
    assert latest(out) == out / "checkpoint-6"
    small = ["--num_inference_steps", "1", "--width", "16", "--height", "16", "--output", str(tmp_path / "drawn.png")]
    main([*shlex.split(draw), *small])
    assert Image.open(tmp_path / "drawn.png").size == (16, 16)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The commands on stdout, without the name of the program."""
    return re.findall(r"^  (?:python -m )?minidiff ((?:train|sample) .*)$", capsys.readouterr().out, re.MULTILINE)


# --- presets -----------------------------------------------------------------------------------------------------------


def test_presets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By the size of the base; a flag that is given wins; all of it is printed."""
    settings = read(["train", "lora", *SKS, "--learning-rate", "7e-4", "--preset", "object"])
    assert {name: getattr(settings, name) for name in POCKET["object"]} == POCKET["object"] | {"learning_rate": 7e-4}
    assert read(["train", "lora", *SKS, "--preset", "object", "--rank", "4"]).rank == 4  # the default, given
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"block_out_channels": [320, 640]}')
    assert [preset_values(name, str(tmp_path)) for name in SD15] == list(SD15.values())
    assert "preset" not in settings.identity(3)
    said = refused(capsys, ["train", "lora", *SKS, "--preset", "object", "--rank", "0"])
    assert "--rank must be at least 1" in said
    refused(capsys, ["train", "lora", "--instance_data_dir", "/nowhere", *SKS[2:], "--preset", "style"])
    assert refused_preset(capsys) and all(read(["train", "lora", *SKS, "--preset", name]).check() is None for name in POCKET)


def refused_preset(capsys: pytest.CaptureFixture[str]) -> bool:
    with pytest.raises(SystemExit) as leave:
        main(["train", "lora", *SKS, "--preset", "nonsense"])
    return leave.value.code == 2 and "object" in capsys.readouterr().err


def test_what_a_preset_sets_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "lora", "--train_data_dir", str(tmp_path), "--preset", "style", "--learning_rate", "1e-2"])
    expected = "--preset style: --rank 16 --lora_targets attention feed_forward --max_train_steps 300 --noise_offset 0.1\n"
    assert capsys.readouterr().out.startswith(expected)


# --- watch -------------------------------------------------------------------------------------------------------------


def test_watch_shows_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(ImageShow, "show", lambda image, title: shown.append(f"{title} {image.width}") or True)

    def picture(name: str, side: int) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (side, side)).save(tmp_path / name)
        os.utime(tmp_path / name, ns=(side, side))

    later = iter([lambda: picture("loss.png", 8), lambda: picture("samples/step-000020.png", 9), lambda: None])

    def sleep(seconds: float) -> None:
        if (change := next(later, None)) is None:
            raise KeyboardInterrupt
        change()

    monkeypatch.setattr("time.sleep", sleep)
    picture("samples/step-000003.png", 2), picture("samples/step-000010.png", 3), picture("loss.png", 4)
    (tmp_path / CONFIG).write_text("")
    with pytest.raises(SystemExit) as leave:
        main(["watch", str(tmp_path)])
    assert leave.value.code == 130
    assert shown == ["step-000010.png 3", "loss.png 4", "loss.png 8", "step-000020.png 9"]


def test_watch_needs_a_run_and_a_viewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "holds no run of minidiff train" in refused(capsys, ["watch", str(tmp_path)])
    assert "nowhere does not exist" in refused(capsys, ["watch", str(tmp_path / "nowhere")])
    Image.new("RGB", (2, 2)).save(tmp_path / "loss.png"), (tmp_path / CONFIG).write_text("")
    monkeypatch.setattr(ImageShow, "_viewers", [])
    monkeypatch.setattr("time.sleep", lambda seconds: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path)])
    assert "loss.png (no program here shows pictures: open it yourself)" in capsys.readouterr().out
