"""LoRA files against diffusers and peft: theirs in minidiff and minidiff's in theirs, with the same output."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_sizes import TINY_SD2, TINY_UNET
from torch import Tensor, nn

from minidiff.core.inject import adaptable_layers, lora_layers
from minidiff.core.lora import LoRAWeights
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files.folder import config_values
from minidiff.files.lora_file import attach, load_lora, read_lora, save_lora
from minidiff.files.text_files import build_text_encoder

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "proj_in", "proj_out", "conv_in"]
LINEAR = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
EVERYTHING = [*LINEAR, *CONVOLUTIONS, "upsamplers.0.conv", "conv_out", "linear_1", "linear_2"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
WIDTH = TINY_UNET.cross_attention_dim
Models = dict[str, nn.Module]


def text_encoder() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return build_text_encoder({**sizes, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}, "tiny")


@pytest.fixture(params=[TINY_UNET, TINY_SD2], ids=["SD 1", "SD 2"])
def ours(request: pytest.FixtureRequest) -> Models:
    torch.manual_seed(0)
    return {"unet": UNet2DConditionModel(request.param).eval(), "text_encoder": text_encoder()}


@pytest.fixture
def theirs(ours: Models) -> Models:
    unet = diffusers.UNet2DConditionModel.from_config(config_values(ours["unet"].config, "UNet2DConditionModel"))
    unet.load_state_dict(ours["unet"].state_dict())
    return {"unet": unet.eval(), "text_encoder": text_encoder()}


def run(models: Mapping[str, nn.Module]) -> Tensor:
    """Ids through the text encoder and then the U-Net."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text = models["text_encoder"](input_ids=torch.arange(14).reshape(2, 7)).last_hidden_state
        output = models["unet"](latents, torch.tensor([3, 900]), text)
    return output if isinstance(output, Tensor) else output.sample


def same(ours: Models, theirs: Models, base: Tensor) -> None:
    torch.testing.assert_close(run(ours), run(theirs), atol=1e-5, rtol=1e-5)
    assert (run(theirs) - base).abs().max() > 0.01


def pipeline(models: Models) -> Any:
    """As much of a pipeline as `load_lora_weights` needs."""
    absent = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        **models, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False, **absent
    )


def drawn(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapt(
    ours: Models, targets: list[str], parts: tuple[str, ...], dora: bool = False, alpha: float | None = None
) -> dict[str, LoRAWeights]:
    """Put a random adapter of mixed ranks on our models; the same, as it goes into files. Scales are mixed, or alpha / r."""
    modules = {}
    for part in parts:
        layers, endings = adaptable_layers(ours[part]), tuple(f".{t}" for t in targets + TEXT)
        made = {}
        for i, name in enumerate(name for name in layers if f".{name}".endswith(endings)):
            W, rank = layers[name].weight, 2 + i % 2
            m = W.detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (W.ndim - 1)) * 1.1 if dora else None
            scale = alpha / rank if alpha else 8 / rank**0.5 if i % 3 else 0.75  # as in rsLoRA; not
            A, B = drawn((rank, *W.shape[1:]), 2 * i), drawn((len(W), rank), 2 * i + 1)
            made[name] = LoRAWeights(A, B, scale, m)
        attach(ours[part], made)
        modules |= {f"{part}.{name}": weights for name, weights in made.items()}
    return modules


def randomised(model: nn.Module) -> nn.Module:
    """Trained, as it were: B is not zero, and DoRA's magnitude is not ||W||."""
    for i, (name, p) in enumerate(model.named_parameters()):
        if ".lora_B." in name:
            p.data = drawn(p.shape, i)
        elif ".lora_magnitude_vector." in name:
            p.data = p.data * 1.1
    return model


# --- minidiff writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_diffusers_loads_the_diffusers_style(tmp_path: Path, ours: Models, theirs: Models, targets: list[str]) -> None:
    base = run(ours)
    save_lora(adapt(ours, targets, ("unet", "text_encoder")), tmp_path)
    pipeline(theirs).load_lora_weights(tmp_path)
    same(ours, theirs, base)


def test_diffusers_loads_dora(tmp_path: Path, ours: Models, theirs: Models) -> None:
    """Of the U-Net. The text encoder's it does not load right even from its own files: transformers 5 misses the magnitudes."""
    base = run(ours)
    save_lora(adapt(ours, EVERYTHING, ("unet",), dora=True), tmp_path)
    pipeline(theirs).load_lora_weights(tmp_path)
    same(ours, theirs, base)


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_diffusers_loads_the_kohya_style(tmp_path: Path, ours: Models, theirs: Models, targets: list[str]) -> None:
    """Ranks may differ, alpha may not: diffusers 0.42 takes the commonest one for all. `dora_scale` it drops for SD 1.x."""
    base = run(ours)
    save_lora(adapt(ours, targets, ("unet", "text_encoder"), alpha=5.0), tmp_path, "kohya")
    pipeline(theirs).load_lora_weights(tmp_path)
    same(ours, theirs, base)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_loads_the_peft_folder(tmp_path: Path, ours: Models, theirs: Models, dora: bool) -> None:
    base = run(ours)
    save_lora(adapt(ours, EVERYTHING, ("unet",), dora), tmp_path, "peft")
    same(ours, theirs | {"unet": peft.PeftModel.from_pretrained(theirs["unet"], tmp_path)}, base)


