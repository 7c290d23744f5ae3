"""ControlNets in files of every form: read, written, told from each other, and refused by name."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sizes import TINY_SD2, TINY_UNET

from minidiff.core.config import SD2_UNET, SD15_UNET, ControlNetConfig, UNetConfig
from minidiff.core.controlnet import ControlNetModel
from minidiff.core.errors import WeightsError
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files.controlnet import read_controlnet, write_controlnet
from minidiff.files.convert import convert
from minidiff.files.inspect import inspect
from minidiff.files.names import controlnet_table

NET = ControlNetModel.from_unet(UNet2DConditionModel(TINY_UNET), (8, 16))


def same(net: ControlNetModel, other: ControlNetModel = NET) -> bool:
    return net.config == other.config and all(torch.equal(t, net.state_dict()[key]) for key, t in other.state_dict().items())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_controlnet(NET, tmp_path / "folder")
    write_controlnet(NET, tmp_path / "v11.safetensors")
    ldm = load_file(tmp_path / "v11.safetensors")
    save_file(ldm | {"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "v10.safetensors")
    save_file({key.removeprefix("control_model."): t for key, t in ldm.items()}, tmp_path / "bare.safetensors")
    save_file(NET.state_dict(), tmp_path / "ours.safetensors")
    return tmp_path


def test_every_form_is_read(files: Path) -> None:
    for name in ("folder", "folder/diffusion_pytorch_model.safetensors"):
        assert same(replaced(read_controlnet(files / name))), name
    for name in ("v11", "v10", "bare", "ours"):
        assert same(read_controlnet(files / f"{name}.safetensors", like=TINY_UNET)), name


def replaced(net: ControlNetModel) -> ControlNetModel:
    """A folder's config has no way up."""
    up = {name: getattr(NET.config, name) for name in ("up_block_types", "sample_size")}
    net.config = replace(net.config, **up)
    return net


def test_inspect_and_convert(files: Path) -> None:
    assert (
        inspect(files / "folder")[0]["is"]
        == inspect(files / "v10.safetensors")[0]["is"]
        == ("a ControlNet for an unknown model (cross-attention width 24)")
    )
    assert convert(files / "folder", files / "new.safetensors", "ldm", {})[0].endswith("= 0")
    assert load_file(files / "new.safetensors").keys() == load_file(files / "v11.safetensors").keys()
    with pytest.raises(WeightsError, match="its sizes are not known"):
        convert(files / "v11.safetensors", files / "back", "diffusers", {})


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("difference", "a ControlNet as differences"), ("lora_controlnet", "a Control-LoRA"),
        ("control_add_embedding.linear_1.weight", "a union ControlNet"), ("task_embedding", "a union ControlNet"),
        ("lllite_unet_input_blocks_4_1.down.0.weight", "a ControlNet-LLLite"), ("conv_in.weight", "no ControlNet"),
    ],
)  # fmt: skip
def test_relatives_are_refused_by_name(tmp_path: Path, key: str, name: str) -> None:
    save_file({key: torch.zeros(2, 2), "controlnet_mid_block.weight": torch.zeros(2)}, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match=f"is {name}"):
        read_controlnet(tmp_path / "net.safetensors")


@pytest.mark.parametrize("config", [SD15_UNET, SD2_UNET, TINY_SD2], ids=["SD 1.5", "SD 2", "tiny"])
def test_the_table_names_every_tensor_once(config: UNetConfig) -> None:
    with torch.device("meta"):
        net = ControlNetModel(ControlNetConfig(**asdict(config)))
    table = controlnet_table(net.config)
    assert len(set(table.values())) == len(table)
    assert all(any(key.startswith(f"{ours}.") for ours in table) for key in net.state_dict())
