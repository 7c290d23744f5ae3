"""Model files: read strictly, written whole."""

import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sizes import TINY_UNET, TINY_VAE
from torch import Tensor, nn

from minidiff.core.config import UNetConfig, VAEConfig
from minidiff.core.errors import MinidiffError, WeightsError
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files import names as keymaps
from minidiff.files import weights
from minidiff.files.model import ldm_tensors, split_single_file
from minidiff.files.weights import find_weights, load_into, read_header, save

UNET_FILE = "diffusion_pytorch_model.safetensors"


def on_meta(kind: type[nn.Module], config: UNetConfig | VAEConfig) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(TINY_UNET)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(TINY_VAE)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TinyText(nn.Module):
    """The key names of CLIP's text tower, as transformers 4 (`nested`) or 5 has them."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        tower = nn.Module() if nested else self
        tower.embeddings = nn.Module()
        tower.embeddings.token_embedding = nn.Embedding(9, 4)
        tower.embeddings.register_buffer("position_ids", torch.arange(77).expand((1, -1)), persistent=False)
        tower.final_layer_norm = nn.LayerNorm(4)
        if nested:
            self.text_model = tower


# --- writing and reading ---------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    path = tmp_path / "new folder" / UNET_FILE
    save(unet.state_dict(), path, {"author": "me"})
    assert [p.name for p in path.parent.iterdir()] == [UNET_FILE]  # no temporary file stays
    copy = on_meta(UNet2DConditionModel, TINY_UNET)
    load_into(copy, path)
    assert same(unet.state_dict(), copy.state_dict())
    assert read_header(path).metadata == {"format": "pt", "author": "me"}
    assert same(load_file(path), unet.state_dict())  # the safetensors package agrees


def test_dtype_is_kept_or_cast(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    half = {key: value.to(torch.bfloat16) for key, value in unet.state_dict().items()}
    save(half, tmp_path / "half.safetensors")
    for asked, gets in [(None, torch.bfloat16), (torch.float32, torch.float32)]:
        copy = on_meta(UNet2DConditionModel, TINY_UNET)
        load_into(copy, tmp_path / "half.safetensors", torch_dtype=asked)
        assert {p.dtype for p in copy.parameters()} == {gets}
        assert torch.equal(copy.conv_in.weight.float(), half["conv_in.weight"].float())


def test_save_takes_any_tensor_and_gives_the_same_bytes(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "strided": base.T,
        "view": base[1:3],
        "again": base,
        "half": base.half(),
        "bf16": base.bfloat16(),
        "scalar": torch.tensor(3.0),
        "int": torch.arange(3),
        "none": torch.zeros(0, 2),
    }
    metadata = {letter: "x" for letter in "abcdefgh"}
    save(tensors, tmp_path / "a.safetensors", metadata)
    save(dict(reversed(tensors.items())), tmp_path / "b.safetensors", metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert same(load_file(tmp_path / "a.safetensors"), tensors)
    assert same(read_header(tmp_path / "a.safetensors").read(), tensors)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save({"a": torch.ones(3)}, path)
    old = path.read_bytes()
    with pytest.raises(NotImplementedError):
        save({"a": torch.ones(3), "b": torch.ones(3, device="meta")}, path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_named_by_the_path(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            save({"a": torch.ones(500)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "x.safetensors") and not any(tmp_path.iterdir())


def test_finding_the_weight_file(tmp_path: Path) -> None:
    assert find_weights(tmp_path / "x") == tmp_path / "x"  # the file itself
    with pytest.raises(WeightsError, match="has no .safetensors file"):
        find_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(WeightsError, match="split over several files"):
        find_weights(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"only as a pickle \(diffusion_pytorch_model.bin\).*\.safetensors"):
        find_weights(tmp_path)
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match="split over several files"):
        find_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match="has several weight files, a.safetensors, b.safetensors: name one of them"):
        find_weights(tmp_path)
    assert find_weights(tmp_path, ["c.safetensors", "b.safetensors"]).name == "b.safetensors"
    (tmp_path / "b.safetensors").unlink()
    assert find_weights(tmp_path).name == "a.safetensors"  # the only one
    for name in ("model.fp16.safetensors", "model.safetensors", "diffusion_pytorch_model.fp16.safetensors", UNET_FILE):
        (tmp_path / name).touch()
        assert find_weights(tmp_path).name == name


# --- damaged and foreign files ---------------------------------------------------------------------------------------


def good_file() -> bytes:
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


def twice() -> bytes:
    """safetensors' own reader takes this one, and gives the second tensor."""
    entry = '"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}'
    text = f"{{{entry},{entry}}}".encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


