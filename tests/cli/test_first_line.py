"""The first line of a command; and what is told before anything heavy happens."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minidiff.cli import draw_commands, first_line
from minidiff.cli.main import main
from minidiff.trainer.run import Report

STEPS = ["--num_inference_steps", "3"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("took", "least", "seen"), [([0.5, 0.2, 0.1], 0.1, 3), ([2.0, 1.5, 1.0], 1.5, 2), ([21.0, 1.0], 21.0, 1), ([0.3], 0.3, 1)]
)
def test_the_measure_ends_soon(took: list[float], least: float, seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(first_line, "perf_counter", lambda: now[0])

    def run(mark: Any) -> None:
        for i, seconds in enumerate(took):
            now[0] += seconds
            mark(i)

    seconds, last = first_line.measured(run)
    assert seconds == pytest.approx(least) and last == seen - 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (75, "75 s"), (100, "2 minutes"), (5000, "83 minutes"), (9000, "2 hours")]
)
def test_durations(seconds: float, text: str) -> None:
    assert first_line.duration(seconds) == text


@pytest.mark.parametrize(
    ("flags", "work", "calls"),
    [
        ([], "3 steps of ddim, about", 3),
        (["--sampler", "heun", "--num_images_per_prompt", "2"], "5 steps of heun, 2 pictures, about", 10),
        (["--image", "a.png", "--strength", "0.4"], "1 of 3 steps of ddim (--strength), about", 1),
    ],
)
def test_a_drawing_says_what_it_will_do(
    flags: list[str],
    work: str,
    calls: int,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (16, 16), "red").save("a.png")
    asked: list[float] = []
    measured = first_line.measured
    monkeypatch.setattr(first_line, "measured", lambda run: (100.0, measured(run)[1]))
    monkeypatch.setattr(first_line, "duration", lambda seconds: asked.append(seconds) or "long")
    main(["sample", "a dog", "--pretrained_model_name_or_path", str(tiny_folder), *STEPS, *flags])
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"{tiny_folder}, a small teaching model: 16 x 16 pixels, cpu, float32, {work}") and asked == [
        100 * calls
    ]


def test_a_sheet_counts_its_pictures_once(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = ["--columns", "seed=0..2", "--rows", "plain=true,false", "--tile", "16"]
    main(["sheet", "a dog", "--pretrained_model_name_or_path", str(tiny_folder), *STEPS, *axes])
    said = capsys.readouterr().err
    assert said.count("6 pictures, about") == said.count("teaching model") == 1


def test_training_says_pictures_updates_and_epochs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from test_cli import POCKET

    monkeypatch.setattr("minidiff.trainer.run.fit", lambda task, settings: Report(done=10, finished=True))
    flags = [
        "--pretrained_model_name_or_path",
        str(POCKET),
        "--instance_data_dir",
        "lessons/data/dog",
        "--validation_steps",
        "0",
    ]
    more = ["--instance_prompt", "a sks dog", "--max_train_steps", "10", "--gradient_accumulation_steps", "2"]
    main(["train", "lora", *flags, *more, "--train_batch_size", "1"])
    line = next(line for line in capsys.readouterr().err.splitlines() if "teaching model" in line)
    assert "128 x 128 pixels, cpu, float32, 5 pictures, 10 updates of 2 = 4 epochs, about" in line


# --- before anything heavy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sampler", "ddimm"], 'Did you mean "ddim"'),
        (["--lora", "outputs/dgo"], 'outputs/dgo: no such file or folder. Did you mean "dog"?'),
        (["--pretrained_model_name_or_path", "outputs/dog"], "give it with --lora outputs/dog"),
        (["--pretrained_model_name_or_path", "outputs/dgo"], 'Did you mean "dog"'),
        (["--image", "no.png"], "no.png: no such file"),
        (["--output", "no.jpg"], "give a name that ends in"),
    ],
)
def test_cheap_checks_come_before_the_model(
    flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("outputs/dog").mkdir(parents=True)
    Path("outputs/dog/pytorch_lora_weights.safetensors").touch()
    monkeypatch.setattr(draw_commands, "read_model", lambda *_, **__: pytest.fail("a model was read"))
    for command in ("sample", "sheet", "morph", "filmstrip"):
        with pytest.raises(SystemExit) as leave:
            main([command, "a dog", *flags])
        assert leave.value.code == 2 and says in capsys.readouterr().err, command


def test_a_lora_of_a_prompt_is_looked_for_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(draw_commands, "read_model", lambda *_, **__: pytest.fail("a model was read"))
    with pytest.raises(SystemExit):
        main(["sample", "a dog <lora:no:1>"])
    assert "<lora:no>: no such file" in capsys.readouterr().err


def test_a_model_given_as_a_lora(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "a dog", "--lora", str(tiny_folder)])
    assert "is a whole model; give it as --pretrained_model_name_or_path" in capsys.readouterr().err


def test_a_mistyped_folder_of_pictures_needs_no_torch() -> None:
    Path("photos").mkdir()
    command = ["train", "lora", "--instance_data_dir", "photo", "--instance_prompt", "a dog"]
    code = f"import sys; from minidiff.cli.main import main\ntry: main({command})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n" and 'Did you mean "photos"?' in done.stderr
