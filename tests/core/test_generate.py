"""The three stations, from the plain parts of core/ alone, draw what the pipeline draws."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from minidiff.core.config import NoiseConfig
from minidiff.core.generate import Stations, generate
from minidiff.core.grids import SAMPLERS, Step
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.text import encode, tokenize
from minidiff.draw.pipeline import StableDiffusionPipeline, noise_source

NOISE = NoiseSchedule.from_config(NoiseConfig())
PROMPTS, SHAPE = ["a photo of a red dog", "a drawing of a blue cat"], (2, 4, 8, 8)


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float64)  # so that rounding does not matter
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("sampler", ["euler_a", "dpm++_2m"])
def test_the_plain_stations_draw_what_the_pipeline_draws(pipe: StableDiffusionPipeline, sampler: str, scale: float) -> None:
    stations = Stations(
        encode=lambda prompts: (encode(pipe.text_encoder, tokenize(pipe.tokenizer, prompts)),),
        unet=pipe.unet,
        decode=lambda z: pipe.vae.decode(z.float() / pipe.vae.config.scaling_factor).clamp(-1, 1),
        schedule=pipe.schedule,
    )
    draw = noise_source(SHAPE, [5, 6])
    *steps, pictures = generate(stations, PROMPTS, ["", ""], draw("latents"), draw, 3, scale, SAMPLERS[sampler])
    assert [step.index for step in steps if isinstance(step, Step)] == [0, 1, 2]
    assert isinstance(pictures, Tensor) and not pictures.requires_grad
    same = pipe(PROMPTS, num_inference_steps=3, seed=5, sampler=sampler, guidance_scale=scale, output_type="pt").images
    torch.testing.assert_close(pictures / 2 + 0.5, same, rtol=1e-4, atol=1e-4)


def test_negative_prompts_are_encoded_only_with_guidance() -> None:
    asked = []

    def encode(prompts: list[str]) -> tuple[Tensor]:
        asked.append(prompts)
        return (torch.zeros(1, 77, 3),)

    for scale in (1.0, 2.0):
        stations = Stations(encode, lambda x, t, text: x, lambda z: z, NOISE)
        list(generate(stations, ["a"], ["b"], torch.zeros(1, 4, 2, 2), lambda i: torch.zeros(1), 2, scale, SAMPLERS["ddim"]))
    assert asked == [["a"], ["a"], ["b"]]


def test_a_reader_may_stop_before_the_pictures() -> None:
    """The generator does nothing ahead of time: who takes two steps asks the network twice and decodes nothing."""
    calls = []

    def unet(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        calls.append("unet")
        return x

    stations = Stations(lambda prompts: (torch.zeros(1, 77, 3),), unet, lambda z: calls.append("decode") or z, NOISE)
    walk = generate(stations, ["a"], [""], torch.zeros(1, 4, 2, 2), lambda i: torch.zeros(1), 5, 1.0, SAMPLERS["ddim"])
    next(walk), next(walk)
    assert calls == ["unet"] * 2
