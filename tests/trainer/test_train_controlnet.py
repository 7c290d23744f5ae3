"""`train controlnet`: its hints, its first loss, its files, its sheets, and that it goes on where it stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_recipes import draw_pictures

from minidiff.core.errors import DataError, SettingsError
from minidiff.files.controlnet import read_controlnet
from minidiff.trainer.dataset import Example
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit, read_metrics
from minidiff.trainer.settings import ControlNetSettings
from minidiff.trainer.task import Job
from minidiff.trainer.validation import hint_image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def settings(tiny_folder: Path, pictures: Path, tmp_path: Path) -> ControlNetSettings:
    few: Any = {"max_train_steps": 3, "validation_steps": 0, "train_batch_size": 2, "resolution": 16, "device": "cpu"}
    few |= {"num_validation_images": 2, "validation_inference_steps": 2, "learning_rate": 1e-2, "instance_prompt": "a dog"}
    here = {"pretrained_model_name_or_path": str(tiny_folder), "instance_data_dir": str(pictures)}
    return ControlNetSettings(**few, **here, output_dir=str(tmp_path / "out"), hint="canny")


def trained(settings: ControlNetSettings) -> Job:
    job = RECIPES[ControlNetSettings](settings)
    assert fit(job, settings).finished
    return job


def test_a_run(settings: ControlNetSettings) -> None:
    """At birth the loss is the base's; the U-Net stays; the result is a folder, with a card and a sheet."""
    settings = replace(settings, validation_steps=3)
    job = RECIPES[ControlNetSettings](settings)
    unet = {name: tensor.clone() for name, tensor in job.modules["unet"].state_dict().items()}
    batch: Any = job.batch(0, 0)
    assert batch["hint"].shape == (2, 3, 16, 16) and set(batch["hint"].unique().tolist()) == {0.0, 1.0}
    with torch.no_grad():
        assert torch.equal(job.loss(batch, 0, 0), replace(job.loss, controlnet=None)(batch, 0, 0))  # type: ignore[type-var]
    assert fit(job, settings).finished
    assert all(torch.equal(tensor, unet[name]) for name, tensor in job.modules["unet"].state_dict().items())
    out = Path(settings.output_dir)
    net = read_controlnet(out).state_dict()
    assert all(torch.equal(tensor, net[name.removeprefix("controlnet.")]) for name, tensor in job.trainable.items())
    assert net["controlnet_mid_block.weight"].any() and json.loads((out / "config.json").read_text())["in_channels"] == 4
    assert 'ControlNetModel.from_pretrained("out")' in (out / "README.md").read_text()
    assert Image.open(out / "samples" / "step-000003.png").height > Image.open(out / "sheet.png").height
    assert "val_loss" in read_metrics(out)[-1]


def test_it_goes_on_where_it_stopped(settings: ControlNetSettings, tmp_path: Path) -> None:
    whole = trained(settings)
    part = replace(settings, output_dir=str(tmp_path / "part"))
    trained(replace(part, max_train_steps=2))
    again = trained(replace(part, resume_from_checkpoint="latest"))
    assert all(torch.equal(p, again.trainable[name]) for name, p in whole.trainable.items())


def test_hints_from_files_are_those_that_were_made(settings: ControlNetSettings, tmp_path: Path) -> None:
    small, edges, table = (tmp_path / name for name in ("small", "edges", "table"))
    lines = []
    for folder in (small, edges, table):
        folder.mkdir()
    for i in range(3):
        name = f"picture-{i}.png"
        for folder in (small, table):
            Image.effect_noise((16, 16), 60 + 20 * i).convert("RGB").save(folder / name)
        for path in (edges / name, table / f"edges-{name}"):
            hint_image(Example(small / name, ""), "canny", 16).save(path)
        lines.append({"file_name": name, "text": "a dog", "conditioning_image": f"edges-{name}"})
    (table / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def hint(**changes: Any) -> torch.Tensor:
        return RECIPES[ControlNetSettings](replace(settings, instance_data_dir=str(small), **changes)).batch(0, 0)["hint"]

    made, blurred = hint(), hint(hint="tile")
    column = replace(settings, hint=None, instance_data_dir=None, instance_prompt=None, train_data_dir=str(table))
    assert torch.equal(hint(hint=None, conditioning_data_dir=str(edges)), made)
    assert torch.equal(RECIPES[ControlNetSettings](column).batch(0, 0)["hint"], made)
    assert 0 < blurred.diff(dim=-1).abs().mean() < made.diff(dim=-1).abs().mean() and blurred.std() > 0.02
    Image.new("RGB", (32, 16)).save(edges / "picture-0.png")
    with pytest.raises(DataError, match="picture-0.png has another shape than picture-0.png"):
        hint(hint=None, conditioning_data_dir=str(edges))
    (edges / "picture-1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 pictures have no conditioning picture \(picture-1.png\)"):
        hint(hint=None, conditioning_data_dir=str(edges))
    with pytest.raises(DataError, match="nowhere is no folder that exists"):
        hint(hint=None, conditioning_data_dir="nowhere")
    with pytest.raises(SettingsError, match="--conditioning_data_dir has no use with --hint"):
        replace(settings, conditioning_data_dir=str(edges)).check()
