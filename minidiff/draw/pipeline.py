r"""From a prompt to a picture: the three networks of Stable Diffusion, and what goes from one to the next.

    prompt --text encoder--> (B, 77, D) --\
    noise  (B, 4, h, w) ----------------- U-Net, once a step, through guidance and a sampler --> latents --VAE--> picture
                                         /
    a picture to start from --VAE-------/   if there is one: image to image, inpainting, upscaling
    B pictures   D text width   H W picture height and width   h w = H/8, W/8 latent height and width
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff.core import inject, textual_inversion
from minidiff.core.config import NoiseConfig
from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.grids import Step, sampler_named
from minidiff.core.guidance import guided
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.text import encode_prompt
from minidiff.core.transformer import reading_once
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL, sample_posterior
from minidiff.draw.call import (
    Draw,
    as_list,
    at_strengths,
    check_output_type,
    encode_both,
    finished,
    loras_of,
    noise_source,
    pairs,
    whole,
)
from minidiff.draw.canvas import Canvas, blank, on_picture
from minidiff.draw.nonfinite import blame, checked
from minidiff.draw.picture_input import Pictures, as_mask, as_pictures, fitted, size_of
from minidiff.draw.prompting import Prompt, parse_prompt
from minidiff.draw.tiles import tiled
from minidiff.fast.frozen import standing_still
from minidiff.fast.graphs import Graphs
from minidiff.files import lora_file as lora
from minidiff.files import word_file as embeddings
from minidiff.files.model_files import check_parts_fit, read_folder, read_single_file, write_folder

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

MAX_SIDE = 8192  # pixels: beyond, attention takes days


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL pictures; or one tensor, where `output_type` asked for it."""

    images: Any


