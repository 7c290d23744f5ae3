"""Exact resume, stopped mid-epoch: the result, the optimizer's state and the metrics, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from resume_harness import (  # noqa: F401
    NUMBERS,
    Case,
    check_exact_resume,
    draw_pictures,
    fingerprint,
    memory_path,
    numbers,
    picture_case,
)
from tiny_recipes import METHODS, PRIOR, tiny

from minidiff.trainer import checkpoint
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.settings import TrainSettings


@pytest.mark.parametrize("accumulation, ema", [(1, False), (3, True)])  # all of them: below, with recipes
def test_exact_resume_of_pictures(tmp_path: Path, accumulation: int, ema: bool) -> None:
    case = picture_case(draw_pictures(tmp_path / "pictures"))
    case = case.changed(gradient_accumulation_steps=accumulation, use_ema=ema)
    check_exact_resume(case, tmp_path, stops=[3])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_exact_resume_of_numbers(tmp_path: Path, optimizer: str) -> None:
    """With dropout, an average, sheets and validation; stopped before the first checkpoint, between two, and at the end."""

    def make(settings: TrainSettings) -> object:
        return numbers(settings, optimizer)

    check_exact_resume(Case(make, NUMBERS.settings), tmp_path, stops=[0, 1, 3, 5])  # type: ignore[arg-type]


# --- the recipes -----------------------------------------------------------------------------------------------------


def recipe_case(method: str, base: Path, home: Path, **changes: Any) -> Case:
    """Three updates, with everything that is drawn: order, noise, crops, flips, templates, dropout."""
    often = {"max_train_steps": 3, "checkpointing_steps": 2, "random_flip": True, "proportion_empty_prompts": 0.2}
    often |= {"center_crop": False, "cache_latents": False, "lr_scheduler": "cosine"}
    settings = tiny(method, base, draw_pictures(home / "pictures"), home / "run", **{**often, **changes})
    if hasattr(settings, "lora_dropout"):
        settings = Case(RECIPES[type(settings)], settings).changed(lora_dropout=0.2).settings
    return Case(RECIPES[type(settings)], settings)


def combination(method: str, accumulation: int, ema: bool, slow: bool) -> Any:
    name = f"{method}, accumulation {accumulation}, {'EMA' if ema else 'no EMA'}"
    return pytest.param(method, accumulation, ema, marks=[pytest.mark.slow] * slow, id=name)


EVERYDAY = [("full", 1, False), ("lora, text encoder too", 1, True), ("dora", 1, False), ("pivotal", 3, True)]
EVERY = [(m, accumulation, ema) for m in METHODS for accumulation in (1, 3) for ema in (False, True)]


@pytest.mark.parametrize("method, accumulation, ema", [combination(*c, c not in EVERYDAY) for c in EVERY])
def test_exact_resume_of_recipes(
    tiny_folder: Path,
    memory_path: Path,  # noqa: F811
    method: str,
    accumulation: int,
    ema: bool,
) -> None:
    """The last of three updates crashes; an epoch has five samples, so that the resumed run begins within one."""
    case = recipe_case(method, tiny_folder, memory_path)
    case = case.changed(gradient_accumulation_steps=accumulation, use_ema=ema)
    check_exact_resume(case, memory_path, stops=[2])


SAVINGS: dict[str, dict[str, Any]] = {
    "8 bits": {"use_8bit_adam": True},
    "in backward": {"optimizer_in_backward": True},
    "both": {"use_8bit_adam": True, "optimizer_in_backward": True},
}
SAVED = [pytest.param(m, s, marks=[pytest.mark.slow] * ((m, s) != ("full", "both"))) for m in METHODS for s in SAVINGS]


@pytest.mark.parametrize("method, savings", SAVED)
def test_exact_resume_with_savings(tiny_folder: Path, memory_path: Path, method: str, savings: str) -> None:  # noqa: F811
    """Codes and scales go through the files."""
    case = recipe_case(method, tiny_folder, memory_path, learning_rate=1e-3, **SAVINGS[savings])
    check_exact_resume(case, memory_path, stops=[2])
    saved = checkpoint.load(memory_path / "straight" / "run" / "checkpoint-3")[1]
    codes = {t.dtype for name, t in saved["optimizer"].items() if name.endswith(".exp_avg")}
    assert torch.uint8 in codes or method != "full" or "use_8bit_adam" not in SAVINGS[savings]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full, text encoder too", "lora", "dora", "pivotal"])
def test_exact_resume_with_class_pictures_and_sheets(tiny_folder: Path, memory_path: Path, method: str) -> None:  # noqa: F811
    prior = {**PRIOR, "prior_from_base": False, "class_data_dir": str(memory_path / "class")}
    case = recipe_case(method, tiny_folder, memory_path, validation_steps=2, **prior)
    check_exact_resume(case, memory_path, stops=[0, 1, 2])
