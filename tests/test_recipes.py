"""The LoRA recipe on a tiny model: what is trained, what is not, what comes out."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import tiny_folder

from minidiff.adapters.inject import DEFAULT_TARGETS
from minidiff.diffusion.losses import min_snr_weights, mse
from minidiff.diffusion.schedule import add_noise
from minidiff.errors import DataError, MinidiffError, SettingsError
from minidiff.train.loop import fit
from minidiff.train.recipes import diffusion_loss, fingerprint, load_base, load_data, lora, sample_sheets
from minidiff.train.settings import LoRASettings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tiny")
    tiny_folder(home)
    (home / "pictures").mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 32), colour).save(home / "pictures" / f"{i}.png")
    return home


@pytest.fixture
def settings(home: Path, tmp_path: Path) -> LoRASettings:
    return LoRASettings(
        pretrained_model_name_or_path=str(home / "base"),
        instance_data_dir=str(home / "pictures"),
        instance_prompt="a sks dog",
        output_dir=str(tmp_path / "out"),
        resolution=32,
        max_train_steps=3,
        validation_steps=0,
        learning_rate=1e-2,
        device="cpu",
    )


def test_the_base_stays_and_the_adapter_comes_out(settings: LoRASettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.train.loop.loss_curve", lambda metrics, path: None)
    task = lora(settings)
    assert all(re.search(r"lora_[AB]", name) for name in task.trainable)
    assert fit(task, settings).finished
    pipe = load_base(settings)
    assert fingerprint(pipe.unet, pipe.vae, pipe.text_encoder) == task.facts["base"]
    before = pipe("a sks dog", seed=0, num_inference_steps=2, output_type="latent").images
    pipe.load_lora_weights(settings.output_dir)
    after = pipe("a sks dog", seed=0, num_inference_steps=2, output_type="latent").images
    assert not torch.allclose(before, after, atol=1e-3)
    other = load_base(settings)
    other.load_lora_weights(Path(settings.output_dir) / "checkpoint-3")  # a checkpoint is an adapter, too
    assert torch.equal(other("a sks dog", seed=0, num_inference_steps=2, output_type="latent").images, after)
    pipe.unload_lora_weights()
    again = pipe("a sks dog", seed=0, num_inference_steps=2, output_type="latent").images
    assert torch.equal(again, before)


def test_first_row_is_the_base(settings: LoRASettings) -> None:
    settings = replace(settings, validation_steps=1, num_validation_images=2, validation_inference_steps=2)
    pipe = load_base(settings)
    data = load_data(pipe, settings)
    sheet = sample_sheets(pipe, settings, data)
    before = sheet(0)
    for p in pipe.unet.parameters():
        p.data *= 1.5
    after = sheet(0)
    width, height = before.size
    top, bottom = (0, 0, width, height * 2 // 5), (0, height * 3 // 5, width, height)
    assert before.crop(top).tobytes() == after.crop(top).tobytes()
    assert before.crop(bottom).tobytes() != after.crop(bottom).tobytes()


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_simple_loss_eq14(settings: LoRASettings, gamma: float | None) -> None:
    """DDPM eq. 14: the mean of ||eps - eps_theta(sqrt(a_bar) x0 + sqrt(1 - a_bar) eps, t)||^2, weighted if asked."""
    settings = replace(settings, snr_gamma=gamma)
    pipe = load_base(settings)
    batch = load_data(pipe, settings).batch(0, 0)
    with torch.no_grad():
        given = diffusion_loss(pipe, settings)(batch, 0, 0)
        x_t = add_noise(pipe.schedule, batch["latents"], batch["noise"], batch["t"])
        output = pipe.unet(x_t, batch["t"], batch["text"])
    weights = None if gamma is None else min_snr_weights(pipe.schedule, batch["t"], gamma)
    assert torch.equal(given, mse(output, batch["noise"], weights))


def test_the_first_step_is_the_bases_loss(settings: LoRASettings) -> None:
    """B = 0: before any update the tuned model is the base."""
    task = lora(settings)
    pipe = load_base(settings)
    batch = task.batch(0, 0)
    assert torch.equal(task.loss(batch, 0, 0), diffusion_loss(pipe, settings)(batch, 0, 0))


def test_bf16_base_keeps_fp32_adapters(settings: LoRASettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.train.loop.loss_curve", lambda metrics, path: None)
    settings = replace(
        settings, mixed_precision="bf16", validation_steps=3, num_validation_images=1, validation_inference_steps=2
    )
    task = lora(settings)
    assert {p.dtype for p in task.trainable.values()} == {torch.float32}
    assert fit(task, settings).finished


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolution": 30}, "--resolution 30: this model needs a multiple of 4, such as 28 or 32"),
        ({"resolution": 64}, "3 of 3 pictures cannot be used"),
        ({"rank": 0}, "--rank must be at least 1; it is 0"),
        ({"rank": 99}, "rank 99 is more than"),
        ({"lora_alpha": -1.0}, "--lora_alpha"),
        ({"lora_targets": ("to_out",)}, "to_out.0"),
        ({"learning_rate": 0.0}, "--learning_rate must be a number above 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps"),
        ({"instance_prompt": " "}, "--instance_data_dir needs --instance_prompt"),
        ({"instance_data_dir": None}, "one of --instance_data_dir"),
        ({"train_data_dir": "x"}, "one of --instance_data_dir"),
        ({"instance_data_dir": "nowhere"}, "nowhere is no folder"),
        ({"device": "tpu9"}, "--device tpu9 is no device"),
        ({"device": "cuda"}, "--device cuda: there is no GPU"),
        ({"pretrained_model_name_or_path": "nowhere/at/all"}, "nowhere/at/all"),
        ({"proportion_empty_prompts": 1.5}, "--proportion_empty_prompts"),
        ({"snr_gamma": 0.0}, "--snr_gamma"),
        ({"lr_warmup_steps": 2}, "--lr_warmup_steps needs another --lr_scheduler"),
        ({"lr_scheduler": "cosin"}, 'Did you mean "cosine"'),
        ({"center_crop": False}, "--no-cache_latents"),
    ],
)
def test_bad_settings(settings: LoRASettings, changes: dict[str, object], message: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MinidiffError, match=re.escape(message)):
        lora(replace(settings, **changes))  # type: ignore[arg-type]


def test_folder_is_checked_before_anything_takes_time(settings: LoRASettings) -> None:
    Path(settings.output_dir).mkdir()
    (Path(settings.output_dir) / "thesis.tex").write_text("mine")
    with pytest.raises(SettingsError, match="thesis.tex"):
        lora(replace(settings, instance_data_dir="nowhere"))


def test_resume_with_other_pictures_is_refused(
    settings: LoRASettings, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidiff.train.loop.loss_curve", lambda metrics, path: None)
    fit(lora(settings), settings)
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "0.png").write_bytes((home / "pictures" / "0.png").read_bytes())
    other = replace(settings, instance_data_dir=str(tmp_path / "fewer"), rank=2, resume_from_checkpoint="latest")
    with pytest.raises(SettingsError) as error:
        fit(lora(other), other)
    assert "rank: was 4, is now 2" in str(error.value) and "pictures: was 3, is now 1" in str(error.value)


def test_captioned_folder(settings: LoRASettings, home: Path) -> None:
    captioned = replace(settings, instance_data_dir=None, instance_prompt=None, train_data_dir=str(home / "pictures"))
    with pytest.raises(DataError, match="have no caption"):
        lora(captioned)


def test_the_targets_help_shows_are_the_adapters_own() -> None:
    assert LoRASettings().lora_targets == DEFAULT_TARGETS
