"""Keywords, positions and attributes that code for diffusers uses, on a tiny model; parity/test_habits_parity.py compares."""

import shutil
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LoraConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    fast,
    get_peft_model_state_dict,
)
from minidiff.core import unet, vae
from minidiff.core.errors import AdapterError, SettingsError, WeightsError
from minidiff.core.inject import lora_layers

DOG = "a photo of a red dog"
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 5, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> Any:
    """For reading only."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def fresh(pipe: Any) -> Any:
    """For changing."""
    return deepcopy(pipe)


def with_adapter(pipe: Any, name: str = "default", rank: int = 2) -> Any:
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank), name)
    for number, layer in enumerate(lora_layers(pipe.unet).values()):
        layer.lora_B[name].data.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    return pipe


def latents(pipe: Any, *positional: Any, **call: Any) -> Tensor:
    drawn: Tensor = pipe(DOG, *positional, **CALL | call).images
    return drawn


# --- the call --------------------------------------------------------------------------------------------------------


def test_positions(pipe: Any) -> None:
    assert torch.equal(latents(pipe, 24, 40), latents(pipe, height=24, width=40))
    assert torch.equal(latents(pipe, "the beach"), latents(pipe, negative_prompt="the beach"))
    assert torch.equal(pipe([DOG, DOG], ["a", "b"], **CALL).images, pipe([DOG, DOG], negative_prompt=["a", "b"], **CALL).images)
    with pytest.raises(SettingsError, match="by position, the call takes the prompt, height, width, num_inference_steps"):
        latents(pipe, 24, 40, 3, 7.5)


def test_keywords_of_none_ask_for_nothing(pipe: Any) -> None:
    names = "timesteps sigmas ip_adapter_image cross_attention_kwargs callback_on_step_end clip_skip"
    names += " callback_on_step_end_tensor_inputs"
    assert torch.equal(latents(pipe, **dict.fromkeys(names.split())), latents(pipe))


WRONG = {
    "steps": ({"steps": 3}, "the call has no steps. Did you mean num_inference_steps?"),
    "init_image": ({"init_image": 1}, "Did you mean image?"),
    "near": ({"guidance_scal": 3}, 'the call has no guidance_scal. Did you mean guidance_scale?'),
    "kwargs": ({"cross_attention_kwargs": {"gligen": 1}}, "cross_attention_kwargs has no gligen"),
    "inputs": ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end has no prompt_embeds"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_unknown_keyword_says_what_minidiff_calls_it(pipe: Any, case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(SettingsError) as caught:
        latents(pipe, **call)
    assert message in str(caught.value)


def test_a_callback_that_would_change_the_latents(pipe: Any) -> None:
    with pytest.raises(SettingsError, match="returns other latents"):
        latents(pipe, callback_on_step_end=lambda pipe, step, t, tensors: {"latents": tensors["latents"] * 0})


def test_the_output_is_a_tuple_too(pipe: Any) -> None:
    pictures, checked = pipe(DOG, num_inference_steps=2, return_dict=False)
    assert len(pictures) == 1 and checked is None and pipe(DOG, num_inference_steps=2).nsfw_content_detected is None


def test_repr_says_what_it_is(fresh: Any) -> None:
    text = repr(with_adapter(fresh))
    for part in (fresh.name_or_path, "16 x 16 pixels", " parameters, cpu, torch.float32", "sampler ddim", ": default at 1>"):
        assert part in text, text


# --- loading, moving, switching --------------------------------------------------------------------------------------


def test_a_hub_id_in_a_cache(tiny_folder: Path, tmp_path: Path, fresh: Any) -> None:
    """A model, an adapter and a word, in the layout of the hub's cache; and what a missing one is told."""

    def snapshot(name: str) -> Path:
        home = tmp_path / f"models--me--{name}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("abc")
        return home / "snapshots" / "abc"

    shutil.copytree(tiny_folder, snapshot("model"))
    fresh = with_adapter(fresh)
    fresh.unet.save_pretrained(snapshot("adapter"))
    cache: dict[str, Any] = {"cache_dir": str(tmp_path), "local_files_only": True}
    pipe: Any = StableDiffusionPipeline.from_pretrained("me/model", **cache)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.name_or_path == "me/model"
    pipe.load_lora_weights("me/adapter", **cache)
    assert torch.equal(latents(pipe), latents(fresh))
    with pytest.raises(WeightsError, match="me/nothing"):
        StableDiffusionPipeline.from_pretrained("me/nothing", **cache)
    with pytest.raises(WeightsError, match="me/nothing"):
        pipe.load_lora_weights("me/nothing", **cache)
    with pytest.raises(SettingsError, match=r"from_pretrained has no device_map. Did you mean pipe.to\(device\)"):
        StableDiffusionPipeline.from_pretrained("me/model", device_map="auto")


