"""The recipes as Python functions: what they give, what they write, and how they speak."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.core.errors import DataError, SettingsError
from minidiff.files.lora_file import LoRAFile
from minidiff.files.word_file import Embedding


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (90 * number, 50, 30)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def usual(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": tiny_folder, "output_dir": tmp_path / "out", "max_train_steps": 2, "validation_steps": 0, "device": "cpu"}


PROMPT = "a photo of a sks dog"


def test_a_lora_comes_back_and_is_written(pictures: Path, usual: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    adapter = minidiff.train_lora(pictures, PROMPT, rank=2, lora_targets=["to_q", "to_v"], **usual)
    assert isinstance(adapter, LoRAFile) and set(adapter.ranks.values()) == {2}
    assert adapter.path == usual["output_dir"] / "pytorch_lora_weights.safetensors" and adapter.path.is_file()
    assert capsys.readouterr() == ("", "")  # quiet
    pipe: Any = StableDiffusionPipeline.from_pretrained(usual["model"])
    pipe.load_lora_weights(adapter)
    assert pipe.get_active_adapters() == ["default"]


def test_the_log_has_what_a_command_prints(pictures: Path, usual: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    (pictures / "nothing.txt").write_text("for no picture")
    with caplog.at_level(logging.INFO, "minidiff"):
        minidiff.train_lora(pictures, PROMPT, **usual)
    assert "trainable params: " in caplog.text and f"{pictures}: not used: nothing.txt" in caplog.text


def test_the_other_recipes(pictures: Path, usual: dict[str, Any]) -> None:
    home, new = usual.pop("output_dir"), {"placeholder_token": "<x>", "initializer_token": "dog"}
    word = minidiff.train_textual_inversion(pictures, **new, output_dir=home / "1", **usual)
    assert isinstance(word, Embedding) and word.word == "<x>"
    both = minidiff.train_pivotal(pictures, **new, output_dir=home / "2", **usual)
    assert [type(one) for one in both] == [Embedding, LoRAFile]
    pipe: Any = StableDiffusionPipeline.from_pretrained(usual["model"])
    pipe.load_textual_inversion(both[0])
    assert "<x>" in pipe.placeholders
    prior: dict[str, Any] = {"class_prompt": "a photo of a dog", "prior_from_base": True}
    for train, more in ((minidiff.train_dreambooth, prior), (minidiff.train_full, {})):
        trained = train(pictures, PROMPT, output_dir=home / train.__name__, **more, **usual)
        assert isinstance(trained, StableDiffusionPipeline) and (home / train.__name__ / "model_index.json").is_file()


def test_pictures_with_captions_need_no_prompt(pictures: Path, usual: dict[str, Any]) -> None:
    rows = [json.dumps({"file_name": f"{number}.png", "text": "a red dog"}) for number in range(2)]
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    assert minidiff.train_lora(pictures, **usual).modules


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no pictures": ({"prompt": PROMPT}, SettingsError, "Give the pictures: one of pictures "),
    "no folder": ({"pictures": "nowhere", "prompt": PROMPT}, DataError, "nowhere"),
    "of another program": ({"step": 3}, SettingsError, "the recipe has no step. Did you mean max_train_steps?"),
    "unknown": ({"ranks": 3}, SettingsError, 'the recipe has no ranks. Did you mean rank?'),
    "a type": ({"rank": "3"}, SettingsError, "rank = '3' has the wrong type; it must be int"),
    "a range": ({"rank": 0}, SettingsError, "^rank must be at least 1; it is 0"),
    "a pair": ({"center_crop": False}, SettingsError, "^cache_latents cannot be joined with center_crop=False"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_keywords(pictures: Path, usual: dict[str, Any], case: str) -> None:
    given, kind, message = WRONG[case]
    full: dict[str, Any] = usual | (given if "prompt" in given else {"pictures": pictures, "prompt": PROMPT} | given)
    with pytest.raises(kind, match=message) as caught:
        minidiff.train_lora(**full)
    assert "--" not in str(caught.value)


def test_a_run_that_is_stopped_is_no_result(pictures: Path, usual: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from minidiff.trainer import python
    from minidiff.trainer.run import Report

    monkeypatch.setattr(python, "fit", lambda task, settings: Report(1, finished=False))
    with pytest.raises(KeyboardInterrupt, match='1 updates are saved; go on with resume_from_checkpoint="latest"'):
        minidiff.train_lora(pictures, PROMPT, **usual)


def test_a_preset_and_the_hub(pictures: Path, usual: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr("minidiff.trainer.python.upload", lambda s: sent.append(s.output_dir))
    small = {"output_dir": usual["output_dir"], "max_train_steps": 1, "validation_steps": 0, "device": "cpu", "resolution": 32}
    small |= {"preset": "object", "train_batch_size": 1, "push_to_hub": True}
    adapter = minidiff.train_lora(pictures_of(pictures, 32), PROMPT, **small)
    assert set(adapter.ranks.values()) == {8} and any("resnets" in name for name in adapter.ranks)  # the pocket's numbers
    assert json.loads((usual["output_dir"] / "metrics.jsonl").read_text())["lr"] == 1e-3 and sent == [str(usual["output_dir"])]


def pictures_of(folder: Path, side: int) -> Path:
    for path in folder.iterdir():
        Image.new("RGB", (side, side)).save(path)
    return folder
