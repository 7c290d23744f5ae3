"""Prior preservation: the class pictures, the batches of two halves, and what cannot work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_model import tiny_folder
from tiny_sizes import TINY_VAE
from torch import Tensor, nn

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import DataError, SettingsError
from minidiff.core.recipes import DiffusionLoss
from minidiff.core.schedule import NoiseSchedule, add_noise
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.images import read_png_text, save_png
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.trainer.dataset import Example
from minidiff.trainer.latents import LatentData
from minidiff.trainer.priors import class_examples, paired, paired_by_base
from minidiff.trainer.settings import FineTuneSettings


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def settings(tmp_path: Path) -> FineTuneSettings:
    return FineTuneSettings(
        output_dir=str(tmp_path / "out"),
        instance_data_dir=str(tmp_path / "instance"),
        instance_prompt="a photo of a red dog",
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        class_prompt="a photo of a dog",
        num_class_images=3,
        sample_batch_size=2,
        validation_inference_steps=2,
        train_batch_size=2,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# --- class pictures --------------------------------------------------------------------------------------------------


def test_class_pictures_are_drawn_kept_and_reused(
    pipe: StableDiffusionPipeline, settings: FineTuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(settings.class_data_dir or "")
    examples = class_examples(pipe, settings, 32)
    assert [(e.path.name, e.caption) for e in examples] == [(f"class-0000{i}.png", "a photo of a dog") for i in range(3)]
    assert read_png_text(examples[0].path)["parameters"].startswith("a photo of a dog\nSteps: 2")
    with Image.open(examples[0].path) as image:
        assert image.size == (32, 32)
    whole = contents(folder)

    examples[1].path.unlink()  # as where a run was stopped: only what is missing is drawn, and is what it was
    seen: list[Any] = []
    monkeypatch.setattr("minidiff.trainer.priors.save_png", lambda *a: (seen.append(a[1].name), save_png(*a)))
    class_examples(pipe, settings, 32)
    assert contents(folder) == whole and seen == ["class-00001.png"]
    assert len(class_examples(pipe, replace(settings, num_class_images=2), 32)) == 3  # those there stay


def test_own_pictures_count(pipe: StableDiffusionPipeline, settings: FineTuneSettings) -> None:
    folder = Path(settings.class_data_dir or "")
    folder.mkdir()
    for name in ("mine.png", "class-00000.png"):  # whatever they are called
        Image.new("RGB", (32, 32)).save(folder / name)
    before = contents(folder)
    assert [e.path.name for e in class_examples(pipe, settings, 32)] == ["class-00000.png", "class-00001.png", "mine.png"]
    assert {name: data for name, data in contents(folder).items() if name in before} == before
    assert len(class_examples(pipe, replace(settings, num_class_images=0), 32)) == 3


def test_bad_class_folders(pipe: StableDiffusionPipeline, settings: FineTuneSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class has no class pictures, and --num_class_images 0 draws none"):
        class_examples(pipe, replace(settings, num_class_images=0), 32)
    class_examples(pipe, replace(settings, num_class_images=1), 32)
    with pytest.raises(DataError, match='class-00000.png was drawn for "a photo of a dog", and --class_prompt is "a cat"'):
        class_examples(pipe, replace(settings, class_prompt="a cat"), 32)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file is a file; --class_data_dir is the folder"):
        class_examples(pipe, replace(settings, class_data_dir=str(tmp_path / "file")), 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"class_prompt": None}, "--with_prior_preservation needs --class_prompt"),
        ({"class_prompt": " "}, "--with_prior_preservation needs --class_prompt"),
        ({"class_data_dir": None}, "--with_prior_preservation needs --class_data_dir.*--prior_from_base"),
        ({"prior_loss_weight": -0.1}, "--prior_loss_weight must not be negative; it is -0.1"),
        ({"class_data_dir": "instance/../instance"}, "--class_data_dir is the folder of the training pictures, too.*instance"),
        ({"class_data_dir": "out"}, "--class_data_dir lies in --output_dir"),
        ({"class_data_dir": "out/class"}, "--class_data_dir lies in --output_dir, which is for what minidiff writes"),
        ({"with_prior_preservation": False}, "--class_data_dir goes with --with_prior_preservation"),
        ({"prior_from_base": True}, "--class_data_dir has no use with --prior_from_base"),
        ({"num_class_images": -1}, "--num_class_images must lie in 0"),
        ({"sample_batch_size": 0}, "--sample_batch_size must lie in 1"),
        ({"aspect_ratio_buckets": True}, "--aspect_ratio_buckets cannot be joined.*take --prior_from_base"),
        ({"noise_offset": -1.0}, "--noise_offset must not be negative"),
    ],
)
def test_bad_settings(settings: FineTuneSettings, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings.check()
    if isinstance(changes.get("class_data_dir"), str):
        changes = {"class_data_dir": str(tmp_path / changes["class_data_dir"])}
    with pytest.raises(SettingsError, match=message):
        replace(settings, **changes).check()


def test_a_full_disk_is_said(pipe: StableDiffusionPipeline, settings: FineTuneSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        class_examples(pipe, replace(settings, class_data_dir=str(tmp_path / "file" / "class")), 32)


# --- batches of two halves -------------------------------------------------------------------------------------------


def encode(prompts: list[str]) -> dict[str, Tensor]:
    """(B, 77, D) that tells which prompt it was."""
    return {"text": torch.tensor([float(len(p)) for p in prompts])[:, None, None].expand(-1, 77, 24)}


def latents(folder: Path, count: int, caption: str, settings: FineTuneSettings) -> LatentData:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (80 * i, 40, len(caption))).save(folder / f"{i}.png")
    examples = [Example(folder / f"{i}.png", caption) for i in range(count)]
    return LatentData(examples, settings, 32, AutoencoderKL(TINY_VAE).eval(), encode, 1000)


def test_both_halves_are_in_one_batch(settings: FineTuneSettings, tmp_path: Path) -> None:
    instance = latents(tmp_path / "i", 2, "instance", settings)
    prior = latents(tmp_path / "c", 3, "class", replace(settings, seed=1))
    for step in range(4):
        batch, alone = paired(instance, prior, step, 0), instance.batch(step, 0)
        assert all(torch.equal(batch[name][:2], alone[name]) for name in alone)  # the instance half is what it was
        assert batch["text"][:, 0, 0].tolist() == [8, 8, 5, 5]
        assert not torch.equal(batch["noise"][:2], batch["noise"][2:])  # and each half has noise of its own
    drawn = [prior.draw(number).picture for number in range(6)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == [0, 1, 2]


def test_prior_from_base_batches(settings: FineTuneSettings, tmp_path: Path) -> None:
    settings = replace(settings, masked_loss=True)
    instance = latents(tmp_path / "i", 2, "instance", settings)
    batch, alone = paired_by_base(instance, encode(["class"]), 3, 0), instance.batch(3, 0)
    assert all(torch.equal(batch[name][:2], alone[name]) for name in alone)
    assert torch.equal(batch["latents"][2:], alone["latents"]) and batch["mask"].shape == (4, 1, 16, 16)
    assert batch["text"][:, 0, 0].tolist() == [8, 8, 5, 5]
    assert not torch.equal(batch["noise"][2:], alone["noise"]) and not torch.equal(batch["t"][2:], alone["t"])
    wide = latents(tmp_path / "i", 2, "instance", replace(settings, train_batch_size=4))
    rows = torch.cat([paired_by_base(instance, encode(["class"]), step, 0)["noise"][2:] for step in (2, 3)])
    assert torch.equal(paired_by_base(wide, encode(["class"]), 1, 0)["noise"][4:], rows)  # one batch of 4 is two of 2


class Echo(nn.Module):
    """A U-Net that answers with its input, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_norm_out, self.weight = nn.GroupNorm(1, 4), nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.weight * x_t


def test_the_base_is_asked_about_the_class_half_alone() -> None:
    schedule, base, seen = NoiseSchedule.from_config(NoiseConfig()), Echo(), []

    def answer(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen.append((t.tolist(), len(text)))
        return 2 * base(x_t, t, text)

    latents, noise, t = torch.randn(4, 4, 2, 2), torch.randn(4, 4, 2, 2), torch.arange(4)
    batch = {"latents": latents, "noise": noise, "t": t, "text": torch.zeros(4, 77, 8)}
    loss = DiffusionLoss(Echo(), schedule, prior_weight=0.5, base=answer)(batch, 0, 0)
    x_t = add_noise(schedule, latents, noise, t)
    torch.testing.assert_close(loss, (x_t - noise)[:2].square().mean() + 0.5 * x_t[2:].square().mean())  # 2 x_t is the target
    loss.backward()
    assert seen == [([2, 3], 2)] and base.weight.grad is None
