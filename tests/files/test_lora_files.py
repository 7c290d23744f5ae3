"""LoRA files: every dialect comes in and goes out with its ΔW, and what does not fit is refused with a reason."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_sizes import TINY_UNET
from torch import Tensor, nn

from minidiff.core.errors import AdapterError, WeightsError
from minidiff.core.inject import adaptable_layers, adapter_names, adapter_weights, inject, lora_layers
from minidiff.core.lora import LoRAWeights
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files import lora_file as lora
from minidiff.files import names as keymaps
from minidiff.files.lora_file import FILE_NAME, PEFT_FILE, LoRAFile, attach, load_lora, read_lora, save_lora
from minidiff.files.lora_names import PEFT_CONFIG
from minidiff.files.weights import read_header, save
from minidiff.files.word_file import read_embedding, save_embedding

DOWN = "down_blocks.0.attentions.0"
WRITTEN = ("diffusers", "kohya", "peft")
TO_K = f"{DOWN}.transformer_blocks.0.attn2.to_k"  # (16, 24) in the tiny U-Net
TEXT_Q = "encoder.layers.0.self_attn.q_proj"
GOOD = {f"unet.{TO_K}.lora_A.weight": (2, 24), f"unet.{TO_K}.lora_B.weight": (16, 2)}
KOHYA = f"lora_unet_{TO_K.replace('.', '_')}"
Modules = Mapping[str, LoRAWeights]


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(TINY_UNET)


class TinyText(nn.Module):
    """The names of CLIP's layers as in transformers 4, one level down in `text_model`; or as in 5."""

    def __init__(self, old: bool = False) -> None:
        super().__init__()
        attention = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        mlp = nn.ModuleDict({"fc1": nn.Linear(24, 48), "fc2": nn.Linear(48, 24)})
        layer = nn.ModuleDict({"self_attn": attention, "mlp": mlp})
        encoder = nn.ModuleDict({"layers": nn.ModuleList([layer])})
        if old:
            self.text_model = nn.ModuleDict({"encoder": encoder})
        else:
            self.encoder = encoder


def tiny_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": UNet2DConditionModel(TINY_UNET), "text_encoder": TinyText()}


