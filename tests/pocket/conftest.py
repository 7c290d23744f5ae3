"""The tiny model with an image tower, as the pocket checkpoint has one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minidiff.files import weights
from minidiff.pocket.towers import IMAGE_TOWER


@pytest.fixture(scope="session")
def tiny_with_tower(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never change it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("tower") / "model"
    shutil.copytree(tiny_folder, folder)
    small = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    values = IMAGE_TOWER | small
    torch.manual_seed(0)
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**values, initializer_factor=10.0))  # so that differences show
    weights.save(tower.state_dict(), folder / "image_encoder" / "model.safetensors")
    (folder / "image_encoder" / "config.json").write_text(json.dumps(values))
    return folder
