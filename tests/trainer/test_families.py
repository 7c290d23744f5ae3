"""Every recipe on a tiny model in SD 2's layout that predicts v: what training leaves is what its files bring back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import sd2_folder
from tiny_recipes import METHODS, base_of, draw_pictures, loaded, picture, tiny, train, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd2_folder(tmp_path_factory.mktemp("tiny"), "SD 2 v")


@pytest.mark.parametrize("method", METHODS)
def test_the_files_bring_back_what_was_trained(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidiff.trainer.run.loss_curve", lambda metrics, path: None)
    targets: dict[str, Any] = {"lora_targets": ("attention", "projections")} if method == "lora" else {}
    pictures = draw_pictures(tmp_path / "pictures")
    settings = tiny(method, base, pictures, tmp_path / "out", gradient_checkpointing=True, **targets)
    job = train(settings)
    prompt = "a photo of a <dog>" if method in ("textual inversion", "pivotal") else "a photo of a sks dog"
    after = picture(loaded(tmp_path / "out", settings), prompt)
    torch.testing.assert_close(picture(trained(job, settings), prompt), after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(picture(base_of(settings), prompt), after, atol=1e-4)