def layers_of(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every W that can be adapted, by its name in an adapter."""
    return {f"{part}.{n}": m.weight for part, model in models.items() for n, m in adaptable_layers(model).items()}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def an_adapter(Ws: Mapping[str, Tensor], dora: bool = False) -> dict[str, LoRAWeights]:
    """Ranks 2 and 3 by turns, and scales that are neither 1 nor whole."""
    made = {}
    for i, (name, W) in enumerate(Ws.items()):
        rank = 2 + i % 2
        rows = (len(W), *[1] * (W.ndim - 1))
        m = W.detach().flatten(1).norm(dim=1).reshape(rows) + 0.1 * drawn(*rows, seed=3 * i + 2).abs() if dora else None
        A, B = drawn(rank, *W.shape[1:], seed=3 * i), 0.1 * drawn(len(W), rank, seed=3 * i + 1)
        made[name] = LoRAWeights(A, B, 8 / rank**0.5 if i % 3 else 0.7, m)
    return made


def largest_change(before: Modules, after: Modules, Ws: Mapping[str, Tensor]) -> float:
    """max |ΔW_before − ΔW_after|"""
    assert before.keys() == after.keys()
    return max((before[name].delta(Ws[name]) - after[name].delta(Ws[name])).abs().max().item() for name in before)


def run(unet: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500]), torch.randn(1, 7, 24, generator=g))


def trained(rank: int, alpha: float) -> dict[str, LoRAWeights]:
    unet = tiny_unet()
    inject(unet, rank, alpha)
    weights = adapter_weights(unet)
    return {f"unet.{n}": replace(w, B=0.1 * drawn(*w.B.shape, seed=i)) for i, (n, w) in enumerate(weights.items())}


def load(unet: nn.Module, path: Path, adapter_name: str = "default", weight_name: str | None = None) -> LoRAFile:
    return load_lora({"unet": unet}, path, adapter_name, weight_name)


def write(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: dict | None = None, name: str = FILE_NAME) -> Path:
    metadata = {} if config is None else {"lora_adapter_metadata": json.dumps(config)}
    save({key: torch.ones(shape) for key, shape in shapes.items()}, folder / name, metadata)
    return folder / name


# --- round trips -----------------------------------------------------------------------------------------------------


def as_a2(modules: Modules) -> dict[str, Tensor]:
    """What the SD 1.5 scripts write: the old names, and the new ones for convolutions. Its scale is 1."""
    tensors = {}
    for name, w in modules.items():
        part, _, path = name.partition(".")
        halves = ("lora_A", "lora_B") if w.A.ndim == 4 else ("lora.down", "lora.up")
        if part == "text_encoder":
            path, halves = f"text_model.{path}", ("lora_linear_layer.down", "lora_linear_layer.up")
        tensors |= {f"{part}.{path}.{half}.weight": t for half, t in zip(halves, halves_of(w), strict=True)}
    return tensors


def as_b(modules: Modules) -> dict[str, Tensor]:
    """Attention only."""
    tensors = {}
    for name, w in modules.items():
        path = name.removeprefix("unet.").removesuffix(".0")
        for old, new in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
            path = path.replace(f"self_attn.{old}", f"self_attn.{new}")
        path = path.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")
        tensors |= {f"{path}_lora.{half}.weight": t for half, t in zip(("down", "up"), halves_of(w), strict=True)}
    return tensors


def as_f(modules: Modules) -> dict[str, Tensor]:
    table = keymaps.unet_table(TINY_UNET)
    tensors = {}
    for name, w in modules.items():
        stem = "lora_unet_" + keymaps.rename(name.removeprefix("unet."), table).replace(".", "_")
        tensors |= {f"{stem}.lora_{half}.weight": t for half, t in zip(("down", "up"), halves_of(w), strict=True)}
        tensors[f"{stem}.alpha"] = torch.tensor(w.scale * w.rank)
    return tensors


def as_comfyui(modules: Modules) -> dict[str, Tensor]:
    """LDM's names with dots, kohya's parts."""
    table, tensors = keymaps.unet_table(TINY_UNET), {}
    for name, w in modules.items():
        part, _, path = name.partition(".")
        text = f"text_encoders.clip_l.transformer.text_model.{path}"
        stem = f"diffusion_model.{keymaps.rename(path, table)}" if part == "unet" else text
        tensors |= {f"{stem}.lora_{half}.weight": t for half, t in zip(("down", "up"), halves_of(w), strict=True)}
        tensors[f"{stem}.alpha"] = torch.tensor(w.scale * w.rank)
    return tensors


def as_onetrainer(modules: Modules) -> dict[str, Tensor]:
    """kohya's names with dots in place of underscores."""
    starts = {"unet": "lora_unet", "text_encoder": "lora_te.text_model"}
    tensors = {}
    for name, w in modules.items():
        part, _, path = name.partition(".")
        tensors |= {f"{starts[part]}.{path}.lora_{h}.weight": t for h, t in zip(("down", "up"), halves_of(w), strict=True)}
        tensors[f"{starts[part]}.{path}.alpha"] = torch.tensor(w.scale * w.rank)
    return tensors


def as_save_lora_adapter(modules: Modules) -> dict[str, Tensor]:
    """Nothing before the path of the layer."""
    pairs = {name.removeprefix("unet."): halves_of(w) for name, w in modules.items()}
    return {f"{path}.lora_{half}.weight": t for path, pair in pairs.items() for half, t in zip("AB", pair, strict=True)}


SAY_ALPHA = {as_f: "kohya", as_comfyui: "ComfyUI", as_onetrainer: "OneTrainer"}


def halves_of(w: LoRAWeights) -> tuple[Tensor, Tensor]:
    return w.A, w.B.reshape(*w.B.shape, *[1] * (w.A.ndim - 2))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("last", WRITTEN)
@pytest.mark.parametrize("first", WRITTEN)
def test_from_every_dialect_to_every_dialect(tmp_path: Path, first: str, last: str, dora: bool) -> None:
    models = tiny_models()
    Ws = layers_of({"unet": models["unet"]} if "peft" in (first, last) else models)
    made = an_adapter(Ws, dora)
    between = read_lora(save_lora(made, tmp_path / "first", first))
    after = read_lora(save_lora(between.modules, tmp_path / "last", last, metadata=between.metadata))
    assert (between.dialect, after.dialect) == (first, last) and between.alpha_known and after.alpha_known
    assert largest_change(made, after.modules, Ws) <= 1e-6
    load_lora(models, tmp_path / "last")
    for name, layer in ((f"{p}.{n}", layer) for p, model in models.items() for n, layer in lora_layers(model).items()):
        torch.testing.assert_close(layer.delta(), made[name].delta(Ws[name]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("last", WRITTEN)
@pytest.mark.parametrize("first", [as_a2, as_b, as_f, as_comfyui, as_onetrainer, as_save_lora_adapter])
def test_from_the_dialects_that_are_only_read(tmp_path: Path, first: object, last: str) -> None:
    unet_only = last == "peft" or first in (as_f, as_save_lora_adapter)
    Ws = layers_of({"unet": tiny_unet()} if unet_only else tiny_models())
    if first is as_b:
        Ws = {name: W for name, W in Ws.items() if "attn" in name}
    made = an_adapter(Ws)
    if first not in SAY_ALPHA:
        made = {name: replace(w, scale=1.0) for name, w in made.items()}
    save(first(made), tmp_path / "old.safetensors")
    old = read_lora(tmp_path / "old.safetensors", config=TINY_UNET)
    assert old.alpha_known == (first in SAY_ALPHA) and old.dialect == SAY_ALPHA.get(first, old.dialect)
    new = read_lora(save_lora(old.modules, tmp_path / "new", last))
    assert largest_change(made, new.modules, Ws) <= 1e-6


@pytest.mark.parametrize("torch_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dialect", WRITTEN)
def test_half_precision_keeps_the_scale_exact(tmp_path: Path, dialect: str, torch_dtype: torch.dtype) -> None:
    made = an_adapter(layers_of({"unet": tiny_unet()}))
    path = save_lora(made, tmp_path / "half", dialect, torch_dtype)
    assert {info.dtype for key, info in read_header(path).tensors.items() if ".alpha" not in key} == {torch_dtype}
    back = read_lora(path).modules
    for name, w in made.items():
        assert back[name].scale == pytest.approx(w.scale, rel=1e-6)
        assert torch.equal(back[name].A, w.A.to(torch_dtype).float()) and back[name].A.dtype == torch.float32


@pytest.mark.parametrize("torch_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_cast_up(tmp_path: Path, torch_dtype: torch.dtype) -> None:
    made = an_adapter({f"unet.{TO_K}": torch.ones(16, 24)})
    file = read_lora(save_lora(made, tmp_path, "kohya"))
    tensors = {key: tensor.to(torch_dtype) for key, tensor in load_file(file.path).items()}
    save(tensors, file.path)
    loaded = load(unet := tiny_unet(), file.path)
    w = made[f"unet.{TO_K}"]
    A, B = w.A.to(torch_dtype).float(), w.B.to(torch_dtype).float()
    scale = torch.tensor(w.scale * w.rank).to(torch_dtype).item() / w.rank
    assert loaded.scales == {f"unet.{TO_K}": scale}
    torch.testing.assert_close(lora_layers(unet)[TO_K].delta(), scale * B @ A)


def test_fp16_that_overflows_is_refused(tmp_path: Path) -> None:
    made = trained(2, 2)
    name = next(iter(made))
    made[name] = replace(made[name], B=made[name].B * 1e7)
    with pytest.raises(AdapterError, match="its up has numbers that are not finite as torch.float16; write it as fp32"):
        save_lora(made, tmp_path, torch_dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "alpha"), [(2, 2), (2, 8), (3, 1), (4, 0.3)])
def test_save_and_load_gives_the_same_bits(tmp_path: Path, rank: int, alpha: float) -> None:
    made, unet, copy = trained(rank, alpha), tiny_unet(), tiny_unet()
    attach(unet, {name.removeprefix("unet."): w for name, w in made.items()})
    path = save_lora(made, tmp_path)
    loaded = load(copy, tmp_path)
    assert torch.equal(run(unet), run(copy)) and not torch.allclose(run(copy), run(tiny_unet()), atol=1e-4)
    assert path == loaded.path == tmp_path / FILE_NAME
    assert set(loaded.scales.values()) == {alpha / rank} and set(loaded.ranks.values()) == {rank}
    assert f"diffusers style, 32 layers, rank {rank}, alpha/r {alpha / rank:g}" in str(loaded)


def test_one_line_for_people(tmp_path: Path) -> None:
    made = an_adapter(layers_of(tiny_models()), dora=True)
    line = str(read_lora(save_lora(made, tmp_path, "kohya")))
    assert (
        line
        == f"{tmp_path / FILE_NAME}: kohya style, DoRA, 89 layers (6 of the text encoder), rank 2 to 3, alpha/r 0.7 to 5.65685"
    )


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (save_lora(trained(2, 8), tmp_path / name).read_bytes() for name in "ab")
    assert first == second


def test_several_files_in_one_model(tmp_path: Path) -> None:
    save_lora(trained(2, 8), tmp_path / "dog")
    save_lora(trained(3, 3), tmp_path / "style.safetensors")
    unet = tiny_unet()
    load(unet, tmp_path / "dog", adapter_name="dog")
    load(unet, tmp_path, adapter_name="style", weight_name="style.safetensors")
    assert adapter_names(unet) == ["dog", "style"]
    assert all(layer.strength == {"dog": 0.0, "style": 1.0} for layer in lora_layers(unet).values())
    with pytest.raises(AdapterError, match="is there already"):
        load(unet, tmp_path / "dog", adapter_name="dog")


def test_a_file_for_the_unet_switches_off_the_text_encoders_adapters(tmp_path: Path) -> None:
    """ "Alone" means in all networks."""
    models = tiny_models()
    load_lora(models, save_lora(an_adapter(layers_of(models)), tmp_path / "both"), "both")
    load_lora(models, save_lora(trained(2, 8), tmp_path / "dog"), "dog")
    assert all(layer.strength == {"both": 0.0} for layer in lora_layers(models["text_encoder"]).values())


@pytest.mark.parametrize("old", [False, True], ids=["transformers 5", "transformers 4"])
def test_text_encoders_of_both_layouts(tmp_path: Path, old: bool) -> None:
    made = an_adapter({f"text_encoder.{TEXT_Q}": torch.zeros(24, 24)})
    path = save_lora(made, tmp_path)
    assert f"text_encoder.text_model.{TEXT_Q}.lora_A.weight" in load_file(path)
    text_encoder = TinyText(old)
    load_lora({"unet": tiny_unet(), "text_encoder": text_encoder}, path)
    (layer,) = lora_layers(text_encoder).values()
    torch.testing.assert_close(layer.delta(), made[f"text_encoder.{TEXT_Q}"].delta(torch.zeros(24, 24)))


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_diffusers_style(tmp_path: Path) -> None:
    made = trained(2, 8)
    path = save_lora(made, tmp_path / "dog.safetensors", metadata={"instance_prompt": "a sks dog"})
    assert load_file(path).keys() == {f"{name}.lora_{half}.weight" for name in made for half in "AB"}
    metadata = read_header(path).metadata
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["unet.r"] == 2 and config["unet.lora_alpha"] == 8 and type(config["unet.lora_alpha"]) is int
    assert config["unet.target_modules"] == [name.removeprefix("unet.") for name in made]
    assert metadata["format"] == "pt" and metadata["instance_prompt"] == "a sks dog"


def test_the_kohya_style(tmp_path: Path) -> None:
    """alpha = scale · r for every module, of no axes; no table of diffusers', which would not load with it."""
    made = an_adapter(layers_of(tiny_models()))
    path = save_lora(made, tmp_path, "kohya", metadata={"lora_adapter_metadata": "{}", "ss_seed": "3"})
    tensors, metadata = load_file(path), read_header(path).metadata
    assert len(tensors) == 3 * len(made)
    assert tensors[f"{KOHYA}.alpha"].shape == ()
    assert tensors[f"{KOHYA}.alpha"].item() == pytest.approx(made[f"unet.{TO_K}"].scale * made[f"unet.{TO_K}"].rank)
    assert tensors[f"lora_unet_{DOWN.replace('.', '_')}_proj_in.lora_up.weight"].ndim == 4
    assert metadata.keys() == {"format", "ss_seed", "ss_network_module", "ss_network_dim", "ss_network_alpha"}
    alike = save_lora(trained(2, 8), tmp_path / "alike", "kohya")
    assert read_header(alike).metadata["ss_network_dim"] == "2" and read_header(alike).metadata["ss_network_alpha"] == "8"


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
def test_what_is_said_about_an_adapter_is_kept(tmp_path: Path, dialect: str) -> None:
    path = save_lora(trained(2, 2), tmp_path / "dog", dialect, metadata={"modelspec.trigger_phrase": "sks dog"})
    assert read_lora(path.parent).metadata["modelspec.trigger_phrase"] == "sks dog"


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_no_folder_is_called_as_other_programs_files_are(tmp_path: Path, ending: str) -> None:
    with pytest.raises(WeightsError, match=f"dog{ending}: minidiff writes no {ending} files; name a .safetensors file"):
        save_lora(trained(2, 2), tmp_path / f"dog{ending}")
    assert not any(tmp_path.iterdir())


def test_the_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = save_lora(trained(2, 2), tmp_path / "dog"), []
    monkeypatch.setattr(lora, "read_header", lambda file: read.append(file) or read_header(file))
    load(tiny_unet(), path)
    assert read == [path]


def test_the_peft_folder(tmp_path: Path) -> None:
    made = trained(2, 8)
    path = save_lora(made, tmp_path / "dog", "peft", metadata={"base_model": "sd15"})
    assert path == tmp_path / "dog" / PEFT_FILE
    config = json.loads((tmp_path / "dog" / PEFT_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 8, "sd15")
    assert load_file(path).keys() == {f"base_model.model.{n.removeprefix('unet.')}.lora_{x}.weight" for n in made for x in "AB"}


def test_what_a_dialect_cannot_hold(tmp_path: Path) -> None:
    Ws = layers_of(tiny_models())
    some, dora = an_adapter(Ws), an_adapter(Ws, dora=True)
    columns = replace(dora[f"unet.{TO_K}"], magnitude=torch.ones(1, 24))
    for modules, dialect, message in (
        (some, "peft", "a peft folder holds the adapter of one network"),
        (some | {f"unet.{TO_K}": dora[f"unet.{TO_K}"]}, "diffusers", "1 of 83 modules are DoRA and the others plain LoRA"),
        ({f"unet.{TO_K}": columns}, "diffusers", "measures the columns of W, and diffusers knows only rows"),
        ({}, "kohya", "there is no adapter to save"),
    ):
        with pytest.raises(AdapterError, match=message):
            save_lora(modules, tmp_path / "x", dialect)
    with pytest.raises(AdapterError, match="peft's adapters are folders"):
        save_lora(trained(2, 2), tmp_path / "x.safetensors", "peft")
    assert not list(tmp_path.iterdir())


# --- convolutions and DoRA as other programs write them --------------------------------------------------------------


def test_tucker_convolution(tmp_path: Path) -> None:
    """FORMATS 3.1: ΔW = einsum("mn..,im,nj->ij..", mid, up, down), scale alpha / r."""
    path, W = "down_blocks.0.resnets.0.conv1", torch.zeros(16, 16, 3, 3)
    stem = f"lora_unet_{path.replace('.', '_')}"
    down, up, mid = drawn(3, 16, 1, 1, seed=0), drawn(16, 3, 1, 1, seed=1), drawn(3, 3, 3, 3, seed=2)
    halves = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid, "alpha": torch.tensor(6.0)}
    save({f"{stem}.{part}": tensor for part, tensor in halves.items()}, tmp_path / "x.safetensors")
    wanted = 2.0 * torch.einsum("mnhw,im,nj->ijhw", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    file = read_lora(tmp_path / "x.safetensors")
    torch.testing.assert_close(file.modules[f"unet.{path}"].delta(W), wanted, atol=1e-5, rtol=1e-5)
    again = read_lora(save_lora(file.modules, tmp_path, "diffusers"))  # folded, it is a plain pair for any dialect
    torch.testing.assert_close(again.modules[f"unet.{path}"].delta(W), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flat_in_file", [False, True])
def test_1x1_convolutions_with_two_axes_and_with_four(tmp_path: Path, flat_in_file: bool) -> None:
    """A file may hold them either way; the model decides. A linear layer's may have four axes, too."""
    stem = f"lora_unet_{DOWN.replace('.', '_')}_proj_in"
    A, B = drawn(2, 16, seed=0), drawn(16, 2, seed=1)
    axes = "" if flat_in_file else (..., None, None)
    pair = {".lora_down.weight": A, ".lora_up.weight": B, ".dora_scale": torch.ones(16, 1)}
    tensors = {stem + part: tensor if axes == "" else tensor[axes] for part, tensor in pair.items()}
    tensors |= {f"{KOHYA}.lora_down.weight": drawn(2, 24, 1, 1, seed=2), f"{KOHYA}.lora_up.weight": drawn(16, 2, seed=3)}
    save(tensors, tmp_path / "x.safetensors")
    unet = tiny_unet()
    load(unet, tmp_path / "x.safetensors")
    conv, linear = lora_layers(unet)[f"{DOWN}.proj_in"], lora_layers(unet)[TO_K]
    assert conv.weights("default").A.shape == (2, 16, 1, 1) and conv.weights("default").magnitude.shape == (16, 1, 1, 1)
    assert linear.weights("default").A.shape == (2, 24)
    run(unet)


RES = "lora_unet_up_blocks_1_resnets_0_conv1"  # (16, 48, 3, 3) in the tiny U-Net
MAGNITUDES = {  # file's shape -> minidiff's: rows are outputs, columns inputs
    (KOHYA, "dora_scale", (16, 1)): (16, 1),
    (KOHYA, "dora_scale", (1, 24)): (1, 24),
    (KOHYA, "dora_scale", (16,)): (16, 1),
    (RES, "dora_scale", (16, 1, 1, 1)): (16, 1, 1, 1),
    (RES, "dora_scale", (1, 48, 1, 1)): (1, 48, 1, 1),
    (RES, "dora_scale", (1, 16, 1, 1)): (16, 1, 1, 1),  # peft's shape, which is no length for columns here
    ("lora_unet_conv_square", "dora_scale", (1, 16, 1, 1)): (1, 16, 1, 1),  # both would fit: LyCORIS' meaning
    ("square", "lora_magnitude_vector", (1, 16, 1, 1)): (16, 1, 1, 1),  # and here peft's
    (f"unet.{TO_K}", "lora_magnitude_vector", (16,)): (16, 1),
}


@pytest.mark.parametrize("case", MAGNITUDES, ids=str)
def test_the_axis_of_dora(tmp_path: Path, case: tuple[str, str, tuple[int, ...]]) -> None:
    stem, name, shape = case
    A = {KOHYA: (2, 24), RES: (2, 48, 3, 3), f"unet.{TO_K}": (2, 24)}.get(stem, (2, 16, 3, 3))
    square = "down_blocks.0.resnets.0.conv1"
    stem = {"lora_unet_conv_square": f"lora_unet_{square.replace('.', '_')}", "square": f"unet.{square}"}.get(stem, stem)
    down, up = ("lora_down", "lora_up") if stem.startswith("lora_") else ("lora_A", "lora_B")
    path = write(tmp_path, {f"{stem}.{down}.weight": A, f"{stem}.{up}.weight": (16, 2), f"{stem}.{name}": shape})
    (weights,) = read_lora(path).modules.values()
    assert weights.magnitude is not None and weights.magnitude.shape == MAGNITUDES[case]
    load(tiny_unet(), path)


def test_dora_by_columns_survives_kohya(tmp_path: Path) -> None:
    Ws = layers_of({"unet": tiny_unet()})
    made = {}
    for i, (name, weights) in enumerate(an_adapter(Ws).items()):
        columns = drawn(1, Ws[name].shape[1], *[1] * (weights.A.ndim - 2), seed=i).abs() + 1
        made[name] = replace(weights, magnitude=columns)
    assert largest_change(made, read_lora(save_lora(made, tmp_path, "kohya")).modules, Ws) <= 1e-6


# --- where the scale comes from --------------------------------------------------------------------------------------


def test_without_metadata_alpha_is_the_rank_and_the_caller_is_told(tmp_path: Path) -> None:
    loaded = load(tiny_unet(), write(tmp_path, GOOD))
    assert loaded.scales == {f"unet.{TO_K}": 1.0} and not loaded.alpha_known
    assert "the file does not say" in str(loaded)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 8}, 4.0),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"attn2.to_k": 2}}, 4.0),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {r"attn[12]\.to_[kv]": 1}}, 0.5),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"o_k": 1}}, 4.0),  # not after a dot
        ({"text_encoder.r": 2, "text_encoder.lora_alpha": 8}, 1.0),  # nothing said of the U-Net
        ({"r": 2, "lora_alpha": 8}, 4.0),  # save_lora_adapter: one network
    ],
)
def test_scale_from_the_metadata(tmp_path: Path, config: dict, scale: float) -> None:
    assert load(tiny_unet(), write(tmp_path, GOOD, config)).scales == {f"unet.{TO_K}": pytest.approx(scale, rel=1e-12)}


