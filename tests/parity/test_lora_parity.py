"""Adapters against diffusers and peft: files both ways, with alpha ≠ rank, and the same ΔW."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minidiff.adapters.lora import inject, lora_layers, merge, set_adapters
from minidiff.config import TINY_UNET
from minidiff.lora_files import load_lora, save_lora
from minidiff.models.unet import UNet2DConditionModel

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def ours() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(TINY_UNET)


@pytest.fixture
def theirs(ours: UNet2DConditionModel) -> nn.Module:
    model = diffusers.UNet2DConditionModel.from_config(TINY_UNET.to_dict("UNet2DConditionModel"))
    model.load_state_dict(ours.state_dict())
    return model.eval()


def run(unet: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 24, generator=g)
    with torch.no_grad():
        output = unet(latents, torch.tensor([3, 900]), text)
    return output if isinstance(output, Tensor) else output.sample


def fill(parameters: list[nn.Parameter]) -> None:
    for i, p in enumerate(parameters):
        p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))


def b_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".lora_B." in name]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def pipeline(unet: nn.Module) -> diffusers.StableDiffusionPipeline:
    """As much of a pipeline as `load_lora_weights` needs."""
    absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    nothing = dict.fromkeys(absent)
    return diffusers.StableDiffusionPipeline(
        unet=unet, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False, **nothing
    )


@pytest.mark.parametrize(("rank", "alpha"), [(2, 2), (2, 8), (3, 1)])
@pytest.mark.parametrize("through_the_pipeline", [False, True])
def test_diffusers_loads_what_minidiff_saves(
    tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module, rank: int, alpha: int, through_the_pipeline: bool
) -> None:
    inject(ours, rank, alpha)
    fill(b_parameters(ours))
    base = run(theirs)
    save_lora(ours, tmp_path)
    if through_the_pipeline:
        pipeline(theirs).load_lora_weights(tmp_path)
    else:
        theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    close(run(theirs), run(ours))
    assert (run(theirs) - base).abs().max() > 0.01


def test_diffusers_loads_mixed_ranks(tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module) -> None:
    """A file with patterns: other ranks and alphas in some layers."""
    inject(ours, 2, alpha=8)
    for i, layer in enumerate(lora_layers(ours).values()):
        if i % 3 == 0:
            layer.add("default", torch.randn(4, layer.base.in_features), torch.randn(layer.base.out_features, 4), 0.75)
    fill(b_parameters(ours))
    save_lora(ours, tmp_path)
    pipeline(theirs).load_lora_weights(tmp_path)
    close(run(theirs), run(ours))


@pytest.mark.parametrize("rslora", [False, True])
def test_minidiff_loads_what_diffusers_saves(
    tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module, rslora: bool
) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, use_rslora=rslora)
    theirs.add_adapter(config)
    fill(b_parameters(theirs))
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=config.to_dict() | {"target_modules": TARGETS, "task_type": None},
    )
    loaded = load_lora(ours, tmp_path)
    assert loaded.alpha_known and set(loaded.scales.values()) == {8 / 2**0.5 if rslora else 4.0}
    close(run(ours), run(theirs))


def test_a_file_without_metadata_has_scale_1(tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module) -> None:
    theirs.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    fill(b_parameters(theirs))
    layers = peft.get_peft_model_state_dict(theirs)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    assert not load_lora(ours, tmp_path).alpha_known
    close(run(ours), run(theirs))


def peft_model(theirs: nn.Module) -> nn.Module:
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=TARGETS, rank_pattern={"attn2.to_k": 4}, alpha_pattern={"to_v": 3}
    )
    model = peft.get_peft_model(theirs, config)
    fill(b_parameters(model))
    return model


def test_minidiff_loads_a_peft_folder(tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module) -> None:
    model = peft_model(theirs)
    model.save_pretrained(tmp_path)
    assert load_lora(ours, tmp_path).dialect == "peft"
    close(run(ours), run(model))


def test_delta_equals_pefts(tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module) -> None:
    model = peft_model(theirs)
    model.save_pretrained(tmp_path)
    load_lora(ours, tmp_path)
    layers = lora_layers(ours)
    for name, layer in layers.items():
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(layer.delta(), delta, atol=1e-7, rtol=1e-6)
    merge(ours)
    model.merge_adapter()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.base.weight, model.base_model.model.get_submodule(name).base_layer.weight)


def test_print_in_pefts_words(
    ours: UNet2DConditionModel, theirs: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    from minidiff.adapters.lora import print_trainable_parameters

    inject(ours, 2)
    print_trainable_parameters(ours)
    peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=TARGETS)).print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_the_last_loaded_adapter_is_the_active_one(
    tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module
) -> None:
    pipe = pipeline(theirs)
    for name, rank in (("dog", 2), ("style", 3)):
        source = UNet2DConditionModel(TINY_UNET)
        inject(source, rank, alpha=6, seed=rank)
        fill(b_parameters(source))
        save_lora(source, tmp_path / name)
        load_lora(ours, tmp_path / name, adapter_name=name)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        close(run(ours), run(theirs))
    set_adapters(ours, ["dog", "style"], [0.8, 0.5])
    pipe.set_adapters(["dog", "style"], [0.8, 0.5])
    close(run(ours), run(theirs))
