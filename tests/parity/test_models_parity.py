"""The networks beside diffusers and transformers, with the same random weights: tiny ones here, SD 1.5's with `-m slow`.

What is compared: the largest difference, relative to the largest number of the reference's answer, in fp32 on one thread.
The slow tests print what they measured (`pytest -m slow -s tests/parity/test_models_parity.py`).
"""

import runpy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sizes import TINY_REFINER, TINY_SD2, TINY_UNET, TINY_VAE, TINY_XL
from torch import Tensor, nn

from minidiff.core.blocks import timestep_embedding
from minidiff.core.config import SD15_UNET, SD15_VAE, UNetConfig, VAEConfig
from minidiff.core.text import encode, tokenize
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.prompting import parse_prompt
from minidiff.files.folder import SD15_TEXT, config_values
from minidiff.files.text_files import build_text_encoder, to_file_keys
from minidiff.files.weights import load_into, save

diffusers = pytest.importorskip("diffusers")

MAKER = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "make_models.py"))
TOLERANCE = 1e-5


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.isfinite().all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights that keep variances, drawn fast: matrices N(0, 1 / fan-in), norms about 1, small biases."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, old in model.state_dict().items():
        numbers = torch.randn(old.shape, generator=generator)
        if old.ndim == 1:
            state[key] = numbers.mul_(0.01 if key.endswith("bias") else 0.1).add_(0.0 if key.endswith("bias") else 1.0)
        else:
            state[key] = numbers.mul_((old.numel() / len(old)) ** -0.5)
    return state


def pair(kind: type, config: UNetConfig | VAEConfig) -> tuple[Any, Any]:
    """minidiff's model and diffusers', which share one set of weights in memory."""
    name = kind.__name__
    with torch.device("meta"):
        ours, theirs = kind(config), getattr(diffusers, name).from_config(config_values(config, name))
    state = random_state(ours)
    for model in (ours, theirs):
        model.load_state_dict(state, assign=True)
    return ours.eval(), theirs.eval()


def unet_error(config: UNetConfig, sides: tuple[int, int], batch: int = 1, scale: float = 1.0) -> float:
    ours, theirs = pair(UNet2DConditionModel, config)
    x, text = noise(batch, 4, *sides) * scale, noise(batch, 77, config.cross_attention_dim)
    t = torch.tensor([981, 1, 500][:batch])
    return error(ours(x, t, text), theirs(x, t, text).sample)