@pytest.mark.parametrize("name", [f"text_model.{TEXT_Q}", TEXT_Q, "q_proj"])
def test_patterns_for_the_text_encoder_with_its_old_name_and_its_new(tmp_path: Path, name: str) -> None:
    config = {"text_encoder.r": 4, "text_encoder.lora_alpha": 8, "text_encoder.rank_pattern": {name: 2}}
    shapes = {f"text_encoder.text_model.{TEXT_Q}.lora_{x}.weight": s for x, s in (("A", (2, 24)), ("B", (24, 2)))}
    assert read_lora(write(tmp_path, shapes, config)).scales == {f"text_encoder.{TEXT_Q}": 4.0}


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 4.0), (0.0, 1.0), (None, 1.0)])
def test_kohyas_alpha(tmp_path: Path, alpha: float | None, scale: float) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": torch.ones(2, 24), f"{KOHYA}.lora_up.weight": torch.ones(16, 2)}
    save(tensors if alpha is None else tensors | {f"{KOHYA}.alpha": torch.tensor(alpha)}, tmp_path / FILE_NAME)
    file = read_lora(tmp_path)
    assert file.scales == {f"unet.{TO_K}": scale} and file.alpha_known == (alpha is not None)
    assert ("alpha is 0 in 1 layers, which stands for the rank" in str(file)) == (alpha == 0)


