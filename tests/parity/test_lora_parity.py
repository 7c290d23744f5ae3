"""Adapters against diffusers and peft: the same output, ΔW and training; files both ways, with alpha ≠ rank."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exact import assert_as_near
from tiny_sizes import TINY_UNET
from torch import Tensor, nn

from minidiff import fast
from minidiff.core.inject import (
    adapter_weights,
    inject,
    lora_layers,
    merge,
    set_adapters,
    trainable,
)
from minidiff.core.lora import LoRAWeights
from minidiff.core.losses import squared_error
from minidiff.core.train import clip_gradients
from minidiff.core.unet import UNet2DConditionModel
from minidiff.files.folder import config_values
from minidiff.files.lora_file import attach, load_lora, save_lora
from minidiff.trainer.optimizers import adamw
from minidiff.trainer.recipes import print_trainable_parameters
from minidiff.trainer.settings import TrainSettings

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out"]  # "conv" is that of the samplers
CONFIGS = {
    "alpha": {"lora_alpha": 3, "target_modules": ATTENTION},
    "rslora": {"lora_alpha": 3, "target_modules": ATTENTION, "use_rslora": True},
    "convolutions": {"lora_alpha": 3, "target_modules": CONVOLUTIONS},
    "dora": {"lora_alpha": 3, "target_modules": ATTENTION, "use_dora": True},
    "dora on convolutions": {"lora_alpha": 3, "target_modules": CONVOLUTIONS, "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": ATTENTION + CONVOLUTIONS,
        "rank_pattern": {"attn2.to_k": 4, "conv1": 1},
        "alpha_pattern": {"to_v": 3, "conv1": 5},
    },
}


@pytest.fixture
def ours() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(TINY_UNET)


@pytest.fixture
def theirs(ours: UNet2DConditionModel) -> nn.Module:
    model = diffusers.UNet2DConditionModel.from_config(config_values(TINY_UNET, "UNet2DConditionModel"))
    model.load_state_dict(ours.state_dict())
    return model.eval()


def predict(unet: nn.Module, seed: int) -> Tensor:
    g, dtype = torch.Generator().manual_seed(seed), next(unet.parameters()).dtype
    latents, text = torch.randn(2, 4, 8, 8, generator=g).to(dtype), torch.randn(2, 7, 24, generator=g).to(dtype)
    output = unet(latents, torch.tensor([3, 900]), text)
    return output if isinstance(output, Tensor) else output.sample


@torch.no_grad()
def run(unet: nn.Module) -> Tensor:
    return predict(unet, seed=1)


def fill(model: nn.Module) -> None:
    """Random A and B, and magnitudes that have moved, as after training."""
    for i, (name, p) in enumerate(model.named_parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        if ".lora_A." in name or ".lora_B." in name:
            p.data = 0.2 * noise
        elif ".lora_magnitude" in name:
            p.data *= 1 + 0.2 * noise


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def of_unet(model: nn.Module) -> dict[str, LoRAWeights]:
    return {f"unet.{name}": weights for name, weights in adapter_weights(model).items()}


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def as_ours(layer: nn.Module) -> LoRAWeights:
    """A layer of peft's as LoRAWeights: B of a convolution and m have other shapes there."""
    A, B = (side["default"].weight.detach().clone() for side in (layer.lora_A, layer.lora_B))
    ones = [1] * (A.ndim - 1)
    m = layer.lora_magnitude_vector["default"].weight.detach().clone() if layer.use_dora["default"] else None
    return LoRAWeights(A, B.flatten(1), layer.scaling["default"], None if m is None else m.reshape(-1, *ones))


# --- the same formulas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_same_weights_same_output_and_same_delta(ours: UNet2DConditionModel, theirs: nn.Module, name: str) -> None:
    base = run(theirs)
    theirs.add_adapter(peft.LoraConfig(r=2, **CONFIGS[name]))
    fill(theirs)
    attach(ours, {name: as_ours(layer) for name, layer in peft_layers(theirs).items()})
    close(run(ours), run(theirs))
    assert (run(ours) - base).abs().max() > 0.01
    merge(ours)
    for name, layer in peft_layers(theirs).items():
        layer.merge()
        torch.testing.assert_close(lora_layers(ours)[name].base.weight, layer.base_layer.weight, atol=1e-6, rtol=1e-5)
    close(run(ours), run(theirs))


@pytest.mark.parametrize("name", ["alpha", "rslora", "convolutions", "dora", "dora on convolutions"])
def test_inject_makes_the_same_adapter(ours: UNet2DConditionModel, theirs: nn.Module, name: str) -> None:
    """Layers, shapes, scale, the range of A, B = 0, and m; peft has the same config in its own words."""
    config = CONFIGS[name]
    theirs.add_adapter(peft.LoraConfig(r=2, **config))
    how = {"rslora": config.get("use_rslora", False), "dora": config.get("use_dora", False)}
    inject(ours, 2, config["lora_alpha"], config["target_modules"], **how)
    mine, other = adapter_weights(ours), {name: as_ours(layer) for name, layer in peft_layers(theirs).items()}
    assert mine.keys() == other.keys()
    for name, weights in mine.items():
        assert weights.A.shape == other[name].A.shape and weights.scale == pytest.approx(other[name].scale, rel=1e-12)
        assert torch.equal(weights.B, other[name].B) and not weights.B.any()
        bound = weights.A[0].numel() ** -0.5
        assert max(weights.A.abs().max(), other[name].A.abs().max()) <= bound
        assert (weights.magnitude is None) == (other[name].magnitude is None)
        if weights.magnitude is not None:
            torch.testing.assert_close(weights.magnitude, other[name].magnitude)


def target(step: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(100 + step))


