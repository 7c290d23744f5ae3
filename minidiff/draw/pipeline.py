"""StableDiffusionPipeline: the field's API over core/generate.py, which says how a prompt becomes a picture.

B pictures   D text width   H W picture height and width   h w = H/8, W/8 latent height and width
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.generate import Stations, generate
from minidiff.core.grids import Step
from minidiff.core.guidance import Text, UNetCall
from minidiff.core.text import LENGTH, embed_sizes, tokenize
from minidiff.core.vae import sample_posterior
from minidiff.draw.arguments import (
    EMBEDS,
    Draw,
    Generators,
    Pair,
    Side,
    as_int,
    both_sides,
    check_steps,
    noise_source,
    sampler_for,
    sizes_of,
)
from minidiff.draw.canvas import Canvas, Pictures, as_mask, as_pictures, fitted, on_picture, size_of
from minidiff.draw.control import Control, Numbers, control_of
from minidiff.draw.lora_tags import at_strengths, loras_of
from minidiff.draw.model import Model
from minidiff.draw.prompting import Prompt, count_chunks, encode_prompts, parse_prompt
from minidiff.draw.speed import fast
from minidiff.draw.tiles import in_tiles, tiled

MAX_SIDE = 8192  # pixels: beyond, attention takes days
ONE_STEP = (
    "num_inference_steps is 1, which leaves noise or a blur; take about 20. Models and LoRAs that were distilled to few steps "
    'draw in 1 to 8 with sampler "lcm", or with timestep_spacing "trailing" and guidance_scale 1.'
)
GUIDED_TURBO = (
    "guidance_scale is {}; by its scheduler, Euler with trailing timestep_spacing, this is a turbo model, which draws in 1 to "
    "4 steps with guidance_scale 0."
)
NONFINITE = (
    "NaN or infinity comes out of the {}, so the picture would be black. Where half precision overflowed, run in float32 or "
    "bfloat16 (torch_dtype); where training diverged, take an earlier checkpoint; else get the model's files again."
)

NO_PICTURE = "an IP-Adapter is loaded, and there is no ip_adapter_image; give one, or unload_ip_adapter."
NO_ADAPTER = "ip_adapter_image is given, and no IP-Adapter is loaded that looks at it; load_ip_adapter first."


class PipelineOutput(NamedTuple):
    """`images`: PIL pictures; or one tensor or array, if `output_type` says so."""

    images: Any
    nsfw_content_detected: None = None  # of other libraries; nothing is looked for here


class StableDiffusionPipeline(Model):
    """Text to image, image to image, inpainting. The parts are plain attributes: `unet`, `vae`, `text_encoder`, `tokenizer`."""

    conditioning_scale: ClassVar = 1.0  # of a ControlNet, where a call gives none

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the U-Net computes: that of its norms, which neither layerwise casting nor adapters change."""
        return self.unet.conv_norm_out.weight.dtype

    @property
    def placeholders(self) -> dict[str, list[int]]:
        """The new words that prompts may use, and the ids of their vectors."""
        return dict(getattr(self.text_encoder.get_input_embeddings(), "placeholders", {}))

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = None, *positional: Any, negative_prompt: str | Sequence[str] | None = None,
        width: int | None = None, height: int | None = None, num_inference_steps: int = 30, guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0, num_images_per_prompt: int = 1, sampler: str | None = None,
        seed: int | Sequence[int] | None = None, generator: Generators | None = None, latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None, negative_pooled_prompt_embeds: Tensor | None = None,
        original_size: Pair | None = None, crops_coords_top_left: Pair | None = None, target_size: Pair | None = None,
        negative_original_size: Pair | None = None, negative_crops_coords_top_left: Pair | None = None,
        negative_target_size: Pair | None = None, image: Pictures | None = None, mask_image: Pictures | None = None,
        strength: float | None = None, ip_adapter_image: Any = None, clip_skip: int = 0, eta: float = 0.0,
        timestep_spacing: str | None = None, use_karras_sigmas: bool | None = None, control_image: Any = None,
        controlnet_conditioning_scale: Numbers | None = None, control_guidance_start: Numbers = 0,
        control_guidance_end: Numbers = 1, guess_mode: bool = False, output_type: str = "pil",
        callback: Callable[[Step], None] | None = None, **field: Any,
    ) -> PipelineOutput:  # fmt: skip
        """Draw one picture for each prompt (times `num_images_per_prompt`). SettingsError for impossible settings.

        `width`, `height`: pixels, default the model's own. `guidance_scale`: 1 or less turns guidance and the negative prompt
        off; `guidance_rescale`: see core/guidance.py. `sampler` and its settings: see core/grids.py. `clip_skip`: leave out so
        many of the text encoder's last layers. `seed`: picture i uses seed + i (or seed[i]), alone or in a batch, on any
        device; `generator`, or one for each picture, draws in the order of diffusers instead; `latents` (B, 4, h, w): noise to
        start from. `prompt_embeds`, `negative_prompt_embeds` (B, 77 k, D), from `encode_prompt`, replace the prompts. `image`:
        a picture to start from, scaled to `width` and `height` if given; the last `strength` (default 0.8) of the steps are
        taken. `mask_image`: only its white part is drawn (default `strength` 1). `ip_adapter_image`: a picture, or several side
        by side, that the IP-Adapter looks at. `control_image`: the hint for `controlnet`; for it and the four arguments after
        it see draw/control.py. `output_type`: "pil", "pt" (B, 3, H, W) in [0, 1], "np" (B, H, W, 3), or "latent". `callback`
        sees each `Step`. SDXL alone: `pooled_prompt_embeds` (B, P), the second half of `encode_prompt`; and, as (height, width)
        or (top, left), the sizes that core/text.py explains."""
        if positional or field:  # the way other libraries call it: draw/habits.py
            return self.in_other_words(dict(locals()))
        encoded = (prompt_embeds, pooled_prompt_embeds), (negative_prompt_embeds, negative_pooled_prompt_embeds)
        yes, no = both_sides((prompt, encoded[0]), (negative_prompt or "", encoded[1]), num_images_per_prompt)
        prompts, negatives = yes.prompts, no.prompts
        chunks = count_chunks(self.tokenizer, prompts + negatives if guidance_scale > 1 else prompts, self.placeholders)
        chunks = max(chunks, *(side.encoded[0].shape[1] // LENGTH if side.encoded else 1 for side in (yes, no)))
        pictures = None if image is None else as_pictures(image, len(yes))
        when = control_guidance_start, control_guidance_end
        control = self.control(control_image, controlnet_conditioning_scale, *when, guess_mode, guidance_scale > 1)
        shape = self.latent_shape(len(yes), height, width, control.pictures[0][0] if control and image is None else pictures)
        drawn = (shape[2] * self.downscale, shape[3] * self.downscale)
        sizes = sizes_of((*drawn, 0, 0, *drawn), original_size, crops_coords_top_left, target_size)
        less = sizes_of(sizes, negative_original_size, negative_crops_coords_top_left, negative_target_size)
        zeros = self.force_zeros_for_empty_prompt and negative_prompt is None
        yes, no = replace(yes, sizes=sizes), replace(no, sizes=less, zeros=zeros)
        draw = noise_source(shape, seed, generator, latents)
        canvas = self.canvas(pictures, mask_image, strength, shape, draw, control)
        steps = as_int("num_inference_steps", num_inference_steps)
        walk = self.walker(canvas, steps, sampler, timestep_spacing, use_karras_sigmas, eta)
        self.check_guidance(guidance_scale)
        text = partial(self.encode_side, clip_skip=clip_skip or 0, chunks=chunks)
        encode = self.beside_picture(text, ip_adapter_image, yes)
        stations = Stations(encode, canvas.unet, lambda latents: canvas.paste(self.decode(latents)), self.schedule)
        noise = canvas.noise.to(self.device)
        if control:
            control.count(walk(lambda x, t: x, noise, self.schedule, steps, lambda i: noise), LENGTH * chunks)
        drawing = generate(stations, yes, no, noise, draw, steps, guidance_scale, walk, guidance_rescale)
        named = any(one.loras for one in prompts + negatives)
        with at_strengths(self.adaptable, loras_of(prompts, negatives)) if named else nullcontext():
            return PipelineOutput(self.run(drawing, steps, callback, output_type))

    def run(self, stations: Iterator[Any], steps: int, callback: Callable[[Step], None] | None, output_type: str) -> Any:
        """Go through the stations of `generate`: the pictures, or the last latents. A bar and `callback` see each step."""
        from tqdm import tqdm

        if output_type not in ("pil", "pt", "np", "latent"):
            raise SettingsError(f'output_type "{output_type}" is unknown; it is pil, pt, np or latent.')

        bar = tqdm(total=min(steps, len(self.schedule.sigmas)), unit="step", leave=False, disable=not self.progress_bar)
        # A compiled U-Net would be compiled again for each cached prompt, and a callback may change an adapter.
        prompt = self.unet._compiled_call_impl is None and callback is None
        networks = [self.unet, *self.controlnets]
        with bar, nullcontext() if self.plain else fast.frozen_weights(networks, large=True, prompt=prompt):
            for step in stations:
                bar.total = step.total  # Heun calls the network twice a step
                bar.update()
                if callback:
                    callback(step)
                if step.index + 1 == step.total:
                    break
        if not step.x.isfinite().all():  # NaN never goes away again, so one look at the end finds it
            raise MinidiffError(NONFINITE.format("U-Net"))
        if output_type == "latent":
            return step.x
        from minidiff.draw.images import finished  # only now: Pillow takes time to import

        return finished(next(stations), output_type)

    def check_guidance(self, scale: float) -> None:
        """SettingsError for a scale that is not finite; a warning if this is a turbo model, which draws without guidance."""
        if not isfinite(scale):
            raise SettingsError(f"guidance_scale is {scale}; it must be a finite number.")
        if scale > 1 and self.is_turbo:
            warnings.warn(GUIDED_TURBO.format(scale), stacklevel=3)

    def walker(
        self, canvas: Canvas, steps: int, sampler: str | None, spacing: str | None, karras: bool | None, eta: float
    ) -> Callable[..., Iterator[Step]]:
        """The sampler with its settings and its start. It warns of a single step from noise."""
        name = self.sampler if sampler is None else sampler
        chosen = sampler_for(name, spacing, karras, eta)
        usual = spacing or self.schedule.config.timestep_spacing or chosen.spacing
        check_steps(name, steps, canvas.strength, usual, self.schedule)
        if steps == 1 and canvas.image is None and usual in ("leading", "linspace"):
            warnings.warn(ONE_STEP, stacklevel=3)
        walk = partial(chosen, image=canvas.image, strength=canvas.strength, fix_x0=canvas.fix_x0)
        return partial(walk, spacing=spacing, karras=karras, eta=eta)

    def beside_picture(self, encode: Callable[[Side], Text], image: Any, side: Side) -> Callable[[Side], Text]:
        """`encode`, and what the IP-Adapter says of `image`, if there are any."""
        if (image is None) != (self.image_prompt is None):
            raise SettingsError(NO_PICTURE if self.image_prompt else NO_ADAPTER)
        return self.image_prompt.beside(encode, image, side) if self.image_prompt else encode

    def control(self, image: Any, scale: Numbers | None, *how: Any) -> Control | None:
        """The ControlNets with the hints `image`, if there are any."""
        scale = self.conditioning_scale if scale is None else scale
        return None if image is None else control_of(self.controlnets, self.unet.config, image, scale, *how)

    def canvas(
        self, pictures: Tensor | None, mask_image: Pictures | None, strength: float | None, shape: Sequence[int], draw: Draw,
        control: Control | None,
    ) -> Canvas:  # fmt: skip
        """The start for latents of `shape`: noise, or a picture under noise."""
        unet: UNetCall = getattr(self.unet, "plainly", self.unet)  # past the second way to call it: draw/habits.py
        unet = control.with_control(unet) if control else unet
        unet = unet if self.tile_size is None else in_tiles(unet, self.tile_size // self.downscale)
        if control:
            control.encode(shape[0], shape[2] * self.downscale, shape[3] * self.downscale)
            unet = control.with_hints(unet)
        trained_for_it = self.unet.config.in_channels != self.vae.config.latent_channels  # the U-Net sees the mask, too
        if trained_for_it and (pictures is None or mask_image is None):
            needs = "an inpainting model needs an image and a mask_image, whose white part it draws anew"
            raise SettingsError(f"{self.name_or_path}: {needs}.")
        if pictures is None:
            for name, value in (("mask_image", mask_image), ("strength", strength)):
                if value is not None:
                    raise SettingsError(f"{name} was given and there is no image to work on; give one, or leave {name} out.")
            return Canvas(draw("latents"), unet)
        height, width = (side * self.downscale for side in shape[2:])
        mask = None if mask_image is None else as_mask(mask_image, pictures, height, width)
        return on_picture(fitted(pictures, height, width), mask, strength, draw, self.encode_pictures, unet, trained_for_it)

    def encode_side(self, side: Side, clip_skip: int = 0, chunks: int = 1) -> Text:
        """All that the U-Net reads of the prompts."""
        config = self.unet.config
        width, shapes = config.addition_time_embed_dim, [torch.Size((LENGTH * chunks, config.cross_attention_dim))]
        if width:
            shapes.append(torch.Size(((config.projection_class_embeddings_input_dim or 0) - 6 * width,)))
        if side.encoded:
            if [part.shape[1:] for part in side.encoded] != shapes:
                fits = " and ".join(f"(B, {', '.join(map(str, shape))})" for shape in shapes)
                there = " and ".join(str(tuple(part.shape)) for part in side.encoded)
                names = " and ".join(EMBEDS[: len(shapes)])
                raise SettingsError(f"{names} must be {fits}, as encode_prompt gives it, on both sides; it is {there}.")
            text = tuple(part.to(self.device, self.dtype) for part in side.encoded)
        elif side.zeros:
            text = tuple(torch.zeros(len(side), *shape, device=self.device, dtype=self.dtype) for shape in shapes)
        else:
            text = self.encode_text(side.prompts, clip_skip, chunks)
        if not width:
            return text
        sizes = embed_sizes(torch.tensor([side.sizes] * len(side), device=self.device), width)
        return text[0], torch.cat([text[1], sizes.to(self.dtype)], dim=1)

    def encode_text(self, prompts: Sequence[Prompt], clip_skip: int = 0, chunks: int = 1) -> Text:
        """Parsed prompts -> (B, 77 k, D), in SDXL also (B, P). Equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        text = encode_prompts(self.tokenizer, self.encoders, distinct, self.placeholders, clip_skip, chunks)
        if not all(rows.isfinite().all() for rows in text):
            raise MinidiffError(NONFINITE.format("text encoder"))
        return tuple(rows[[distinct.index(p) for p in prompts]].to(self.dtype) for rows in text)

    def encode_prompt(self, prompts: str | Sequence[str | Prompt], clip_skip: int = 0, chunks: int = 1) -> Any:
        """Prompts in the prompt language -> (B, 77 k, D) in the U-Net's dtype, k >= `chunks`; in SDXL these and (B, P).

        LoRA tags have no effect here, only in `__call__`.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        text = self.encode_text([parse_prompt(p) if isinstance(p, str) else p for p in prompts], clip_skip, chunks)
        return text if len(text) > 1 else text[0]

    def encode_captions(self, captions: Sequence[str]) -> Text:
        """Captions as training reads them, without the prompt language, cut off at 75 tokens -> (B, 77, D); perhaps (B, P)."""
        text = self.encoders(tokenize(self.tokenizer, captions, self.placeholders))
        return tuple(rows.to(self.dtype) for rows in text)

    def encode_pictures(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w), drawn from the VAE's posterior with `noise`."""
        x, tile = pictures.to(self.vae.post_quant_conv.weight), self.tile_size or self.vae_tile_size or MAX_SIDE
        encode = tiled(lambda part: torch.cat(self.vae.encode(part), dim=1), tile, tile // 4, unit=self.downscale)
        mean, logvar = torch.cat([encode(row[None]) for row in x]).chunk(2, dim=1)
        return sample_posterior(mean, logvar, noise.to(mean)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> pictures (B, 3, H, W) in [-1, 1], one at a time to save memory."""
        z = latents.to(self.vae.post_quant_conv.weight) / self.vae.config.scaling_factor
        cells = (self.tile_size or self.vae_tile_size or 0) // self.downscale
        decode = getattr(self.vae, "plainly", self.vae.decode)
        decode = tiled(decode, cells, cells // 4) if cells else decode
        pictures = torch.cat([decode(row[None]) for row in z])
        if not pictures.isfinite().all():
            raise MinidiffError(NONFINITE.format("VAE"))
        return pictures.clamp(-1, 1)

    def latent_shape(
        self, count: int, height: int | None, width: int | None, pictures: Tensor | None = None
    ) -> tuple[int, int, int, int]:
        """(B, 4, h, w) for sides in pixels, or those of `pictures`, or the model's own; SettingsError for impossible ones."""
        factor, usual, sides = self.downscale, self.unet.config.sample_size, []
        if pictures is not None:
            height, width = size_of(pictures.shape[-2:], height, width, factor)
        for flag, given in (("height", height), ("width", width)):
            side = usual * factor if given is None else as_int(flag, given)
            if not factor <= side <= MAX_SIDE or side % factor:
                raise SettingsError(f"{flag} is {side}; it must be a multiple of {factor} up to {MAX_SIDE}.")
            sides.append(side // factor)
        return count, self.vae.config.latent_channels, sides[0], sides[1]

    def set_tile_size(self, pixels: int | None) -> None:
        """Draw large pictures in overlapping tiles of so many pixels, with the memory of one tile; None: no tiles."""
        cell = self.downscale
        if pixels is not None and (as_int("tile_size", pixels) < 8 * cell or pixels % cell):
            raise SettingsError(f"tile_size is {pixels}; it must be a multiple of {cell}, at least {8 * cell}.")
        self.tile_size = pixels

    def set_progress_bar_config(self, disable: bool = False) -> None:
        self.progress_bar = not disable