BROKEN = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-LFS pointer"),
    "zip": (b"PK\x03\x04archive/data.pkl", "PyTorch pickle"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P", "Python pickle"),
    "page": (b"<!DOCTYPE html><html>", "web page"),
    "gguf": (b"GGUF\x03\x00\x00\x00\x00\x00", "GGUF"),
    "text": (b"hello, I am a text", "not a safetensors file"),
    "three bytes": (b"abc", "not a safetensors file"),
    "long header": (struct.pack("<Q", 2**40) + b"{" + bytes(99), "damaged or cut off"),
    "cut in header": (good_file()[:40], "damaged or cut off .*invalid header length"),
    "cut in data": (good_file()[:-1], "damaged or cut off .*not fully covered"),
    "trailing": (good_file() + b"x", "damaged or cut off .*not fully covered"),
    "not json": (struct.pack("<Q", 4) + b"{,,}", "damaged or cut off .*JSON"),
    "not utf-8": (struct.pack("<Q", 4) + b"{\xff\xff}", "damaged or cut off"),
    "strange dtype": (with_header({"a": {"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}}), "a is of type F4"),
    "unknown dtype": (with_header({"a": {"dtype": "X1", "shape": [6], "data_offsets": [0, 24]}}), "damaged or cut off"),
    "wrong size": (with_header({"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]}}), "damaged or cut off"),
    "no shape": (with_header({"a": {"dtype": "F32"}}), "damaged or cut off .*missing field `shape`"),
    "no entry": (with_header({"a": 3}), "damaged or cut off"),
    "infinite": (with_header({"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 24]}}), "damaged or cut off"),
    "negative": (with_header({"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}), "damaged or cut off"),
    "words": (with_header({"a": {"dtype": "F32", "shape": ["6"], "data_offsets": [0, 24]}}), "damaged or cut off"),
    "deep": (struct.pack("<Q", 500_000) + b'{"a":' * 100_000, "damaged or cut off"),
    "twice": (twice(), "a name stands in its header twice"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}), "damaged or cut off"),
    "metadata": (with_header({"__metadata__": 3}), "damaged or cut off"),
}


def test_the_good_file_is_good(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(good_file())
    assert read_header(tmp_path / "x.safetensors").read()["a"].shape == (2, 3)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named_for_what_they_are(tmp_path: Path, kind: str) -> None:
    content, message = BROKEN[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_overlapping_tensors_are_damage(tmp_path: Path) -> None:
    """The sizes add up, the places do not."""
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    (tmp_path / "x.safetensors").write_bytes(with_header({"a": entry, "b": entry}))
    with pytest.raises(WeightsError, match="damaged or cut off"):
        read_header(tmp_path / "x.safetensors")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="is a folder"):
        read_header(tmp_path)


def test_what_is_there_and_is_no_ordinary_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    says = {"pipe": "is no ordinary file", "loop": "leads nowhere: a link", "link": "leads nowhere: a link"}
    for name, what in says.items():
        with pytest.raises(WeightsError, match=f"{name} {what}"):
            read_header(tmp_path / name)
    with pytest.raises(WeightsError, match="/dev/zero is no ordinary file"):
        read_header("/dev/zero")


# --- strictness ------------------------------------------------------------------------------------------------------


def test_misfits_are_named_with_what_the_file_looks_like(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    state = dict(unet.state_dict())
    del state["conv_out.bias"]
    state["surplus.weight"] = torch.ones(2)
    state["conv_in.weight"] = torch.ones(16, 9, 3, 3)
    state["conv_in.bias"] = torch.ones(16, dtype=torch.int64)
    save(state, tmp_path / UNET_FILE)
    copy = on_meta(UNet2DConditionModel, TINY_UNET)
    with pytest.raises(WeightsError) as error:
        load_into(copy, tmp_path / UNET_FILE)
    message = str(error.value)
    assert "inpainting U-Net in the diffusers layout" in message
    assert "1 missing: conv_out.bias" in message
    assert "1 not in the model: surplus.weight" in message
    assert "conv_in.weight is (16, 9, 3, 3), in the model (16, 4, 3, 3)" in message
    assert "conv_in.bias is torch.int64" in message
    assert copy.conv_in.weight.is_meta  # nothing was read


def test_at_most_ten_keys_are_listed(tmp_path: Path, vae: AutoencoderKL) -> None:
    save(vae.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match="looks like a VAE in the diffusers layout") as error:
        load_into(on_meta(UNet2DConditionModel, TINY_UNET), tmp_path / "vae.safetensors")
    assert max(len(line.split(", ")) for line in str(error.value).splitlines()) == 11  # ten and the ellipsis


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensors_are_refused_by_name(tmp_path: Path, unet: UNet2DConditionModel, value: float) -> None:
    state = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    state["conv_out.weight"][1, 2, 0, 0] = value
    save(state, tmp_path / UNET_FILE)
    with pytest.raises(WeightsError, match="conv_out.weight has NaN or infinite"):
        load_into(on_meta(UNet2DConditionModel, TINY_UNET), tmp_path / UNET_FILE)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_has_nan_too(tmp_path: Path, dtype: torch.dtype) -> None:
    save({"a": torch.ones(3).to(dtype)}, tmp_path / "good.safetensors")
    assert read_header(tmp_path / "good.safetensors").read()["a"].float().tolist() == [1, 1, 1]
    save({"a": torch.tensor([1.0, float("nan")]).to(dtype)}, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match="a has NaN or infinite"):
        read_header(tmp_path / "bad.safetensors").read()


def test_a_number_that_the_asked_dtype_cannot_hold(tmp_path: Path) -> None:
    save({"weight": torch.full((2, 2), 1e6), "bias": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"weight has NaN or infinite values \(as torch.float16\)"):
        load_into(nn.Linear(2, 2), tmp_path / "x.safetensors", torch_dtype=torch.float16)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_vae_attention_names(tmp_path: Path, vae: AutoencoderKL, as_convolution: bool) -> None:
    old = {}
    for key, value in vae.state_dict().items():
        for before, now in keymaps.OLD_VAE_ATTENTION.items():
            key = key.replace(f"mid_block.attentions.0.{now}.", f"mid_block.attentions.0.{before}.")
        is_weight = "attentions.0" in key and value.ndim == 2
        old[key] = value[:, :, None, None] if is_weight and as_convolution else value
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    save(old, tmp_path / UNET_FILE)
    copy = on_meta(AutoencoderKL, TINY_VAE)
    load_into(copy, tmp_path / UNET_FILE)
    assert same(vae.state_dict(), copy.state_dict())


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("in_model", [True, False])
def test_clip_keys_of_either_transformers(tmp_path: Path, in_file: bool, in_model: bool) -> None:
    source = TinyText(in_file)
    prefix = "text_model." if in_file else ""
    ids = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}
    save(source.state_dict() | ids, tmp_path / "model.safetensors")
    target = TinyText(in_model).to("meta")
    load_into(target, tmp_path / "model.safetensors")
    assert same(*({keymaps.modern(key): value for key, value in m.state_dict().items()} for m in (source, target)))
    tower = target.text_model if in_model else target
    assert torch.equal(tower.embeddings.position_ids, torch.arange(77)[None])  # no file holds it


# --- the LDM single file ---------------------------------------------------------------------------------------------


def test_single_file_round_trip(tmp_path: Path, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    path, text = tmp_path / "model.safetensors", TinyText(nested=False)
    save(ldm_tensors(unet, vae, text), path)
    tensors = load_file(path)
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in tensors
    extra = {
        "betas": torch.zeros(1000),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    save_file(tensors | extra, path)
    parts = split_single_file(read_header(path), TINY_UNET, TINY_VAE)
    copies = on_meta(UNet2DConditionModel, TINY_UNET), on_meta(AutoencoderKL, TINY_VAE), TinyText(nested=True)
    for copy, part in zip(copies, parts.values(), strict=True):
        load_into(copy, part)
    assert same(unet.state_dict(), copies[0].state_dict()) and same(vae.state_dict(), copies[1].state_dict())
    assert torch.equal(copies[2].text_model.final_layer_norm.weight, text.final_layer_norm.weight)


LEFT = {  # by training; and what is said of it
    "model_ema.diffusion_modelinput_blocks00weight": "model_ema (2 tensors)",
    "model_ema.decay": "model_ema (2 tensors)",
    "loss.logvar": "loss",
    "first_stage_model.loss.discriminator.main.0.weight": "first_stage_model.loss",
    "embedding_manager.string_to_param_dict.*": "embedding_manager",
    "cond_stage_model.transformer.logit_scale": "cond_stage_model.transformer.logit_scale",
    "cond_stage_model.transformer.text_projection.weight": "cond_stage_model.transformer.text_projection.weight",
    "denoiser.sigmas": "denoiser",
    "global_step": "global_step",
    "alphas_cumprod": "",  # in every old file
    "cond_stage_model.transformer.text_model.embeddings.position_ids": "",
}


def test_what_training_left_is_named_once(tmp_path: Path, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    save(ldm_tensors(unet, vae, TinyText(nested=False)), path := tmp_path / "model.safetensors")
    save(load_file(path) | {key: torch.ones(2) for key in LEFT}, path)
    with pytest.warns(UserWarning) as warned:
        parts = split_single_file(read_header(path), TINY_UNET, TINY_VAE)
    said = f"{path}: not needed for drawing, and left out: "
    assert [str(warning.message) for warning in warned] == [said + ", ".join(sorted(set(filter(None, LEFT.values()))))]
    copy = on_meta(AutoencoderKL, TINY_VAE)
    load_into(copy, parts["vae"])
    assert same(vae.state_dict(), copy.state_dict())


def test_what_training_left_in_a_folder(tmp_path: Path) -> None:
    tower, left = TinyText(nested=True), {"logit_scale": torch.ones(1), "text_projection.weight": torch.ones(4, 4)}
    save(tower.state_dict() | left, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="left out: logit_scale, text_projection.weight"):
        load_into(copy := TinyText(nested=True), tmp_path / "x.safetensors")
    assert same(tower.state_dict(), copy.state_dict())


def test_other_single_files_are_refused_by_name(tmp_path: Path) -> None:
    path, one = tmp_path / "x.safetensors", torch.zeros(1)
    unet, vae = {"model.diffusion_model.out.0.bias": one}, {"first_stage_model.quant_conv.bias": one}
    text = {"cond_stage_model.transformer.text_model.final_layer_norm.bias": one}
    for tensors, message in [
        (unet | vae | {"conditioner.embedders.0.x": one}, "looks like an SDXL single file"),
        (vae, "looks like a VAE in the LDM layout(.|\n)*2 parts missing"),
        (unet | vae | text | {"control_model.x": one}, "1 unknown: control_model.x"),
    ]:
        save(tensors, path)
        with pytest.raises(WeightsError, match=message):
            split_single_file(read_header(path))


def test_an_inpainting_checkpoint_is_named(tmp_path: Path, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    path = tmp_path / "x.safetensors"
    save(ldm_tensors(unet, vae, TinyText(nested=False)), path)
    nine = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
    save(load_file(path) | nine, path)
    with pytest.raises(WeightsError, match="inpainting single file in the LDM layout"):
        load_into(on_meta(UNet2DConditionModel, TINY_UNET), split_single_file(read_header(path), TINY_UNET, TINY_VAE)["unet"])


# --- large files -------------------------------------------------------------------------------------------------------


def with_a_nan(folder: Path, part: str, end: str) -> None:
    """Break one number of the first tensor whose name ends so."""
    path = find_weights(folder / part)
    tensors = read_header(path).read()
    name = next(name for name in tensors if name.endswith(end))
    tensors[name].view(-1)[0] = float("nan")
    save(tensors, path)


@pytest.mark.parametrize(
    ("part", "end", "told"),
    [
        ("unet", "mid_block.resnets.0.conv1.weight", "NaN or infinity comes out of the U-Net"),
        ("vae", "decoder.conv_in.bias", "NaN or infinity comes out of the VAE"),
        ("text_encoder", "final_layer_norm.weight", "NaN or infinity comes out of the text encoder"),
    ],
)
def test_a_nan_in_a_large_file_is_named_when_it_is_used(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, end: str, told: str
) -> None:
    """Small files are looked at when they are read, and large ones, which are only mapped, when something is drawn."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    with_a_nan(folder, part, end)
    with pytest.raises(WeightsError, match="NaN or infinite values"):
        StableDiffusionPipeline.from_pretrained(folder)
    monkeypatch.setattr(weights, "LARGE", 0)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(MinidiffError, match=told):
        pipe("a photo of a red dog", num_inference_steps=1, seed=0)
    file = read_header(find_weights(folder / part))
    with pytest.raises(WeightsError, match="NaN or infinite values"):  # cast, so every number is in hand anyway
        file.read(torch.float64, mapped=True)
    with pytest.raises(WeightsError, match="NaN or infinite values"):  # to be written into another file
        file.read()
