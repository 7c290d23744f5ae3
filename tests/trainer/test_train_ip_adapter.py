"""`train ip_adapter`: the drops, the first loss, the files, the sheets, and that it goes on where it stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_ip_adapters import tiny_tower_folder
from tiny_recipes import base_of, draw_pictures

from minidiff.core.errors import WeightsError
from minidiff.trainer import memory
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit, read_metrics
from minidiff.trainer.settings import IPAdapterSettings
from minidiff.trainer.task import Job


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and an image tower."""
    home = tmp_path_factory.mktemp("ip")
    draw_pictures(home / "pictures")
    tiny_tower_folder(home)
    return home


@pytest.fixture
def settings(tiny_folder: Path, home: Path, tmp_path: Path) -> IPAdapterSettings:
    few: Any = {"max_train_steps": 3, "validation_steps": 0, "train_batch_size": 2, "resolution": 16, "device": "cpu"}
    few |= {"num_validation_images": 2, "validation_inference_steps": 2, "learning_rate": 1e-2, "instance_prompt": "a dog"}
    here = {"pretrained_model_name_or_path": str(tiny_folder), "instance_data_dir": str(home / "pictures")}
    return IPAdapterSettings(**few, **here, output_dir=str(tmp_path / "out"), image_encoder=str(home / "image_encoder"))


def trained(settings: IPAdapterSettings) -> Job:
    job = RECIPES[IPAdapterSettings](settings)
    assert fit(job, settings).finished
    return job


def test_a_run(settings: IPAdapterSettings, home: Path) -> None:
    """The U-Net stays; the file draws as the sheets do; the base is drawn as without an adapter."""
    settings = replace(settings, validation_steps=3)
    job = RECIPES[IPAdapterSettings](settings)
    unet = {name: tensor.clone() for name, tensor in job.modules["unet"].state_dict().items()}
    start = {name: tensor.clone() for name, tensor in job.modules["ip_adapter"].state_dict().items()}
    assert memory.budget(job, settings).moments["training step"] > 0
    assert fit(job, settings).finished
    assert all(torch.equal(tensor, unet[name]) for name, tensor in job.modules["unet"].state_dict().items())
    out = Path(settings.output_dir)
    file = load_file(out / "ip_adapter.safetensors")
    assert file.keys() == start.keys() and [name for name in file if torch.equal(file[name], start[name])] == []
    assert 'load_ip_adapter("out", subfolder="", weight_name="ip_adapter.safetensors")' in (out / "README.md").read_text()
    assert Image.open(out / "samples" / "step-000003.png").height > Image.open(out / "sheet.png").height
    assert "val_loss" in read_metrics(out)[-1]
    pipe = base_of(settings)
    call: Any = {"prompt": "a dog", "num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    base = pipe(**call).images
    pipe.load_ip_adapter(out, image_encoder_folder=home / "image_encoder")
    assert (pipe(**call, ip_adapter_image=home / "pictures" / "picture-0.png").images - base).abs().max() > 1e-4


def test_drops_are_those_of_the_authors_script(settings: IPAdapterSettings) -> None:
    """5 % without the picture, 5 % without the prompt, 5 % without both."""
    batches: Any = RECIPES[IPAdapterSettings](settings).batch.__self__  # type: ignore[attr-defined]
    draws = [batches.draw(number) for number in range(4000)]
    kinds = [(draw.prompt == "", draw.unseen) for draw in draws]
    for kind in ((True, False), (False, True), (True, True)):
        assert 0.04 < kinds.count(kind) / len(kinds) < 0.06
    number = next(i for i, draw in enumerate(draws) if draw.unseen)
    assert not batches.sample(number)["e"].any() and batches.fixed(0)["e"].shape == (1, 32)


def test_it_goes_on_where_it_stopped(settings: IPAdapterSettings, tmp_path: Path) -> None:
    whole = trained(settings).modules["ip_adapter"].state_dict()
    parts = replace(settings, output_dir=str(tmp_path / "parts"), max_train_steps=1)
    trained(parts)
    after = trained(replace(parts, max_train_steps=3, resume_from_checkpoint="latest")).modules["ip_adapter"].state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in after.items())


def test_half_precision_and_savings(settings: IPAdapterSettings) -> None:
    settings = replace(settings, mixed_precision="bf16", gradient_checkpointing=True, max_train_steps=1, use_8bit_adam=True)
    job = trained(settings)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in job.trainable.values())


def test_a_base_without_an_image_tower(settings: IPAdapterSettings) -> None:
    with pytest.raises(WeightsError, match="no image encoder here.*--image_encoder"):
        RECIPES[IPAdapterSettings](replace(settings, image_encoder=None))
