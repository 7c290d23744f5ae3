"""The same code, once with diffusers (and peft) and once with minidiff: only the import differs, and the numbers agree."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff.core.guidance import guided

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

NAMES = [name for name in minidiff.__all__ if hasattr(diffusers, name)]
THEIRS = SimpleNamespace(**vars(peft) | {name: getattr(diffusers, name) for name in NAMES})
DOG, CAT = "a photo of a red dog", "a drawing of a blue cat in the snow"
SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]


def seeds(*numbers: int) -> Any:
    made = [torch.Generator().manual_seed(number) for number in numbers]
    return made if len(made) > 1 else made[0]


def both(code: Callable[[Any], Tensor]) -> None:
    """Run the code with each library, and compare its tensors."""
    mine, other = code(minidiff), code(THEIRS)
    assert mine.shape == other.shape and other.isfinite().all() and other.std() > 0.01
    assert (mine - other).abs().max() <= 1e-4 * other.abs().max(), f"{(mine - other).abs().max():.1e}"


def loaded(lib: Any, folder: Path, kind: str = "StableDiffusionPipeline", **options: Any) -> Any:
    pipe = getattr(lib, kind).from_pretrained(folder, safety_checker=None, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


LATENT: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 5.0}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_by_its_class(tiny_folder: Path, name: str) -> None:
    def code(lib: Any) -> Any:
        pipe = loaded(lib, tiny_folder)
        pipe.scheduler = getattr(lib, name).from_config(pipe.scheduler.config)
        return pipe(DOG, generator=seeds(1), **LATENT).images

    both(code)


@pytest.mark.parametrize("karras", [True, False])
def test_changes_to_a_scheduler(tiny_folder: Path, karras: bool) -> None:
    def code(lib: Any) -> Any:
        kind = lib.DPMSolverMultistepScheduler
        scheduler = kind.from_pretrained(tiny_folder, subfolder="scheduler", use_karras_sigmas=karras)
        pipe = loaded(lib, tiny_folder, scheduler=scheduler)
        return pipe(DOG, generator=seeds(1), **LATENT).images

    both(code)


REVERSED = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # theirs give t's noise to 999 - t until a first call


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in REVERSED])
def test_noise_of_a_bare_scheduler(name: str) -> None:
    """The defaults of the class, and its noise."""
    x, noise, t = torch.ones(3, 4, 2, 2), torch.randn(3, 4, 2, 2, generator=seeds(0)), torch.tensor([0, 400, 999])

    def code(lib: Any) -> Tensor:
        noisy: Tensor = getattr(lib, name)().add_noise(x, noise, t)
        return noisy / noisy.std(dim=(1, 2, 3), keepdim=True)

    both(code)


def test_a_scheduler_with_settings_of_its_own(tiny_folder: Path) -> None:
    settings: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)

    def code(lib: Any) -> Any:
        scheduler = lib.DDIMScheduler(**settings, set_alpha_to_one=False)
        return loaded(lib, tiny_folder, scheduler=scheduler)(DOG, generator=seeds(1), **LATENT).images

    both(code)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_generator_for_each_picture(tiny_folder: Path, eta: float) -> None:
    both(lambda lib: loaded(lib, tiny_folder)([DOG, CAT], generator=seeds(3, 9), eta=eta, **LATENT).images)


def test_positions_and_the_plain_tuple(tiny_folder: Path) -> None:
    both(lambda lib: loaded(lib, tiny_folder, "DiffusionPipeline")(DOG, 24, 40, 3, generator=seeds(1), output_type="latent")[0])
    both(lambda lib: loaded(lib, tiny_folder)(DOG, generator=seeds(1), return_dict=False, **LATENT)[0])


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_guidance_rescale(tiny_folder: Path, rescale: float) -> None:
    both(lambda lib: loaded(lib, tiny_folder)(DOG, generator=seeds(1), **LATENT | {"guidance_rescale": rescale}).images)


def test_rescale_noise_cfg() -> None:
    """arXiv 2305.08891, eqs. 15 and 16, beside the reference's function."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    outputs = torch.randn(4, 4, 8, 8, generator=seeds(2))
    without, with_prompt = outputs.chunk(2)
    text = torch.zeros(2, 77, 3)
    mine = guided(lambda x, t, text: outputs, (text,), (text,), 7.5, rescale=0.7)(torch.zeros(2, 4, 8, 8), torch.zeros(2))
    other = rescale_noise_cfg(without + 7.5 * (with_prompt - without), with_prompt, guidance_rescale=0.7)
    torch.testing.assert_close(mine, other)


