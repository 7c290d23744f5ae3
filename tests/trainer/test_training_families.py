"""Every recipe on tiny models in SD 2's layout, predicting v, and in SDXL's: what training leaves, its files bring back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import sd2_folder, xl_folder
from tiny_recipes import METHODS, base_of, draw_pictures, loaded, picture, tiny, train, trained

from minidiff.files.looks import architecture


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd2_folder(tmp_path_factory.mktemp("tiny"), "SD 2 v")


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return xl_folder(tmp_path_factory.mktemp("xl"))


XL_METHODS = ("full, text encoder too", "dreambooth", "lora, text encoder too", "textual inversion", "pivotal")


@pytest.mark.parametrize(("family", "method"), [*(("base", m) for m in METHODS), *(("xl", m) for m in XL_METHODS)])
def test_the_files_bring_back_what_was_trained(
    family: str, method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(family)
    targets: dict[str, Any] = {"lora_targets": ("attention", "projections")} if method == "lora" else {}
    pictures = draw_pictures(tmp_path / "pictures")
    budget = {"fit": "2GB"} if method == "lora" else {"gradient_checkpointing": True}
    settings = tiny(method, base, pictures, tmp_path / "out", **budget, **targets)
    job = train(settings)
    prompt = "a photo of a <dog>" if method in ("textual inversion", "pivotal") else "a photo of a sks dog"
    after = picture(loaded(tmp_path / "out", settings), prompt)
    torch.testing.assert_close(picture(trained(job, settings), prompt), after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(picture(base_of(settings), prompt), after, atol=1e-4)


def test_a_turbo_base_is_trained_with_a_note(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, notes = draw_pictures(tmp_path / "pictures"), []
    for folder in (base, sd2_folder(tmp_path, "SD-Turbo")):
        train(tiny("lora", folder, pictures, tmp_path / f"out-{len(notes)}", max_train_steps=1))
        notes.append("the base is a turbo model" in capsys.readouterr().err)
    assert notes == [False, True]


@pytest.mark.parametrize(
    ("width", "v", "names"),
    [
        (768, False, ("stable-diffusion-v1", "sd_v1")),
        (768, True, ("stable-diffusion-v1", "sd_v1_v")),
        (1024, False, ("stable-diffusion-v2-512", "sd_v2")),
        (1024, True, ("stable-diffusion-v2-768-v", "sd_v2_v")),
        (1024, None, ("stable-diffusion-v2", "sd_v2")),
        (24, True, ("width-24", "width-24")),
    ],
)
def test_the_metadata_names_the_base_as_kohya_does(width: int, v: bool | None, names: tuple[str, str]) -> None:
    assert architecture(width, v) == names