def train_theirs(model: nn.Module, epsilon: float) -> None:
    """Five steps of AdamW on drawn data, by hand."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=epsilon)
    for step in range(5):
        optimizer.zero_grad()
        output = predict(model, seed=step)
        F.mse_loss(output, target(step).to(output)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def train_ours(model: nn.Module, epsilon: float) -> None:
    """The same with minidiff's loss, clipping and optimizer."""
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, TrainSettings(learning_rate=1e-2, adam_weight_decay=0.1, adam_epsilon=epsilon))
    for step in range(5):
        optimizer.zero_grad()
        squared_error(predict(model, seed=step), target(step)).mean().backward()
        clip_gradients(parameters, 1.0)
        optimizer.step()


def tensors_of(weights: dict[str, LoRAWeights]) -> list[Tensor]:
    """Every A, B and m, in the order of the names."""
    found = [weights[name] for name in sorted(weights)]
    return [tensor for w in found for tensor in (w.A, w.B, w.magnitude) if tensor is not None]


@pytest.mark.parametrize("epsilon", [1e-8, 1e-5], ids=["plain", "lean"])
@pytest.mark.parametrize("name", ["alpha", "convolutions", "dora", "dora on convolutions"])
def test_five_steps_of_training_give_the_same_weights(
    ours: UNet2DConditionModel, theirs: nn.Module, name: str, epsilon: float
) -> None:
    """At AdamW's own epsilon, 1e-8, for the plain classes, which add up in peft's order. The fast classes add up in another:
    an element whose gradient is rounding alone would move as far as any other, hence their epsilon."""
    config = CONFIGS[name]
    how = {"rslora": config.get("use_rslora", False), "dora": config.get("use_dora", False)}
    inject(ours, 2, config["lora_alpha"], config["target_modules"], **how)
    if epsilon > 1e-8:
        fast.install(ours)
    theirs.add_adapter(peft.LoraConfig(r=2, **config))
    start = adapter_weights(ours)
    for name, layer in peft_layers(theirs).items():
        layer.lora_A["default"].weight.data = start[name].A.clone()
    before = {name: LoRAWeights(w.A.clone(), w.B.clone(), w.scale, None) for name, w in start.items()}
    exactly = deepcopy(theirs).double()
    train_ours(ours, epsilon)
    train_theirs(theirs, epsilon)
    train_theirs(exactly, epsilon)
    mine = adapter_weights(ours)
    other, exact = ({name: as_ours(layer) for name, layer in peft_layers(model).items()} for model in (theirs, exactly))
    assert_as_near(tensors_of(mine), tensors_of(other), tensors_of(exact))
    assert_as_near([run(ours)], [run(theirs)], [run(exactly)])
    for name, weights in mine.items():
        assert min((weights.A - before[name].A).abs().max(), weights.B.abs().max()) > 0.01  # it did train


def test_print_in_pefts_words(ours: UNet2DConditionModel, theirs: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    inject(ours, 2)
    print_trainable_parameters(ours)
    peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=ATTENTION)).print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


# --- files -----------------------------------------------------------------------------------------------------------


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
    fill(ours)
    base = run(theirs)
    save_lora(of_unet(ours), tmp_path)
    if through_the_pipeline:
        pipeline(theirs).load_lora_weights(tmp_path)
    else:
        theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    close(run(theirs), run(ours))
    assert (run(theirs) - base).abs().max() > 0.01


def test_diffusers_loads_mixed_ranks(tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module) -> None:
    """A file with patterns: other ranks and alphas in some layers."""
    inject(ours, 2, alpha=8, rank_of={"attn2.to_k": 4, "to_out.0": 1})
    fill(ours)
    save_lora(of_unet(ours), tmp_path)
    pipeline(theirs).load_lora_weights(tmp_path)
    close(run(theirs), run(ours))


@pytest.mark.parametrize("rslora", [False, True])
def test_minidiff_loads_what_diffusers_saves(
    tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module, rslora: bool
) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=ATTENTION, use_rslora=rslora)
    theirs.add_adapter(config)
    fill(theirs)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=config.to_dict() | {"target_modules": ATTENTION, "task_type": None},
    )
    loaded = load_lora({"unet": ours}, tmp_path)
    assert loaded.alpha_known and set(loaded.scales.values()) == {8 / 2**0.5 if rslora else 4.0}
    close(run(ours), run(theirs))


def test_a_file_without_metadata_has_scale_1(tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module) -> None:
    theirs.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=ATTENTION))
    fill(theirs)
    layers = peft.get_peft_model_state_dict(theirs)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    assert not load_lora({"unet": ours}, tmp_path).alpha_known
    close(run(ours), run(theirs))


@pytest.mark.parametrize("name", CONFIGS)
def test_minidiff_loads_a_peft_folder(tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module, name: str) -> None:
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, **CONFIGS[name]))
    fill(model)
    model.save_pretrained(tmp_path)
    assert load_lora({"unet": ours}, tmp_path).dialect == "peft"
    close(run(ours), run(model))


def test_the_last_loaded_adapter_is_the_active_one(tmp_path: Path, ours: UNet2DConditionModel, theirs: nn.Module) -> None:
    pipe = pipeline(theirs)
    for name, rank in (("dog", 2), ("style", 3)):
        source = UNet2DConditionModel(TINY_UNET)
        inject(source, rank, alpha=6, seed=rank)
        fill(source)
        save_lora(of_unet(source), tmp_path / name)
        load_lora({"unet": ours}, tmp_path / name, adapter_name=name)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        close(run(ours), run(theirs))
    set_adapters(ours, ["dog", "style"], [0.8, 0.5])
    pipe.set_adapters(["dog", "style"], [0.8, 0.5])
    close(run(ours), run(theirs))