def vae_errors(config: VAEConfig, side: int, scale: float = 1.0) -> tuple[float, float]:
    ours, theirs = pair(AutoencoderKL, config)
    x, z = noise(1, 3, side, side).clamp(-1, 1) * scale, noise(1, 4, side // config.downscale, side // config.downscale) * scale
    posterior = theirs.encode(x).latent_dist
    encode = error(torch.cat(ours.encode(x), dim=1), torch.cat([posterior.mean, posterior.logvar], dim=1))
    return encode, error(ours.decode(z), theirs.decode(z).sample)


# --- tiny ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", MAKER["SCALES"])
@pytest.mark.parametrize("case", MAKER["INPUTS"])
@torch.no_grad()
def test_the_goldens_are_what_diffusers_says_today(case: str, scale: float) -> None:
    from safetensors.torch import load_file

    golden = load_file(Path(__file__).parents[1] / "golden" / "models.safetensors")[f"{case} x {scale:g}"]
    assert error(golden, MAKER["exactly"](case, scale)) <= 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("sides", [(8, 8), (9, 7), (7, 16), (1, 5)])
@torch.no_grad()
def test_tiny_unet(sides: tuple[int, int], scale: float) -> None:
    assert unet_error(TINY_UNET, sides, batch=3, scale=scale) <= TOLERANCE


THREE_LEVELS = UNetConfig(
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(16, 24, 40),
    layers_per_block=2,
    cross_attention_dim=24,
    attention_head_dim=4,
    norm_num_groups=8,
)


@pytest.mark.parametrize("sides", [(8, 8), (9, 7), (13, 10)])
@torch.no_grad()
def test_a_unet_of_three_levels_and_two_layers(sides: tuple[int, int]) -> None:
    assert unet_error(THREE_LEVELS, sides) <= TOLERANCE


@pytest.mark.parametrize(("config", "bound"), [(TINY_SD2, 1e-6), (TINY_XL, 1e-6), (TINY_REFINER, 3e-6)])
@torch.no_grad()
def test_tiny_families(config: UNetConfig, bound: float) -> None:
    """SD 2, SDXL and its refiner: unequal heads and depths, and every parameter away from its initial value."""
    ours, theirs = pair(UNet2DConditionModel, config)
    x, text, t = noise(2, 4, 8, 8), noise(2, 77, config.cross_attention_dim), torch.tensor([981, 1])
    if not config.addition_time_embed_dim:
        assert error(ours(x, t, text), theirs(x, t, text).sample) <= bound
        return
    numbers = 5 if config is TINY_REFINER else 6
    ids, pooled = torch.tensor([[1024.0, 768, 0, 64, 1000, 512][:numbers]] * 2), noise(2, 24)
    sizes = timestep_embedding(ids.flatten(), config.addition_time_embed_dim).reshape(2, -1)
    expected = theirs(x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    assert error(ours(x, t, text, torch.cat([pooled, sizes], dim=1)), expected) <= bound


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize(
    "config", [TINY_VAE, VAEConfig(block_out_channels=(8, 16, 24, 24), layers_per_block=2, norm_num_groups=4)]
)
@torch.no_grad()
def test_tiny_vae(config: VAEConfig, scale: float) -> None:
    assert max(vae_errors(config, 32, scale)) <= TOLERANCE


# --- folders, both ways ----------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(pipe: Any) -> list[Tensor]:
    """What the three networks of a pipeline of either kind say."""
    ids = torch.arange(77)[None] % 50
    x, z, picture = noise(1, 4, 9, 7), noise(1, 4, 4, 4), noise(1, 3, 8, 8)
    text = pipe.text_encoder(input_ids=ids).last_hidden_state
    if isinstance(pipe, StableDiffusionPipeline):
        return [text, pipe.unet(x, 300, text), pipe.vae.decode(z), torch.cat(pipe.vae.encode(picture), dim=1)]
    posterior = pipe.vae.encode(picture).latent_dist
    parameters = torch.cat([posterior.mean, posterior.logvar], dim=1)
    return [text, pipe.unet(x, 300, text).sample, pipe.vae.decode(z).sample, parameters]


def their_pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def test_a_folder_of_ours_in_diffusers(tiny_folder: Path) -> None:
    ours, theirs = StableDiffusionPipeline.from_pretrained(tiny_folder), their_pipeline(tiny_folder)
    assert [error(a, b) <= TOLERANCE for a, b in zip(answers(ours), answers(theirs))] == [True] * 4
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"
    prompts = ["a photo of a red dog", "", "ünknown wörds 42!"]
    batch = theirs.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    expected = theirs.text_encoder(batch.input_ids)[0]
    assert error(encode(ours.text_encoder, tokenize(ours.tokenizer, prompts)), expected) <= TOLERANCE


@pytest.mark.parametrize("clip_skip", [0, 1])
@torch.no_grad()
def test_clip_skip_is_that_of_diffusers(tiny_folder: Path, clip_skip: int) -> None:
    """Its `encode_prompt(clip_skip=n)`. It reads `text_encoder.text_model`, which transformers 5 does not have."""
    ours, theirs = StableDiffusionPipeline.from_pretrained(tiny_folder), their_pipeline(tiny_folder)
    if not hasattr(theirs.text_encoder, "text_model"):
        object.__setattr__(theirs.text_encoder, "text_model", theirs.text_encoder)  # nn.Module's own would make a circle
    for prompt in ("a photo of a red dog", ""):
        expected = theirs.encode_prompt(prompt, "cpu", 1, False, clip_skip=clip_skip or None)[0]
        text = ours.encode_text([parse_prompt(prompt)], clip_skip)[0]
        assert error(text, expected) <= TOLERANCE


def test_a_folder_of_diffusers_in_ours(tiny_folder: Path, tmp_path: Path) -> None:
    theirs = their_pipeline(tiny_folder)
    theirs.save_pretrained(tmp_path)
    ours = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert [error(a, b) <= TOLERANCE for a, b in zip(answers(ours), answers(theirs))] == [True] * 4
    again = StableDiffusionPipeline.from_pretrained(tiny_folder)
    for a, b in ((ours.unet, again.unet), (ours.vae, again.vae), (ours.text_encoder, again.text_encoder)):
        assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())
    assert ours.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    assert (ours.unet.config, ours.vae.config) == (again.unet.config, again.vae.config)
    assert ours.noise_config == replace(again.noise_config, timestep_spacing="leading")  # diffusers writes its defaults out


# --- SD 1.5's full size ----------------------------------------------------------------------------------------------


def measured(what: str, measure: Callable[[], float]) -> None:
    begin = time.time()
    largest = measure()
    print(f"\n{what}: {largest:.2e} of the largest number, {time.time() - begin:.0f} s")
    assert largest <= TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_sd15_unet_at_64x64() -> None:
    measured("U-Net, 64x64 latents", lambda: unet_error(SD15_UNET, (64, 64)))


@pytest.mark.slow
@torch.no_grad()
def test_sd15_vae_at_512() -> None:
    errors = {}

    def both() -> float:
        errors["encode"], errors["decode"] = vae_errors(SD15_VAE, 512)
        print(errors)
        return max(errors.values())

    measured("VAE, 512x512 pixels, encode and decode", both)


@pytest.mark.slow
@torch.no_grad()
def test_sd15_text_encoder(tmp_path: Path) -> None:
    """transformers' own model and its own loader, beside minidiff's reading of the same folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        ours = build_text_encoder(SD15_TEXT, "SD 1.5")
    save(to_file_keys(random_state(ours)), tmp_path / "model.safetensors")
    CLIPTextConfig(**SD15_TEXT).save_pretrained(tmp_path)
    load_into(ours, tmp_path / "model.safetensors")
    theirs = CLIPTextModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    words = torch.randint(49406, (2, 75), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([torch.full((2, 1), 49406), words, torch.full((2, 1), 49407)], dim=1)
    ids[1, 10:] = 49407  # a short prompt, filled up

    def measure() -> float:
        return error(ours(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)

    measured("text encoder, two prompts", measure)
