"""LoRAs for few steps are known by the names that their publishers gave them, and by no others."""

from pathlib import Path

import pytest
from tiny_sizes import TINY_UNET

from minidiff.core.inject import adapter_weights, inject
from minidiff.core.unet import UNet2DConditionModel
from minidiff.draw.pipeline import sampler_for
from minidiff.files.few_steps import FLAGS, suggestion
from minidiff.files.lora_file import load_lora, save_lora

HUB = "hub/models--{}/snapshots/4f0ab/pytorch_lora_weights.safetensors"
DDIM = "--sampler ddim --timestep_spacing trailing --num_inference_steps {} --guidance_scale {}"
EULER = "--sampler euler --timestep_spacing trailing --num_inference_steps {} --guidance_scale 0"
TCD = "--sampler tcd --eta {} --num_inference_steps {} --guidance_scale 0"
LCM = "--sampler lcm --num_inference_steps 4 --guidance_scale 1"


@pytest.mark.parametrize(
    ("path", "flags"),
    [
        ("Hyper-SD15-1step-lora.safetensors", TCD.format(1, 1)),
        ("Hyper-SDXL-1step-lora.safetensors", TCD.format(1, 1)),
        ("Hyper-SD15-2steps-lora.safetensors", DDIM.format(2, 0)),
        ("loras/Hyper-SD15-8steps-lora.safetensors", DDIM.format(8, 0)),
        ("Hyper-SD15-12steps-CFG-lora.safetensors", DDIM.format(12, 5)),
        ("sdxl_lightning_4step_lora.safetensors", EULER.format(4)),
        ("a/b/c/d/sdxl_lightning_8step_lora.safetensors", EULER.format(8)),
        (HUB.format("latent-consistency--lcm-lora-sdv1-5"), LCM),
        ("lcm-lora-sdv1-5.safetensors", LCM),
        ("LCM_LoRA_SDv15.safetensors", LCM),
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", LCM),
        (HUB.format("h1t--TCD-SD15-LoRA"), TCD.format(0.3, 4)),
        ("my-dog-lora/pytorch_lora_weights.safetensors", None),
        ("thunder-and-lightning.safetensors", None),
        ("hyper-sdetailer.safetensors", None),
        ("film-cm.safetensors", None),
        ("x.safetensors", None),
    ],
)
def test_published_names(path: str, flags: str | None) -> None:
    assert suggestion(Path(path)) == flags


@pytest.mark.parametrize("flags", FLAGS.values())
def test_every_suggestion_can_be_drawn(flags: str) -> None:
    words = flags.format(4).split()
    given = dict(zip(words[::2], words[1::2]))
    sampler_for(given["--sampler"], given.get("--timestep_spacing"), None, float(given.get("--eta", 0)))


def test_loading_one_says_how_to_draw(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(TINY_UNET)
    inject(unet, rank=1)
    modules = {f"unet.{name}": weights for name, weights in adapter_weights(unet).items()}
    for name, says in (("Hyper-SD15-4steps-lora", f"; draw with {DDIM.format(4, 0)}"), ("dog", "")):
        path = save_lora(modules, tmp_path / f"{name}.safetensors")
        line = str(load_lora({"unet": UNet2DConditionModel(TINY_UNET)}, path))
        assert line.endswith(says) and ("draw with" in line) == bool(says)
    path = save_lora(modules, tmp_path / "own.safetensors", metadata={"modelspec.usage_hint": "sampler lcm\x1b[2J, 4 steps"})
    assert str(load_lora({"unet": UNet2DConditionModel(TINY_UNET)}, path)).endswith("; draw with sampler lcm\\x1b[2J, 4 steps")
