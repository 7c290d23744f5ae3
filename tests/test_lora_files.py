"""LoRA files: what is saved comes back, and what does not fit is refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minidiff.adapters.lora import adapter_names, inject, lora_layers, lora_state_dict, trainable
from minidiff.config import TINY_UNET
from minidiff.errors import AdapterError, WeightsError
from minidiff.lora_files import FILE_NAME, load_lora, save_lora
from minidiff.models.unet import UNet2DConditionModel
from minidiff.weights import read_header, save

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # (16, 24) in the tiny U-Net
GOOD = {f"unet.{TO_K}.lora_A.weight": (2, 24), f"unet.{TO_K}.lora_B.weight": (16, 2)}


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(TINY_UNET)


def run(unet: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500]), torch.randn(1, 7, 24, generator=g))


def trained(rank: int, alpha: float) -> UNet2DConditionModel:
    unet = tiny_unet()
    inject(unet, rank, alpha)
    for i, (name, p) in enumerate(trainable(unet).items()):
        if ".lora_B." in name:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return unet


def write(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict | None = None, name: str = FILE_NAME) -> Path:
    metadata = {} if config is None else {"lora_adapter_metadata": json.dumps(config)}
    save({key: torch.ones(shape) for key, shape in shapes.items()}, folder / name, metadata)
    return folder / name


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "alpha"), [(2, 2), (2, 8), (3, 1), (4, 0.3)])
def test_save_and_load_round_trip(tmp_path: Path, rank: int, alpha: float) -> None:
    unet, copy = trained(rank, alpha), tiny_unet()
    path = save_lora(unet, tmp_path, base_model="checkpoints/pocket")
    loaded = load_lora(copy, tmp_path)
    assert torch.equal(run(unet), run(copy)) and not torch.allclose(run(copy), run(tiny_unet()), atol=1e-4)
    assert path == loaded.path == tmp_path / FILE_NAME
    assert set(loaded.scales.values()) == {alpha / rank} and set(loaded.ranks.values()) == {rank}
    assert f"diffusers style, 32 layers, rank {rank}, alpha/r {alpha / rank:g}" in str(loaded)


def test_the_file_is_in_diffusers_style(tmp_path: Path) -> None:
    unet = trained(2, 8)
    path = save_lora(unet, tmp_path / "dog.safetensors", base_model="sd15", metadata={"instance_prompt": "a sks dog"})
    assert path.name == "dog.safetensors"
    assert load_file(path).keys() == {f"unet.{key}" for key in lora_state_dict(unet)}
    metadata = read_header(path).metadata
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.r"] == 2 and config["unet.lora_alpha"] == 8 and type(config["unet.lora_alpha"]) is int
    assert config["unet.target_modules"] == list(lora_layers(unet))
    assert (
        metadata["format"] == "pt" and metadata["base_model"] == "sd15" and metadata["instance_prompt"] == "a sks dog"
    )


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (save_lora(trained(2, 8), tmp_path / name, "default", "base").read_bytes() for name in "ab")
    assert first == second


def test_mixed_ranks_and_alphas_survive(tmp_path: Path) -> None:
    unet, copy = trained(2, 8), tiny_unet()
    layer = next(iter(lora_layers(unet).values()))
    layer.add("default", torch.randn(4, layer.base.in_features), torch.randn(layer.base.out_features, 4), scale=0.75)
    loaded = load_lora(copy, save_lora(unet, tmp_path))
    assert torch.equal(run(unet), run(copy)) and set(loaded.ranks.values()) == {2, 4}


def test_one_of_several_adapters_is_saved(tmp_path: Path) -> None:
    unet = trained(2, 8)
    inject(unet, 3, targets=["attn2.to_k"], adapter_name="style")
    save_lora(unet, tmp_path, "style")
    assert set(load_lora(tiny_unet(), tmp_path).ranks.values()) == {3}
    with pytest.raises(AdapterError, match='no adapter called "dog" to save'):
        save_lora(unet, tmp_path, "dog")


def test_several_files_in_one_model(tmp_path: Path) -> None:
    save_lora(trained(2, 8), tmp_path / "dog")
    save_lora(trained(3, 3), tmp_path / "style.safetensors")
    unet = tiny_unet()
    load_lora(unet, tmp_path / "dog", adapter_name="dog")
    load_lora(unet, tmp_path, adapter_name="style", weight_name="style.safetensors")
    assert adapter_names(unet) == ["dog", "style"]
    assert all(layer.strength == {"dog": 0.0, "style": 1.0} for layer in lora_layers(unet).values())
    with pytest.raises(AdapterError, match="is there already"):
        load_lora(unet, tmp_path / "dog", adapter_name="dog")


# --- where the scale comes from --------------------------------------------------------------------------------------


def test_without_metadata_alpha_is_the_rank_and_the_caller_is_told(tmp_path: Path) -> None:
    loaded = load_lora(tiny_unet(), write(tmp_path, GOOD))
    assert loaded.scales == {TO_K: 1.0} and not loaded.alpha_known
    assert "the file does not say" in str(loaded)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 8}, 4.0),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"attn2.to_k": 2}}, 4.0),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {r"attn[12]\.to_[kv]": 1}}, 0.5),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"o_k": 1}}, 4.0),  # not after a dot
    ],
)
def test_scale_from_the_metadata(tmp_path: Path, config: dict, scale: float) -> None:
    assert load_lora(tiny_unet(), write(tmp_path, GOOD, config)).scales == {TO_K: pytest.approx(scale, rel=1e-12)}


def test_a_peft_folder(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {f"base_model.model.{key[5:]}": shape for key, shape in GOOD.items()},
        name="adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="alpha is unknown, because adapter_config.json is not beside it"):
        load_lora(tiny_unet(), path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "peft_type": "LORA"}))
    loaded = load_lora(tiny_unet(), tmp_path)
    assert loaded.dialect == "peft" and loaded.scales == {TO_K: 4.0} and loaded.alpha_known


# --- refused ---------------------------------------------------------------------------------------------------------

SD2 = "for SD 2.x \\(cross-attention width 1024\\); this model has cross-attention width 24"
REFUSED = {
    "no match": ({"unet.a.lora_A.weight": (2, 3), "unet.a.lora_B.weight": (3, 2)}, None, "0 of 2 tensors match UNet2D"),
    "half a match": (
        GOOD | {"unet.a.lora_A.weight": (2, 3), "unet.a.lora_B.weight": (3, 2)},
        None,
        r"2 of 4 tensors match(.|\n)*2 without a linear layer: a.lora_A.weight, a.lora_B.weight",
    ),
    "SD 2": ({f"unet.{TO_K}.lora_A.weight": (2, 1024), f"unet.{TO_K}.lora_B.weight": (16, 2)}, None, SD2),
    "down without up": ({f"unet.{TO_K}.lora_A.weight": (2, 24)}, None, f"{TO_K} has lora_A and not the other half"),
    "up without down": ({f"unet.{TO_K}.lora_B.weight": (16, 2)}, None, f"{TO_K} has lora_B and not the other half"),
    "ranks differ": (GOOD | {f"unet.{TO_K}.lora_B.weight": (16, 3)}, None, r"lora_A is \(2, 24\), lora_B is \(16, 3\)"),
    "convolution": (
        {"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (16, 2, 1, 1)},
        None,
        "without a linear layer: conv_in.lora_A",
    ),
    "rank in metadata": (GOOD, {"unet.r": 4, "unet.lora_alpha": 8}, "has rank 2, and its configuration says 4"),
    "alpha 0": (GOOD, {"unet.r": 2, "unet.lora_alpha": 0}, "alpha of .* is 0"),
    "alpha NaN": (GOOD, {"unet.r": 2, "unet.lora_alpha": float("nan")}, "alpha of .* is nan"),
    "alpha text": (GOOD, {"unet.r": 2, "unet.lora_alpha": "8"}, "alpha of .* is '8'"),
    "patterns": (GOOD, {"unet.r": 2, "unet.lora_alpha": 8, "unet.rank_pattern": ["x"]}, "not the configuration"),
    "regex": (GOOD, {"unet.r": 2, "unet.lora_alpha": 8, "unet.rank_pattern": {"(": 2}}, "not the configuration"),
    "endless regex": (GOOD, {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"((.*)*)*x": 2}}, "repeats too much"),
    "no alpha": (GOOD, {"unet.r": 2}, "alpha of .* is None"),
    "rsLoRA text": (GOOD, {"unet.r": 2, "unet.lora_alpha": 8, "unet.use_rslora": "no"}, "use_rslora is 'no'"),
    "LoHa by metadata": (GOOD, {"unet.r": 2, "unet.lora_alpha": 8, "unet.peft_type": "LOHA"}, "adapter type LOHA"),
    "DoRA by metadata": (GOOD, {"unet.r": 2, "unet.use_dora": True}, "unsupported adapter type DoRA"),
    "DoRA": (GOOD | {f"unet.{TO_K}.lora_magnitude_vector": (16,)}, None, "unsupported adapter type DoRA"),
    "LoKr": ({"lora_unet_mid_block_to_q.lokr_w1": (2, 2)}, None, "unsupported adapter type LoKr"),
    "LoHa": ({"lora_unet_mid_block_to_q.hada_w1_a": (2, 2)}, None, "unsupported adapter type LoHa"),
    "text encoder": (
        GOOD | {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": (2, 24)},
        None,
        "1 of 3 tensors are not for the U-Net",
    ),
    "kohya": (
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (2, 768)},
        None,
        r"a LoRA in the kohya style for SD 1.x \(cross-attention width 768\); minidiff reads the diffusers/peft style",
    ),
    "down/up": ({f"unet.{TO_K}.lora.down.weight": (2, 24)}, None, "in the diffusers down/up style"),
    "processor": (
        {"unet.x.attn1.processor.to_q_lora.down.weight": (2, 24)},
        None,
        r"attention-processor \(2023\) style",
    ),
    "cloneofsimo": ({"unet:0:up": (2, 24)}, None, "in the cloneofsimo style"),
    "embedding": ({"<cat-toy>": (1, 768)}, None, "is no LoRA. The file looks like a textual inversion embedding"),
    "U-Net": ({"conv_in.weight": (2, 4, 3, 3), "time_embedding.linear_1.bias": (2,)}, None, "is no LoRA.*U-Net"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    shapes, config, message = REFUSED[kind]
    path, unet = write(tmp_path, shapes, config), tiny_unet()
    with pytest.raises(AdapterError, match=message) as error:
        load_lora(unet, path)
    assert str(path) in str(error.value)
    assert not lora_layers(unet)


def test_metadata_that_is_not_json(tmp_path: Path) -> None:
    tensors = {key: torch.ones(shape) for key, shape in GOOD.items()}
    for text in ("{", "3", "[]"):
        save(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(AdapterError, match="lora_adapter_metadata is not the configuration of a LoRA"):
            load_lora(tiny_unet(), tmp_path / "x.safetensors")


def test_nan_in_an_adapter(tmp_path: Path) -> None:
    tensors = {key: torch.full(shape, float("nan")) for key, shape in GOOD.items()}
    save(tensors, tmp_path / FILE_NAME)
    unet = tiny_unet()
    with pytest.raises(WeightsError, match="lora_A.weight has NaN"):
        load_lora(unet, tmp_path)
    assert not lora_layers(unet)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no .safetensors file in it"):
        load_lora(tiny_unet(), tmp_path)
    (tmp_path / "dog.safetensors").touch()
    with pytest.raises(AdapterError, match="it has dog.safetensors: say which with weight_name"):
        load_lora(tiny_unet(), tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        load_lora(tiny_unet(), tmp_path / "cat.safetensors")
