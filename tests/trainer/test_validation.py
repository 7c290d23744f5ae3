"""The validation loss: fixed in everything but the model; and the check of what the base predicts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_recipes import draw_pictures, tiny
from tiny_sizes import TINY_VAE
from torch import Tensor, nn

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import SettingsError
from minidiff.core.losses import squared_error
from minidiff.core.schedule import NoiseSchedule, add_noise, training_target
from minidiff.core.vae import AutoencoderKL
from minidiff.trainer.dataset import Example
from minidiff.trainer.latents import LatentData
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.settings import FineTuneSettings
from minidiff.trainer.validation import ValidationSet, check_prediction_type, validation_set

SCHEDULE = NoiseSchedule.from_config(NoiseConfig())
Batch = dict[str, Tensor]


def data(folder: Path, count: int = 2, **changes: object) -> LatentData:
    torch.manual_seed(0)
    examples = []
    for i in range(count):
        Image.new("RGB", (40, 32), (50 * i % 256, 40, 200)).save(folder / f"{i}.png")
        examples.append(Example(folder / f"{i}.png", f"{i}"))
    settings = replace(FineTuneSettings(), **changes)  # type: ignore[arg-type]
    vae = AutoencoderKL(TINY_VAE).eval()
    return LatentData(examples, settings, 32, vae, lambda prompts: {"text": torch.zeros(len(prompts), 77, 24)}, 1000)


@pytest.fixture
def fixed(tmp_path: Path) -> ValidationSet:
    return validation_set(data(tmp_path))


def test_nothing_is_drawn_anew(fixed: ValidationSet, tmp_path: Path) -> None:
    shaken = {"center_crop": False, "random_flip": True, "cache_latents": False, "proportion_empty_prompts": 0.9}
    other = validation_set(data(tmp_path, seed=7, noise_offset=0.5, **shaken))
    for a, b in zip(fixed.batches, other.batches):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [batch["t"].tolist() for batch in fixed.batches] == [[62, 312, 562, 812], [187, 437, 687, 937]]
    assert fixed.batches[0]["latents"].shape == fixed.batches[0]["noise"].shape == (4, 4, 16, 16)
    assert fixed.batches[0]["text"].shape == (4, 77, 24)


def test_at_most_sixteen_pictures_spread_evenly(tmp_path: Path) -> None:
    many = data(tmp_path, 20)
    batches = validation_set(many).batches
    assert len(batches) == 16
    assert torch.equal(batches[15]["latents"][0], many.fixed(18)["latents"])
    assert sorted(int(batch["t"][0]) for batch in batches) == [(2 * k + 1) * 250 // 32 for k in range(16)]


def test_a_number_for_each_quarter(fixed: ValidationSet) -> None:
    result = fixed.loss(lambda batch: (batch["t"] // 250).float() + 1)
    assert result == {
        "val_loss": 2.5,
        "val_loss_0_250": 1.0,
        "val_loss_250_500": 2.0,
        "val_loss_500_750": 3.0,
        "val_loss_750_1000": 4.0,
    }


def test_a_better_model_has_a_lower_loss(fixed: ValidationSet) -> None:
    def errors(skill: float) -> dict[str, float]:
        return fixed.loss(lambda batch: squared_error(skill * batch["noise"], batch["noise"]))

    good, better = errors(0.5), errors(0.9)
    assert all(better[name] < good[name] for name in good)
    assert errors(0.5) == good


def predicting(kind: str, fixed: ValidationSet, schedule: NoiseSchedule = SCHEDULE) -> None:
    """Check `schedule` against a network that predicts `kind`, nearly right."""
    truth = NoiseSchedule.from_config(NoiseConfig(prediction_type=kind))
    check_prediction_type(schedule, fixed, lambda b: 0.9 * training_target(truth, b["latents"], b["noise"], b["t"]))


def test_a_base_that_predicts_something_else_is_refused(fixed: ValidationSet) -> None:
    velocity = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction"))
    fixed = ValidationSet([b | {"latents": torch.randn(4, 4, 16, 16)} for b in fixed.batches], fixed.bounds)
    predicting("epsilon", fixed), predicting("v_prediction", fixed, velocity)
    with pytest.raises(SettingsError, match='says prediction_type "epsilon", but the U-Net answers with "v_prediction"'):
        predicting("v_prediction", fixed)
    with pytest.raises(SettingsError, match='Set prediction_type to "epsilon" there'):
        predicting("epsilon", fixed, velocity)
    for schedule in (SCHEDULE, velocity):  # networks that have learnt nothing pass
        check_prediction_type(schedule, fixed, lambda b: torch.zeros(4, 4, 16, 16))
        check_prediction_type(schedule, fixed, lambda b: add_noise(SCHEDULE, b["latents"], b["noise"], b["t"]) * 0.01)


@pytest.mark.parametrize("samples, calls", [(1, [1] * 4), (3, [3, 1]), (8, [4])])
def test_no_more_samples_at_once_than_in_training(tiny_folder: Path, tmp_path: Path, samples: int, calls: list[int]) -> None:
    draw_pictures(tmp_path / "pictures")
    settings = tiny("lora", tiny_folder, tmp_path / "pictures", tmp_path / "run", train_batch_size=samples)
    task = RECIPES[type(settings)](settings)
    sizes: list[int] = []
    task.modules["unet"].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert task.validate is not None and task.validate()["val_loss"] > 0
    assert sizes == 3 * calls  # three pictures


def test_who_is_done_leaves_before_the_first_look(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VAE and text encoder take memory that the U-Net's first call could need."""
    draw_pictures(tmp_path / "pictures")
    vaes: list[AutoencoderKL] = []
    monkeypatch.setattr(AutoencoderKL, "eval", lambda self: vaes.append(self) or nn.Module.eval(self))
    looked: list[bool] = []

    def look(*_: object) -> None:
        looked.append(next(vaes[0].parameters()).is_meta)

    monkeypatch.setattr("minidiff.trainer.validation.check_prediction_type", look)
    settings = tiny("lora", tiny_folder, tmp_path / "pictures", tmp_path / "run")
    RECIPES[type(settings)](settings)
    assert looked == [True]