def test_what_a_callback_sees(tiny_folder: Path) -> None:
    def code(lib: Any) -> Tensor:
        seen: list[Tensor] = []

        def watch(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(torch.cat([tensors["latents"].flatten().clone(), torch.tensor([float(step), float(t)])]))
            return tensors

        loaded(lib, tiny_folder)(DOG, generator=seeds(1), callback_on_step_end=watch, **LATENT)
        return torch.stack(seen)

    both(code)


def test_image_to_image_by_position_with_a_generator_for_each(tiny_folder: Path) -> None:
    start = torch.rand(2, 3, 32, 32, generator=seeds(5))

    def code(lib: Any) -> Any:
        pipe = lib.StableDiffusionImg2ImgPipeline(**loaded(lib, tiny_folder).components)
        pipe.set_progress_bar_config(disable=True)
        return pipe([DOG, CAT], start, 0.5, generator=seeds(3, 9), **LATENT | {"num_inference_steps": 8}).images

    both(code)


def adapter(folder: Path, rank: int, seed: int) -> Path:
    """A LoRA for the tiny model, with a B that is not zero."""
    from minidiff.core.inject import adapter_weights
    from minidiff.files.lora_file import save_lora

    pipe: Any = loaded(minidiff, Path(folder))
    pipe.unet.add_adapter(minidiff.LoraConfig(r=rank, lora_alpha=rank))
    random = torch.Generator().manual_seed(seed)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return save_lora({f"unet.{name}": own for name, own in adapter_weights(pipe.unet).items()}, folder.parent / f"lora-{seed}")


def test_adapters(tiny_folder: Path, tmp_path: Path) -> None:
    """Scale, one weight for several, off and on, fused with a scale, fused and unloaded."""
    files = [adapter(tiny_folder, 2, seed) for seed in (1, 2)]

    def code(lib: Any) -> Tensor:
        pipe = loaded(lib, tiny_folder)
        drawn: list[Tensor] = []

        def draw(**call: Any) -> None:
            drawn.append(pipe(DOG, generator=seeds(1), **LATENT | call).images)

        for name, file in zip(("one", "two"), files):
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        pipe.set_adapters(["one", "two"], 0.5)
        assert pipe.get_active_adapters() == ["one", "two"]
        draw()
        draw(cross_attention_kwargs={"scale": 0.4})
        pipe.disable_lora()
        draw()
        pipe.enable_lora()
        pipe.set_adapters("two", 0.7)
        draw()
        pipe.delete_adapters("one")
        pipe.fuse_lora(lora_scale=0.5)
        pipe.unload_lora_weights()
        draw()
        return torch.cat(drawn)

    both(code)


def test_what_the_networks_answer(tiny_folder: Path) -> None:
    """A training step by hand, as far as its loss and its gradient."""
    x, noise = torch.rand(2, 3, 16, 16, generator=seeds(0)) * 2 - 1, torch.randn(2, 4, 8, 8, generator=seeds(1))
    t, text = torch.tensor([30, 700]), torch.randn(2, 77, 24, generator=seeds(2))

    def code(lib: Any) -> Tensor:
        pipe = loaded(lib, tiny_folder)
        pipe.unet.requires_grad_(False)
        unet = lib.get_peft_model(pipe.unet, lib.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
        found = [(name, p) for name, p in unet.named_parameters() if "lora" in name]
        named = {name.removeprefix("base_model.model.").removesuffix(".weight"): p for name, p in found}
        lora, random = [named[name] for name in sorted(named)], torch.Generator().manual_seed(4)
        for p in lora:
            p.data.copy_(torch.randn(p.shape, generator=random) * 0.1)
        latents = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
        noisy = pipe.scheduler.add_noise(latents.detach(), noise, t)
        predicted = unet(noisy, t, encoder_hidden_states=text).sample
        assert torch.equal(predicted, unet(noisy, t, text, return_dict=False)[0])
        predicted.square().mean().backward()
        decoded = pipe.vae.decode(latents.detach(), return_dict=False)[0]
        return torch.cat([predicted.flatten(), decoded.flatten(), *(p.grad.flatten() * 10 for p in lora)]).detach()

    both(code)