def test_pefts_plain_state_dict(tmp_path: Path) -> None:
    """Its names hold the adapter's own name, and two adapters are not one."""
    one = {f"base_model.model.{key[5:]}".replace(".weight", ".default.weight"): shape for key, shape in GOOD.items()}
    assert read_lora(write(tmp_path, one), alpha=6).scales == {f"unet.{TO_K}": 3.0}
    two = one | {key.replace("default", "other"): shape for key, shape in one.items()}
    with pytest.raises(AdapterError, match="has two tensors for one place"):
        read_lora(write(tmp_path, two), alpha=6)


def test_a_peft_folder_and_its_file_alone(tmp_path: Path) -> None:
    shapes = {f"base_model.model.{key[5:]}": shape for key, shape in GOOD.items()}
    path = write(tmp_path, shapes, name=PEFT_FILE)
    for where in (path, tmp_path):
        with pytest.raises(
            AdapterError, match="alpha is unknown, because adapter_config.json is not .* Name the whole folder, or give"
        ):
            load(tiny_unet(), where)
    assert read_lora(path, alpha=6).scales == {f"unet.{TO_K}": 3.0} and read_lora(path, alpha=6).alpha_known
    with pytest.raises(AdapterError, match="alpha is -1"):
        read_lora(path, alpha=-1)
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 8, "peft_type": "LORA"}))
    loaded = load(tiny_unet(), tmp_path)
    assert loaded.dialect == "peft" and loaded.scales == {f"unet.{TO_K}": 4.0} and loaded.alpha_known
    with pytest.raises(AdapterError, match="says its alpha itself; alpha= or --alpha is for files that do not"):
        read_lora(path, alpha=6)