class StableDiffusionPipeline:
    """Text to image, image to image, inpainting. The parts are plain attributes: `unet`, `vae`, `text_encoder`, `tokenizer`."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: "CLIPTextModel",
        tokenizer: "CLIPTokenizer",
        noise_config: NoiseConfig,
        sampler: str = "ddim",
        name_or_path: str = "",
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.noise_config, self.schedule = noise_config, NoiseSchedule.from_config(noise_config)
        self.sampler, self.name_or_path, self.progress_bar = sampler, name_or_path, True
        self.tile_size: int | None = None
        self.graphs: Graphs | None = None  # with them, no prompt is remembered: a replay would be of another one's
        check_parts_fit(self)

    # --- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, layerwise_casting: bool = False
    ) -> "StableDiffusionPipeline":
        """Read a folder in the diffusers layout, or a hub id whose files are in the local cache.

        The VAE stays in fp32 whatever `torch_dtype` says: in fp16 it overflows, and the picture is black.
        With `layerwise_casting`, weights of the U-Net that the file has in half precision stay so (fast/frozen.py);
        a LoRA that is fused into them is rounded to it.
        Raises WeightsError for anything that is missing, damaged or does not fit.
        """
        return cls(*read_folder(folder, torch_dtype, layerwise_casting))

    @classmethod
    def from_single_file(
        cls, path: str | Path, tokenizer: str | Path, torch_dtype: torch.dtype = torch.float32
    ) -> "StableDiffusionPipeline":
        """Read an SD 1.x checkpoint in one LDM/CompVis file. It has no vocabulary: `tokenizer` is any SD 1.x's folder."""
        return cls(*read_single_file(path, tokenizer, torch_dtype))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder that `from_pretrained` reads, and diffusers too; weights as they are, or cast to `dtype`.

        Raises AdapterError while a LoRA or a new word is attached: take it out, or `fuse_lora` and eject, first.
        """
        write_folder(self, folder, dtype)

    def to(self, device: str | torch.device) -> "StableDiffusionPipeline":
        """Move the networks."""
        parts: tuple[nn.Module, ...] = (self.unet, self.vae, self.text_encoder)
        for module in parts:
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which the U-Net computes: that of its norms, which no layer widens, and no adapter changes."""
        return self.unet.conv_norm_out.weight.dtype

    # --- from a prompt to a picture ----------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float | None = None,
        clip_skip: int = 0,
        eta: float = 0.0,
        timestep_spacing: str | None = None,
        use_karras_sigmas: bool | None = None,
        output_type: str = "pil",
        callback: Callable[[Step], None] | None = None,
    ) -> PipelineOutput:
        """Draw one picture for each prompt (times `num_images_per_prompt`). SettingsError for what cannot be drawn.

        `width`, `height`: pixels; the model's own if not given. `guidance_scale`: 1 or less turns guidance off, and the
        negative prompt with it. `sampler` and its settings: see samplers.py. `clip_skip`: leave out so many of the text
        encoder's last layers. `seed`: picture i is drawn from seed + i (or from seed[i]), alone or in a batch, on any device;
        `generator` draws in the order of diffusers instead; `latents` (B, 4, h, w): unit-variance noise to start from.
        `prompt_embeds`, `negative_prompt_embeds` (B, 77 k, D), from `encode_prompt`, stand in for the prompts.
        `image`: a picture to start from, scaled to `width` and `height` if given; the last `strength` of the steps are walked
        (0.8 if nothing is said). `mask_image`: only what is white in it is drawn, at `strength` 1 if nothing is said.
        `output_type`: "pil", "pt" (B, 3, H, W) in [-1, 1], "latent" (B, 4, h, w). `callback` sees each `Step`."""
        check_output_type(output_type)
        prompts, negatives = pairs(prompt, negative_prompt, num_images_per_prompt, prompt_embeds)
        with at_strengths(self.adaptable, loras_of(prompts, negatives)):
            embeds = (prompt_embeds, negative_prompt_embeds)
            text, no_text = encode_both(self, prompts, negatives, clip_skip, embeds, guidance_scale > 1)
            pictures = None if image is None else as_pictures(image, len(text))
            shape = self.latent_shape(len(text), height, width, pictures)
            draw = noise_source(shape, seed, generator)
            canvas = self.canvas(pictures, mask_image, shape, strength, draw, latents)
            model = guided(canvas.unet_call, text, no_text, guidance_scale)
            steps = sampler_named(self.sampler if sampler is None else sampler)(
                *(model, canvas.noise.to(self.device), self.schedule, whole("num_inference_steps", num_inference_steps), draw),
                image=canvas.image,
                strength=canvas.strength,
                fix_x0=canvas.fix_x0,
                spacing=timestep_spacing,
                karras=use_karras_sigmas,
                eta=eta,
            )
            last = self.walked(steps, num_inference_steps, callback)
        if output_type == "latent":
            return PipelineOutput(last.x)
        return PipelineOutput(finished(canvas.paste(self.decode(last.x)), output_type))

    def canvas(
        self,
        pictures: Tensor | None,
        mask_image: Pictures | None,
        shape: tuple[int, int, int, int],
        strength: float | None,
        draw: Draw,
        latents: Tensor | None,
    ) -> Canvas:
        """What the sampler begins with, for latents of `shape`."""
        if pictures is None:
            for name, value in (("mask_image", mask_image), ("strength", strength)):
                if value is not None:
                    raise SettingsError(f"{name} was given and there is no image to work on; give one, or leave {name} out.")
            return blank(self, shape, draw, latents)
        height, width = (side * self.vae.config.downscale for side in shape[2:])
        mask = None if mask_image is None else fitted(as_mask(mask_image, pictures), height, width)
        return on_picture(self, fitted(pictures, height, width), mask, strength, draw, latents)

    def encode_prompt(self, prompts: Sequence[str | Prompt], clip_skip: int = 0, chunks: int = 1) -> Tensor:
        """Prompts in the prompt language -> (B, 77 k, D) in the U-Net's dtype, k >= `chunks`; each distinct one once.

        LoRA tags are left to `__call__`.
        """
        parsed = [parse_prompt(p) if isinstance(p, str) else p for p in prompts]
        distinct = list(dict.fromkeys(parsed))
        rows = encode_prompt(self.tokenizer, self.text_encoder, distinct, self.placeholders, clip_skip=clip_skip, chunks=chunks)
        if not rows.isfinite().all():
            raise MinidiffError(f"NaN or infinity comes out of the text encoder{blame(self.text_encoder)}.")
        return rows[[distinct.index(p) for p in parsed]].to(self.dtype)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions as training reads them, without the prompt language and cut off at 75 tokens -> (B, 77, D)."""
        return encode_prompt(self.tokenizer, self.text_encoder, captions, self.placeholders).to(self.dtype)

    def encode_pictures(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w), drawn from the VAE's posterior with `noise`."""
        x, tile = pictures.to(self.vae.post_quant_conv.weight), self.tile_size or MAX_SIDE
        encode = tiled(lambda part: torch.cat(self.vae.encode(part), dim=1), tile, tile // 4, unit=self.vae.config.downscale)
        mean, logvar = torch.cat([encode(row[None]) for row in x]).chunk(2, dim=1)
        return sample_posterior(mean, logvar, noise.to(mean)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> pictures (B, 3, H, W) in [-1, 1], one at a time to spare memory."""
        z = latents.to(self.vae.post_quant_conv.weight) / self.vae.config.scaling_factor
        cells = (self.tile_size or MAX_SIDE) // self.vae.config.downscale
        decode = tiled(checked("vae", self.vae, self.vae.decode), cells, cells // 4)
        return torch.cat([decode(row[None]) for row in z]).clamp(-1, 1)

    def unet_call(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The U-Net, in tiles where `tile_size` is set; NaN and infinity are an error that names the module."""
        cells = (self.tile_size or MAX_SIDE) // self.vae.config.downscale
        call = checked("unet", self.unet, partial(self.graphs.call, self.unet) if self.graphs else self.unet)
        return tiled(lambda part: call(part, t, text), cells, cells // 4)(x)

    @property
    def for_inpainting(self) -> bool:
        """Does the U-Net see the mask and the picture around it, beside the noisy latents?"""
        return self.unet.config.in_channels != self.vae.config.latent_channels

    def latent_shape(
        self, count: int, height: int | None, width: int | None, pictures: Tensor | None = None
    ) -> tuple[int, int, int, int]:
        """(B, 4, h, w) for sides in pixels, or those of `pictures`, or the model's own; SettingsError for impossible ones."""
        factor, usual = self.vae.config.downscale, self.unet.config.sample_size
        if pictures is not None:
            height, width = size_of(pictures, height, width, factor)
        sides = []
        for flag, side in (("height", height), ("width", width)):
            side = usual * factor if side is None else whole(flag, side)
            if not factor <= side <= MAX_SIDE or side % factor:
                below = min(max(side // factor, 1), MAX_SIDE // factor - 1) * factor
                raise SettingsError(
                    f"{flag} is {side}; it must be a multiple of {factor} up to {MAX_SIDE}: {below} or {below + factor}."
                )
            sides.append(side // factor)
        return count, self.vae.config.latent_channels, sides[0], sides[1]

    def set_tile_size(self, pixels: int | None) -> None:
        """Draw large pictures in overlapping tiles of so many pixels, so that they need the memory of one; None: whole."""
        cell = self.vae.config.downscale
        if pixels is not None and (whole("tile_size", pixels) < 8 * cell or pixels % cell):
            raise SettingsError(f"tile_size is {pixels}; it must be a multiple of {cell}, at least {8 * cell}.")
        self.tile_size = pixels

    def set_cuda_graph(self, on: bool) -> None:
        """Record the U-Net's calls on a GPU, and replay them (graphs.py); not yet measured. Not for a CPU."""
        self.graphs = (self.graphs or Graphs()) if on else None

    def set_progress_bar_config(self, disable: bool = False) -> None:
        self.progress_bar = not disable

    def walked(self, steps: Iterable[Step], total: int, callback: Callable[[Step], None] | None) -> Step:
        """The last of a sampler's steps; a progress bar on stderr on the way, and `callback` sees each."""
        from tqdm import tqdm

        bar = tqdm(total=total, unit="step", leave=False, disable=not self.progress_bar)
        once = None if self.graphs or callback else self.unet  # a callback may change an adapter
        with bar, standing_still([self.unet], large=True), reading_once(once):
            for step in steps:
                bar.total = step.total  # the sampler knows better: Heun calls the network twice a step
                bar.update()
                if callback:
                    callback(step)
        return step

    # --- LoRA ----------------------------------------------------------------------------------------------------------

    @property
    def adaptable(self) -> nn.ModuleDict:
        """The networks that adapters go into, as one."""
        return nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})

    def load_lora_weights(
        self,
        path: str | Path,
        adapter_name: str = "default",
        weight_name: str | None = None,
        alpha: float | None = None,
        strict: bool = True,
    ) -> lora.LoRAFile:
        """Attach the adapter of a file or folder, and switch it on alone; what came of it, as one line, if printed.

        `alpha` is for files that do not say it. A file of which only a part matches this model is an AdapterError;
        with `strict=False` that part is attached, and the line says how many tensors were left out.
        """
        return lora.load_lora(dict(self.adaptable.items()), path, adapter_name, weight_name, alpha, strict)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Sequence[float] | None = None) -> None:
        """Switch on these adapters, each at its weight (1 if none are given), and every other one off."""
        inject.set_adapters(self.adaptable, as_list(adapter_names), adapter_weights)

    def fuse_lora(self) -> None:
        """Fold the adapters into the weights: the same pictures, a little faster."""
        inject.merge(self.adaptable)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, to the bit."""
        inject.unmerge(self.adaptable)

    def unload_lora_weights(self) -> None:
        """Take every adapter out; the base model is what it was, to the bit."""
        inject.eject(self.adaptable)

    # --- textual inversion -------------------------------------------------------------------------------------------

    @property
    def placeholders(self) -> dict[str, list[int]]:
        """The new words that prompts may use, and the ids of their vectors."""
        return textual_inversion.placeholders(self.text_encoder)

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> embeddings.Embedding:
        """Learn the word of a file or folder, or call it `token`; what came of it, as one line, if printed."""
        return embeddings.load_embedding(self.tokenizer, self.text_encoder, path, token)

    def unload_textual_inversion(self) -> None:
        """Forget every new word; the text encoder is what it was, to the bit."""
        textual_inversion.eject(self.text_encoder)