# --- minidiff reads ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "alpha": {"lora_alpha": 8},
    "rslora": {"lora_alpha": 8, "use_rslora": True},
    "dora": {"lora_alpha": 3, "use_dora": True},
    "patterns": {"lora_alpha": 8, "rank_pattern": {"attn2.to_k": 4, "conv1": 3}, "alpha_pattern": {"to_v": 3, "conv_in": 1}},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_minidiff_reads_what_diffusers_saves(tmp_path: Path, ours: Models, theirs: Models, kind: str) -> None:
    base, layers, metadata = run(ours), {}, {}
    for part, targets in (("unet", EVERYTHING), ("text_encoder", TEXT)):
        config = peft.LoraConfig(r=2, target_modules=targets, **OPTIONS[kind])
        theirs[part].add_adapter(config)
        layers[part] = peft.get_peft_model_state_dict(randomised(theirs[part]), adapter_name="default")
        metadata[part] = config.to_dict() | {"target_modules": targets, "task_type": None}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=metadata["unet"],
        text_encoder_lora_adapter_metadata=metadata["text_encoder"],
    )
    loaded = load_lora(ours, tmp_path)
    assert loaded.alpha_known and loaded.dialect == "diffusers"
    same(ours, theirs, base)


def test_minidiff_reads_what_the_sd15_scripts_save(tmp_path: Path, ours: Models, theirs: Models) -> None:
    """They mix two dialects in one file, which diffusers itself reads only half; alpha is the rank."""
    base, layers = run(ours), {}
    for part, targets in (("unet", [*ATTENTION, *CONVOLUTIONS]), ("text_encoder", TEXT[:4])):
        theirs[part].add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        state = peft.get_peft_model_state_dict(randomised(theirs[part]), adapter_name="default")
        layers[part] = diffusers.utils.convert_state_dict_to_diffusers(state)
    assert any(".lora.down." in key for key in layers["unet"]) and any(".lora_A." in key for key in layers["unet"])
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"]
    )
    assert not load_lora(ours, tmp_path).alpha_known
    same(ours, theirs, base)


def test_minidiff_reads_diffusers_kohya_export(tmp_path: Path, ours: Models, theirs: Models) -> None:
    base = run(ours)
    theirs["unet"].add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=ATTENTION))
    state = peft.get_peft_model_state_dict(randomised(theirs["unet"]), adapter_name="default")
    kohya = diffusers.utils.convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in state.items()})
    save_file({key: tensor.contiguous() for key, tensor in kohya.items()}, tmp_path / "x.safetensors")
    loaded = load_lora(ours, tmp_path / "x.safetensors")
    assert loaded.dialect == "kohya" and loaded.alpha_known
    same(ours, theirs, base)


@pytest.mark.parametrize("kind", OPTIONS)
def test_minidiff_reads_a_peft_folder(tmp_path: Path, ours: Models, theirs: Models, kind: str) -> None:
    base = run(ours)
    model = randomised(peft.get_peft_model(theirs["unet"], peft.LoraConfig(r=2, target_modules=EVERYTHING, **OPTIONS[kind])))
    model.save_pretrained(tmp_path)
    assert load_lora(ours, tmp_path).dialect == "peft"
    same(ours, theirs | {"unet": model}, base)


@pytest.mark.parametrize("kind", OPTIONS)
def test_minidiff_reads_what_save_lora_adapter_writes(tmp_path: Path, ours: Models, theirs: Models, kind: str) -> None:
    base = run(ours)
    theirs["unet"].add_adapter(peft.LoraConfig(r=2, target_modules=EVERYTHING, **OPTIONS[kind]))
    randomised(theirs["unet"]).save_lora_adapter(tmp_path)
    assert load_lora(ours, tmp_path).alpha_known
    same(ours, theirs, base)


def test_minidiff_reads_pefts_plain_state_dict(tmp_path: Path, ours: Models, theirs: Models) -> None:
    base = run(ours)
    model = peft.get_peft_model(theirs["unet"], peft.LoraConfig(r=2, lora_alpha=6, target_modules=EVERYTHING))
    state = {key: tensor for key, tensor in randomised(model).state_dict().items() if "lora_" in key}
    save_file(state, tmp_path / "x.safetensors")
    load_lora(ours, tmp_path / "x.safetensors", alpha=6)
    same(ours, theirs | {"unet": model}, base)


def test_deltas_equal_pefts(tmp_path: Path, ours: Models, theirs: Models) -> None:
    model = randomised(peft.get_peft_model(theirs["unet"], peft.LoraConfig(r=2, lora_alpha=5, target_modules=EVERYTHING)))
    model.save_pretrained(tmp_path)
    load_lora(ours, tmp_path)
    for name, layer in lora_layers(ours["unet"]).items():
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(layer.delta(), delta, atol=1e-7, rtol=1e-6)


def test_a_peft_folder_does_nothing_in_diffusers(tmp_path: Path, ours: Models, theirs: Models) -> None:
    """The tutorials' own path, get_peft_model -> save_pretrained -> load_lora_weights: why minidiff converts."""
    base = run(ours)
    save_lora(adapt(ours, ATTENTION, ("unet",)), tmp_path / "peft", "peft")
    pipeline(theirs).load_lora_weights(tmp_path / "peft", weight_name="adapter_model.safetensors")
    assert torch.equal(run(theirs), base)
    save_lora(read_lora(tmp_path / "peft").modules, tmp_path / "diffusers")
    pipeline(theirs).load_lora_weights(tmp_path / "diffusers")
    same(ours, theirs, base)
