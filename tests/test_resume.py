"""Exact resume, stopped mid-epoch: the result, the optimizer's state and the metrics, to the last bit."""

from pathlib import Path

import pytest
from resume_harness import NUMBERS, Case, check_exact_resume, draw_pictures, numbers, picture_case

from minidiff.train.settings import TrainSettings


@pytest.fixture(autouse=True)
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.train.run.loss_curve", lambda metrics, path: None)  # matplotlib takes longer than all else


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_exact_resume_of_pictures(tmp_path: Path, accumulation: int, ema: bool, workers: int) -> None:
    case = picture_case(draw_pictures(tmp_path / "pictures"))
    case = case.changed(gradient_accumulation_steps=accumulation, use_ema=ema, dataloader_num_workers=workers)
    check_exact_resume(case, tmp_path, stops=[3])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_workers_change_nothing(tmp_path: Path, accumulation: int) -> None:
    from resume_harness import fingerprint

    case = picture_case(draw_pictures(tmp_path / "pictures")).changed(gradient_accumulation_steps=accumulation)
    for workers in (0, 2):
        case.changed(dataloader_num_workers=workers).run(tmp_path / str(workers))
    assert fingerprint(tmp_path / "0") == fingerprint(tmp_path / "2")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_exact_resume_of_numbers(tmp_path: Path, optimizer: str) -> None:
    """With dropout, an average, sheets and validation; stopped before the first checkpoint, between two, and at the end."""

    def make(settings: TrainSettings) -> object:
        return numbers(settings, optimizer)

    check_exact_resume(Case(make, NUMBERS.settings), tmp_path, stops=[0, 1, 3, 5])  # type: ignore[arg-type]