def test_parts_of_another_pipeline(fresh: Any, pipe: Any) -> None:
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker"} < set(pipe.components)
    other: Any = StableDiffusionPipeline.from_pretrained(pipe.name_or_path, vae=fresh.vae, requires_safety_checker=False)
    assert other.vae is fresh.vae and other.unet is not fresh.unet
    fresh.safety_checker = None


def test_to(fresh: Any) -> None:
    fresh.to(dtype=torch.bfloat16)
    assert (fresh.dtype, fresh.vae.quant_conv.weight.dtype) == (torch.bfloat16, torch.float32)
    assert fresh.to("cpu", torch.float32).dtype == torch.float32


def test_enable(fresh: Any) -> None:
    before = latents(fresh)
    for name in ("attention_slicing", "xformers_memory_efficient_attention", "vae_slicing"):
        for action in ("enable", "disable"):
            with pytest.warns(UserWarning, match="nothing is switched"):
                getattr(fresh, f"{action}_{name}")()
    for name in ("model", "sequential"):
        with pytest.warns(UserWarning, match="nothing is offloaded"):
            getattr(fresh, f"enable_{name}_cpu_offload")()
    assert torch.equal(latents(fresh), before)
    with pytest.raises(AttributeError):
        fresh.enable_freeu()


def test_vae_tiling_is_of_the_vae_alone(fresh: Any) -> None:
    whole = [fresh(DOG, 64, 64, **CALL | {"output_type": kind}).images for kind in ("latent", "pt")]
    fresh.enable_vae_tiling()
    tiled = [fresh(DOG, 64, 64, **CALL | {"output_type": kind}).images for kind in ("latent", "pt")]
    assert torch.equal(whole[0], tiled[0]) and not torch.equal(whole[1], tiled[1])
    fresh.disable_vae_tiling()
    assert torch.equal(fresh(DOG, 64, 64, **CALL | {"output_type": "pt"}).images, whole[1])


# --- schedulers ------------------------------------------------------------------------------------------------------


def test_a_scheduler_says_what_it_cannot_do(fresh: Any) -> None:
    with pytest.raises(AttributeError, match="DDIMScheduler has no step; minidiff's samplers are iterators"):
        _ = fresh.scheduler.step
    with pytest.raises(SettingsError, match='DDIMScheduler has no beta_star. Did you mean beta_start'):
        DDIMScheduler(beta_star=0.1)
    with pytest.raises(SettingsError, match="scheduler is a str; take one of minidiff's: DDIMScheduler, DDPMScheduler"):
        fresh.scheduler = "ddim"
    with pytest.raises(AttributeError, match="nothing"):
        _ = fresh.scheduler.config.nothing


