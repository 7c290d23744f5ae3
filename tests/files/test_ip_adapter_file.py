"""IP-Adapter files: both forms of file, the kinds that are told apart, and bad ones."""

from pathlib import Path

import pytest
import torch
from tiny_adapters import tiny_unet
from tiny_ip_adapters import tiny_ip_adapter
from tiny_sizes import TINY_XL
from torch import Tensor

from minidiff.core.errors import WeightsError
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files.convert import convert
from minidiff.files.inspect import as_text, inspect
from minidiff.files.ip_adapter_file import load_image_tower, load_ip_adapter
from minidiff.files.weights import save


def as_pickle(state: dict[str, Tensor], path: Path) -> Path:
    """The .bin form: two tables."""
    tables: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        part, _, name = key.partition(".")
        tables.setdefault(part, {})[name] = tensor
    torch.save(tables, path)
    return path


@pytest.mark.parametrize("form", ["base", "plus", "full"])
def test_both_forms_of_file(form: str, tmp_path: Path) -> None:
    """Sizes are read from the file; a pickle is read directly, or converted."""
    unet = tiny_unet()
    state = tiny_ip_adapter(unet, form).state_dict()
    pickle = as_pickle(state, tmp_path / "ip.bin")
    convert(pickle, tmp_path / "new.safetensors", "safetensors", {})
    for path in (pickle, tmp_path / "new.safetensors"):
        read = load_ip_adapter(path, unet).state_dict()
        assert list(read) == list(state) and all(torch.equal(read[name], state[name]) for name in state)
    text = as_text(inspect(tmp_path / "new.safetensors")[0])
    assert f"an IP-Adapter of the form {'full-face' if form == 'full' else form}" in text and "problem" not in text


def one(*shape: int) -> Tensor:
    return torch.zeros(shape)


K = {"ip_adapter.1.to_k_ip.weight": one(32, 24)}
LORA = {"ip_adapter.0.to_q_lora.down.weight": one(4, 32), "ip_adapter.0.to_q_lora.up.weight": one(32, 4)}
FACE = {"image_proj.proj.0.weight": one(32, 512), "image_proj.proj.2.weight": one(96, 32), "image_proj.norm.weight": one(24)}
BAD = {
    "FaceID": (FACE | K | LORA, "form FaceID. It needs an embedding of the face by insightface's ArcFace"),
    "FaceID plus": (FACE | K | {"image_proj.perceiver_resampler.proj_in.weight": one(2, 2)}, "form FaceID plus. It needs"),
    "InstantID": ({"image_proj.latents": one(1, 16, 8), "image_proj.proj_in.weight": one(8, 512)} | K, "InstantID. It needs"),
    "PhotoMaker": ({"id_encoder.a.weight": one(2, 2), "lora_weights.b.weight": one(2, 2)}, "PhotoMaker. It needs SDXL"),
    "LoRA": ({"lora_unet_a.lora_down.weight": one(4, 8), "lora_unet_a.lora_up.weight": one(8, 4)}, "is no IP-Adapter; it"),
    "damaged": ({"image_proj.proj.weight": one(96, 32)} | K, "is not whole: 'norm.weight' is missing"),
    "layers": ({"image_proj.proj.weight": one(96, 32), "image_proj.norm.weight": one(24)} | K, "ip_adapter.1.to_v_ip.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path) -> None:
    tensors, message = BAD[name]
    save(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError) as error:
        load_ip_adapter(tmp_path / "bad.safetensors", tiny_unet())
    assert message in str(error.value) and "bad.safetensors" in str(error.value)
    if name in ("FaceID", "InstantID", "PhotoMaker"):
        assert name in as_text(inspect(tmp_path / "bad.safetensors")[0])


def test_another_family_and_a_missing_tower(tmp_path: Path) -> None:
    state = tiny_ip_adapter(UNet2DConditionModel(TINY_XL)).state_dict()
    path = as_pickle(state, tmp_path / "sdxl.bin")
    with pytest.raises(
        WeightsError, match=r"sdxl.bin is an IP-Adapter of the form base for an unknown model .cross-attention width 40.; thi"
    ):
        load_ip_adapter(path, tiny_unet())
    with pytest.raises(WeightsError, match=r"a, .*b: no image encoder here.*models/image_encoder of h94/IP-Adapter"):
        load_image_tower(tmp_path / "a", tmp_path / "b")