# --- refused ---------------------------------------------------------------------------------------------------------

A, B = f"unet.{TO_K}.lora_A.weight", f"unet.{TO_K}.lora_B.weight"
STRANGER = {"unet.conv_in.x.lora_A.weight": (2, 3), "unet.conv_in.x.lora_B.weight": (3, 2)}
R2 = {"unet.r": 2, "unet.lora_alpha": 8}
REFUSED = {
    "no match": (STRANGER, None, "0 of 2 tensors match the U-Net"),
    "half a match": (
        GOOD | STRANGER,
        None,
        r"2 of 4 tensors match(.|\n)*2 without a layer: unet.conv_in.x.lora_A.weight, unet.c",
    ),
    "unknown names": ({"unet.a.lora_A.weight": (2, 3)}, None, "0 of 1 tensors match the U-Net"),
    "SD 2": (
        {A: (2, 1024), B: (16, 2)},
        None,
        r"for SD 2.x \(cross-attention width 1024\); this model needs one for an unknown model \(cross-attention width 24\).$",
    ),
    "SDXL": (
        {f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn2_to_k.lora_down.weight": (2, 2048) for i in range(2)},
        None,
        r"for SDXL \(cross-attention width 2048\); this model needs one for an unknown model \(cross-attention width 24\).$",
    ),
    "another kernel": (
        {"unet.conv_in.lora_A.weight": (2, 4, 1, 1), "unet.conv_in.lora_B.weight": (16, 2)},
        None,
        r"unet.conv_in is for \(16, 4\), the model has \(16, 4, 3, 3\)",
    ),
    "down without up": ({A: (2, 24)}, None, rf"{TO_K} has .*lora_A.weight \(2, 24\) and not the other half"),
    "up without down": ({B: (16, 2)}, None, rf"{TO_K} has .*lora_B.weight \(16, 2\) and not the other half"),
    "ranks differ": (GOOD | {B: (16, 3)}, None, r"not fit each other: down is \(2, 24\), up is \(16, 3\)"),
    "rank 0": ({A: (0, 24), B: (16, 0)}, None, r"not fit each other: down is \(0, 24\), up is \(16, 0\)"),
    "up with a kernel": (GOOD | {B: (16, 2, 3, 3)}, None, r"not fit each other: down is \(2, 24\), up is \(16, 2, 3, 3\)"),
    "two ways to say one": (
        GOOD | {f"unet.{TO_K}.lora.down.weight": (2, 24)},
        None,
        "has two tensors for one place: .*lora.down.weight and|has two tensors for one place: .*lora_A.weight and",
    ),
    "odd kernel between": (
        {f"{KOHYA}.lora_down.weight": (2, 24), f"{KOHYA}.lora_up.weight": (16, 2), f"{KOHYA}.lora_mid.weight": (3, 2, 3, 3)},
        None,
        r"not fit each other: down is \(2, 24\), mid is \(3, 2, 3, 3\)",
    ),
    "alphas": (
        {f"{KOHYA}.lora_down.weight": (2, 24), f"{KOHYA}.lora_up.weight": (16, 2), f"{KOHYA}.alpha": (2,)},
        None,
        r"the shapes do not fit each other: alpha is \(2,\)",
    ),
    "rank in metadata": (GOOD, R2 | {"unet.r": 4}, "has rank 2, and its configuration says 4"),
    "alpha 0": (GOOD, R2 | {"unet.lora_alpha": 0}, "alpha of .* is 0"),
    "alpha NaN": (GOOD, R2 | {"unet.lora_alpha": float("nan")}, "alpha of .* is nan"),
    "alpha beyond fp32": (GOOD, R2 | {"unet.lora_alpha": 10**400}, "alpha of .* is 1000"),
    "alpha text": (GOOD, R2 | {"unet.lora_alpha": "8"}, "alpha of .* is '8'"),
    "patterns": (GOOD, R2 | {"unet.rank_pattern": ["x"]}, "not the configuration"),
    "regex": (GOOD, R2 | {"unet.rank_pattern": {"(": 2}}, "not the configuration"),
    "regex with flags": (GOOD, R2 | {"unet.alpha_pattern": {"(?i)x": 2}}, "not the configuration"),
    "regex after one that fits all": (GOOD, R2 | {"unet.rank_pattern": {".*": 2, "(": 2}}, "not the configuration"),
    "long regex": (GOOD, R2 | {"unet.alpha_pattern": {"x" * 501: 2}}, "has a pattern of 501 letters"),
    "no alpha": (GOOD, {"unet.r": 2}, "alpha of .* is None"),
    "PiSSA": (GOOD, R2 | {"unet.init_lora_weights": "pissa_niter_16"}, "pissa_niter_16, which changes the base model too"),
    "LoHa by metadata": (GOOD, R2 | {"unet.peft_type": "LOHA"}, "adapter type LOHA"),
    "DoRA too long": (
        GOOD | {f"unet.{TO_K}.lora_magnitude_vector": (24,)},
        None,
        r"magnitude is \(24,\); .* should be \(16, 1\)",
    ),
    "LoKr": ({f"{KOHYA}.lokr_w1": (2, 2)}, None, "unsupported adapter type LoKr"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": (2, 2)}, None, "unsupported adapter type LoHa"),
    "OFT": ({f"{KOHYA}.oft_blocks": (2, 2, 2)}, None, "unsupported adapter type OFT"),
    "BOFT": ({f"base_model.model.{TO_K}.boft_R": (2, 2, 2)}, None, "unsupported adapter type OFT"),
    "IA3": ({f"{KOHYA}.weight": (2, 1), f"{KOHYA}.on_input": ()}, None, "unsupported adapter type IA3"),
    "GLoRA": ({f"{KOHYA}.a1.weight": (2, 2)}, None, "unsupported adapter type GLoRA"),
    "full difference": ({f"{KOHYA}.diff": (16, 24)}, None, "unsupported adapter type full difference"),
    "LoRA and norms": (GOOD | {f"{KOHYA}.w_norm": (16,)}, None, "unsupported adapter type full difference"),
    "text encoder": (
        GOOD | {f"text_encoder.text_model.{TEXT_Q}.lora_{x}.weight": s for x, s in (("A", (2, 24)), ("B", (24, 2)))},
        None,
        r"2 of 4 tensors match the U-Net(.|\n)*text_encoder.text_model.encoder",
    ),
    "cloneofsimo": ({"unet:0:up": (2, 24)}, None, "0 of 1 tensors match(.|\n)*in the cloneofsimo style"),
    "embedding": ({"<cat-toy>": (1, 768)}, None, "is no LoRA. The file looks like a textual inversion embedding"),
    "U-Net": ({"conv_in.weight": (2, 4, 3, 3), "time_embedding.linear_1.bias": (2,)}, None, "is no LoRA.*U-Net"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    shapes, config, message = REFUSED[kind]
    path, unet = write(tmp_path, shapes, config), tiny_unet()
    with pytest.raises(AdapterError, match=message) as error:
        load(unet, path)
    assert str(path) in str(error.value)
    assert not lora_layers(unet)


def test_strict_false_takes_what_matches_and_says_what_was_left(tmp_path: Path) -> None:
    odd = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 24)}
    unet, path = tiny_unet(), write(tmp_path, GOOD | STRANGER | odd)
    loaded = load_lora({"unet": unet}, path, strict=False)
    assert list(lora_layers(unet)) == [TO_K] and list(loaded.modules) == [f"unet.{TO_K}"]
    assert "3 tensors that match nothing were left out" in str(loaded)
    with pytest.raises(AdapterError, match="0 of 2 tensors match"):
        load_lora({"unet": tiny_unet()}, write(tmp_path, STRANGER), strict=False)


def test_layers_that_are_no_lora_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    """A LoCon that was trained with its norm layers."""
    norms = {f"lora_unet_{DOWN.replace('.', '_')}_norm.{x}_norm": (16,) for x in "wb"}
    path = write(tmp_path, {f"{KOHYA}.lora_down.weight": (2, 24), f"{KOHYA}.lora_up.weight": (16, 2)} | norms)
    with pytest.raises(AdapterError, match=r"type full difference.*load_lora_weights\(…, strict=False\) loads the rest"):
        load(tiny_unet(), path)
    loaded = load_lora({"unet": tiny_unet()}, path, strict=False)
    assert list(loaded.modules) == [f"unet.{TO_K}"]
    assert f"2 tensors that match nothing were left out: {', '.join(sorted(norms))}" in str(loaded)
    with pytest.raises(AdapterError, match="unsupported adapter type full difference(?!.*strict)"):
        load_lora({"unet": tiny_unet()}, write(tmp_path, norms), strict=False)


@pytest.mark.parametrize("vectors", ["emb_params", "clip_l", "string_to_param.*"])
def test_a_lora_that_brings_a_word_along(tmp_path: Path, vectors: str) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": torch.ones(2, 24), f"{KOHYA}.lora_up.weight": torch.ones(16, 2)}
    save(tensors | {f"bundle_emb.my-dog.{vectors}": 3 * torch.ones(2, 24)}, path := tmp_path / "dog.safetensors")
    loaded = load(tiny_unet(), path)
    assert loaded.words == ("my-dog",) and list(loaded.modules) == [f"unet.{TO_K}"]
    assert "the new word my-dog, which load_textual_inversion gets from this file" in str(loaded)
    word = read_embedding(path)
    assert word.word == "my-dog" and torch.equal(word.vectors, 3 * torch.ones(2, 24))


def test_a_word_beside_a_lora_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert "new word" not in str(read_lora(path))
    save_embedding(tmp_path, "<dog>", torch.ones(1, 24))
    assert "a new word in learned_embeds.safetensors beside it, for load_textual_inversion" in str(load(tiny_unet(), tmp_path))


def test_reading_without_a_model_is_strict_too(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"unet.a.lora_A.weight": (2, 3)})
    with pytest.raises(
        AdapterError, match=r"2 of 3 tensors have the names of an SD adapter(.|\n)*1 without a layer: unet.a.lora_A.weight"
    ):
        read_lora(path)


@pytest.mark.parametrize(
    ("alpha", "message"), [(-1.0, "alpha of unet.* is -1.0; it must be a pos"), (float("nan"), "alpha has NaN")]
)
def test_alphas_that_are_no_strength(tmp_path: Path, alpha: float, message: str) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": torch.ones(2, 24), f"{KOHYA}.lora_up.weight": torch.ones(16, 2)}
    save(tensors | {f"{KOHYA}.alpha": torch.tensor(alpha)}, tmp_path / FILE_NAME)
    with pytest.raises((AdapterError, WeightsError), match=message):
        load(tiny_unet(), tmp_path)


def test_metadata_that_is_not_json(tmp_path: Path) -> None:
    tensors = {key: torch.ones(shape) for key, shape in GOOD.items()}
    for text in ("{", "3", "[]"):
        save(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(AdapterError, match="lora_adapter_metadata is not the configuration of a LoRA"):
            load(tiny_unet(), tmp_path / "x.safetensors")


def test_nan_in_an_adapter(tmp_path: Path) -> None:
    tensors = {key: torch.full(shape, float("nan")) for key, shape in GOOD.items()}
    save(tensors, tmp_path / FILE_NAME)
    unet = tiny_unet()
    with pytest.raises(WeightsError, match="lora_[AB].weight has NaN"):
        load(unet, tmp_path)
    assert not lora_layers(unet)


def test_a_textual_inversion_is_no_lora(tmp_path: Path) -> None:
    path = save_embedding(tmp_path, "<dog>", torch.ones(2, 24))
    for place in (path, tmp_path):
        with pytest.raises(AdapterError, match="is no LoRA. The file looks like a textual inversion"):
            read_lora(place)


def test_files_that_are_not_there_or_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has no .safetensors file"):
        load(tiny_unet(), tmp_path)
    (tmp_path / "dog.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for name in (None, "dog.safetensors"):
        with pytest.raises(WeightsError, match="dog.safetensors is a git-LFS pointer"):
            load(tiny_unet(), tmp_path, weight_name=name)
    with pytest.raises(WeightsError, match="does not exist"):
        load(tiny_unet(), tmp_path / "cat.safetensors")