def test_an_sde_by_its_setting(fresh: Any) -> None:
    fresh.scheduler = DPMSolverMultistepScheduler.from_config(fresh.scheduler.config, algorithm_type="sde-dpmsolver++")
    assert fresh.sampler == "dpm++_2m_sde" and fresh.scheduler.config.algorithm_type == "sde-dpmsolver++"
    fresh.scheduler = DDIMScheduler.from_config(fresh.scheduler.config, timestep_spacing="trailing")
    assert (fresh.sampler, fresh.schedule.config.timestep_spacing) == ("ddim", "trailing")


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
def test_networks_answer_in_both_ways(tiny_folder: Path, plain: bool) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_folder, plain=plain)
    assert (type(pipe.unet), type(pipe.vae)) == (UNet2DConditionModel, AutoencoderKL)
    assert "UNet2DConditionModel with habits(" in repr(pipe.unet)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 77, 24)
    with torch.no_grad():
        own = pipe.unet(x, t, text)
        assert type(own) is Tensor and torch.equal(own, pipe.unet(latents=x, t=t, text=text))
        for answer in (
            pipe.unet(x, t, encoder_hidden_states=text).sample,
            pipe.unet(sample=x, timestep=t, encoder_hidden_states=text)[0],
            pipe.unet(x, t, text, return_dict=False)[0],
            pipe.unet(x, t, text, return_dict=True, cross_attention_kwargs=None).sample,
        ):
            assert torch.equal(answer, own)
        with pytest.raises(SettingsError, match="the U-Net's call has no added_cond_kwargs"):
            pipe.unet(x, t, text, added_cond_kwargs={"text_embeds": text})
        picture = torch.randn(1, 3, 16, 16)
        mean, logvar = pipe.vae.encode(picture)
        assert type(mean) is Tensor and torch.equal(pipe.vae.encode(picture).latent_dist.mode(), mean)
        drawn = pipe.vae.encode(picture, return_dict=False)[0].sample(torch.Generator().manual_seed(0))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn, vae.sample_posterior(mean, logvar, noise))
        assert torch.equal(pipe.vae.decode(mean, return_dict=False)[0], pipe.vae.decode(mean))


def test_the_seam_of_fast_and_that_of_habits(fresh: Any) -> None:
    """fast.remove leaves the habits, and the numbers up to rounding; a hook sees a call of either kind."""
    before, seen = latents(fresh), []
    fast.remove(fresh.unet)
    assert type(fresh.unet) is UNet2DConditionModel and type(fresh.unet.conv_in) is nn.Conv2d
    torch.testing.assert_close(latents(fresh), before, rtol=1e-3, atol=1e-3)
    fast.install(fresh.unet)
    assert torch.equal(latents(fresh), before)
    fresh.unet.register_forward_hook(lambda module, inputs, output: seen.append(type(output)))
    latents(fresh)
    fresh.unet(torch.randn(1, 4, 8, 8), 3, encoder_hidden_states=torch.randn(1, 77, 24))
    assert seen == [Tensor] * 3


def test_a_pipeline_of_the_core_keeps_its_classes(tiny_folder: Path) -> None:
    from minidiff.draw import pipeline

    plain = pipeline.StableDiffusionPipeline.from_pretrained(tiny_folder)
    assert (type(plain.unet), type(plain.vae)) == (unet.UNet2DConditionModel, vae.AutoencoderKL)
    with pytest.raises(TypeError, match="the call has no such arguments: 1 more by position, steps"):
        plain(DOG, 64, steps=3)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_by_name(fresh: Any, pipe: Any) -> None:
    one = latents(with_adapter(fresh, "one"))
    with_adapter(fresh, "two", rank=1)
    fresh.set_adapters(["one", "two"], 0.5)
    assert fresh.strengths() == {"one": 0.5, "two": 0.5}
    half = latents(fresh)
    fresh.disable_lora()
    assert fresh.get_active_adapters() == [] and torch.equal(latents(fresh), latents(pipe))
    fresh.enable_lora()
    assert torch.equal(latents(fresh), half)
    fresh.set_adapters("one")
    assert torch.equal(latents(fresh), one) and fresh.get_active_adapters() == ["one"]
    fresh.delete_adapters("two")
    assert torch.equal(latents(fresh), one) and fresh.strengths() == {"one": 1.0}
    with pytest.raises(SettingsError, match="the pipeline's list of adapters has no two"):
        fresh.delete_adapters(["two"])
    fresh.delete_adapters(["one"])
    assert not lora_layers(fresh.unet) and torch.equal(latents(fresh), latents(pipe))


def test_the_scale_of_one_call(fresh: Any, pipe: Any) -> None:
    with_adapter(fresh)
    whole, none = latents(fresh), latents(fresh, cross_attention_kwargs={"scale": 0.0})
    assert torch.equal(none, latents(pipe)) and not torch.equal(whole, none)
    fresh.set_adapters("default", 0.3)
    third = latents(fresh)
    fresh.set_adapters("default", 0.6)
    assert torch.equal(latents(fresh, cross_attention_kwargs={"scale": 0.5}), third)
    assert fresh.strengths() == {"default": 0.6}


def test_fused_adapters_stay_when_they_are_unloaded(fresh: Any, pipe: Any, tmp_path: Path) -> None:
    """And save_pretrained then writes a model of its own. After unfuse_lora the base is back, to the bit."""
    with_adapter(fresh)
    bits, before = fresh.unet.state_dict(), latents(pipe)
    fresh.fuse_lora(lora_scale=0.5)
    fused = latents(fresh)
    fresh.unfuse_lora()
    assert all(torch.equal(bits[name], now) for name, now in fresh.unet.state_dict().items())
    fresh.set_adapters("default", 0.5)
    torch.testing.assert_close(fused, latents(fresh), rtol=1e-3, atol=1e-3)
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    assert torch.equal(latents(fresh), fused) and not torch.equal(fused, before)
    fresh.save_pretrained(tmp_path)
    again: Any = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again), fused)


def test_lora_weights_saved_from_the_layers(fresh: Any, tmp_path: Path) -> None:
    """Unlike the state dict of peft, this one knows its alpha."""
    fresh.unet.add_adapter(LoraConfig(r=2, lora_alpha=5, use_rslora=True, rank_pattern={"to_v": 1}))
    with_adapter(fresh, "other")
    state = get_peft_model_state_dict(fresh.unet)
    fresh.save_lora_weights(tmp_path, unet_lora_layers=state)
    again: Any = StableDiffusionPipeline.from_pretrained(fresh.name_or_path)
    loaded = again.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert {name.removeprefix("unet."): own.scale for name, own in loaded.modules.items()} == pytest.approx(
        {name: own.scale for name, own in state.items()}
    )
    again.load_lora_weights(loaded)
    assert list(again.strengths()) == ["default", "default_1"] and again.get_active_adapters() == ["default_1"]


def test_what_a_lora_config_cannot_have(fresh: Any) -> None:
    alphas = [{"lora_alpha": wrong} for wrong in (0, -1, float("nan"))]
    for wrong in ({"bias": "all"}, {"init_lora_weights": "pissa"}, *alphas, {"lora_dropout": 1.0}):
        with pytest.raises(AdapterError, match="LoraConfig"):
            fresh.unet.add_adapter(LoraConfig(**wrong))
    assert not lora_layers(fresh.unet)


def test_a_network_without_an_adapter_is_saved_whole(pipe: Any, tmp_path: Path) -> None:
    pipe.unet.save_pretrained(tmp_path / "unet")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        there = Path(pipe.name_or_path, "unet", name)
        assert (tmp_path / "unet" / name).read_bytes() == there.read_bytes()


def test_gradient_checkpointing_by_hand(fresh: Any) -> None:
    with_adapter(fresh)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 24)

    def gradient() -> Tensor:
        fresh.unet.zero_grad()
        fresh.unet(x, 5, encoder_hidden_states=text).sample.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in fresh.unet.parameters() if p.grad is not None])

    plain = gradient()
    fresh.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)


def test_no_warning_of_our_own(pipe: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe, generator=[torch.Generator().manual_seed(0)], return_dict=True)
