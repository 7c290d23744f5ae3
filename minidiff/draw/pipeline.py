"""StableDiffusionPipeline: the field's API over core/generate.py, which says how a prompt becomes a picture.

B pictures   D text width   H W picture height and width   h w = H/8, W/8 latent height and width
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from math import isfinite
from operator import index
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.core.generate import Stations, generate
from minidiff.core.grids import LCM_STEPS, SAMPLERS, Sampler, Step
from minidiff.core.guidance import Text, UNetCall
from minidiff.core.rng import normal
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.text import LENGTH, TextEncoders, embed_sizes, tokenize
from minidiff.draw.arguments import Generators, Pair, generators_of, sizes_of
from minidiff.draw.canvas import Canvas, Pictures, as_mask, as_pictures, fitted, on_picture, size_of
from minidiff.draw.control import Control, Numbers, control_of
from minidiff.draw.image_prompt import beside
from minidiff.draw.lora_tags import at_strengths, loras_of
from minidiff.draw.model import GUIDED_TURBO, NONFINITE, ONE_STEP, Model
from minidiff.draw.prompting import EMBEDS, Prompt, Side, both_sides, chunked, encode_prompts, finite_floats, parse_prompt
from minidiff.draw.speed import fast
from minidiff.draw.tiles import in_tiles, tiled
from minidiff.files.folder import check_sampler

Draw = Callable[[int | str], Tensor]  # what the noise is for -> the noise
SPACINGS = ("leading", "linspace", "trailing")
MAX_SIDE = 8192  # pixels: beyond, attention takes days


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

    def __repr__(self) -> str:
        side = self.unet.config.sample_size * self.downscale
        count = sum(parameter.numel() for network in self.parts.networks.values() for parameter in network.parameters())
        adapters = ", ".join(f"{name} at {weight:g}" for name, weight in self.strengths().items()) or "none"
        model = f"{self.name_or_path or 'a model'}, {side} x {side} pixels, {count:,} parameters, {self.device}, {self.dtype}"
        return f"<{type(self).__name__}: {model}, sampler {self.sampler}, adapters: {adapters}>"

    @cached_property
    def encoders(self) -> TextEncoders:
        """The text encoders as one module: ids -> all that the U-Net reads of them."""
        towers = [self.text_encoder] + [self.text_encoder_2] * bool(self.text_encoder_2)
        return TextEncoders(towers, self.tokenizer.eos_token_id, (self.tokenizer_2 or self.tokenizer).pad_token_id)

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
        by side, that the IP-Adapter looks at. `control_image` and the four arguments after it: see draw/control.py.
        `output_type`: "pil", "pt" (B, 3, H, W) in [0, 1], "np" (B, H, W, 3), or "latent". `callback` sees each `Step`. SDXL
        alone: `pooled_prompt_embeds` (B, P), and sizes as (height, width) or (top, left), for which see core/text.py."""
        if positional or field:  # the way other libraries call it: draw/habits.py
            return self.in_other_words(dict(locals()))
        encoded = (prompt_embeds, pooled_prompt_embeds), (negative_prompt_embeds, negative_pooled_prompt_embeds)
        yes, no = both_sides((prompt, encoded[0]), (negative_prompt or "", encoded[1]), num_images_per_prompt)
        read = yes.prompts + no.prompts if guidance_scale > 1 else yes.prompts
        lengths = [len(chunked(self.tokenizer, prompt, self.placeholders)) for prompt in read]
        chunks = max(1, *lengths, *(side.encoded[0].shape[1] // LENGTH for side in (yes, no) if side.encoded))
        pictures = None if image is None else as_pictures(image, yes.count)
        how = controlnet_conditioning_scale, control_guidance_start, control_guidance_end, guess_mode, LENGTH * chunks
        control = self.control(control_image, *how) if control_image is not None or guess_mode else None
        shape = self.latent_shape(yes.count, height, width, control.pictures[0][0] if control and image is None else pictures)
        if self.text_encoder_2:
            drawn = (shape[2] * self.downscale, shape[3] * self.downscale)
            sizes = sizes_of((*drawn, 0, 0, *drawn), original_size, crops_coords_top_left, target_size)
            less = sizes_of(sizes, negative_original_size, negative_crops_coords_top_left, negative_target_size)
            zeros = self.force_zeros_for_empty_prompt and negative_prompt is None
            yes, no = replace(yes, sizes=sizes), replace(no, sizes=less, zeros=zeros)
        draw = noise_source(shape, seed, generator, latents)
        canvas = self.canvas(pictures, mask_image, strength, shape, draw, control)
        steps = as_int("num_inference_steps", num_inference_steps)
        walk = self.walker(canvas, sampler or self.sampler, steps, timestep_spacing, use_karras_sigmas, eta, guidance_scale)
        encode: Any = partial(self.encode_side, clip_skip=clip_skip or 0, chunks=chunks)
        if ip_adapter_image is not None or self.image_prompt:
            encode = beside(encode, self.image_prompt, ip_adapter_image, yes)
        stations = Stations(encode, canvas.unet, lambda latents: canvas.paste(self.decode(latents)), self.schedule)
        noise = canvas.noise.to(self.unet.conv_norm_out.weight.device)
        if control:
            control.calls = next(walk(lambda x, t: x, noise, self.schedule, steps, lambda i: noise)).total
        drawing = generate(stations, yes, no, noise, draw, steps, guidance_scale, walk, guidance_rescale)
        named = any(one.loras for one in yes.prompts + no.prompts)
        with at_strengths(self.adaptable, loras_of(yes.prompts, no.prompts)) if named else nullcontext():
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

    def walker(
        self, canvas: Canvas, name: str, steps: int, spacing: str | None, karras: bool | None, eta: float, guidance: float
    ) -> Callable[..., Iterator[Step]]:
        """The sampler with its settings and its start. Warns of a single step, or of guidance, that draws badly."""
        chosen = sampler_for(name, spacing, karras, eta)
        usual = spacing or self.schedule.config.timestep_spacing or chosen.spacing
        check_steps(name, steps, canvas.strength, usual, self.schedule)
        if not isfinite(guidance):
            raise SettingsError(f"guidance_scale is {guidance}; it must be a finite number.")
        if steps == 1 and canvas.image is None and usual in ("leading", "linspace"):
            warnings.warn(ONE_STEP, stacklevel=3)
        if guidance > 1 and self.is_turbo:
            warnings.warn(GUIDED_TURBO.format(guidance), stacklevel=3)
        walk = partial(chosen, image=canvas.image, strength=canvas.strength, fix_x0=canvas.fix_x0)
        return partial(walk, spacing=spacing, karras=karras, eta=eta)

    def control(self, image: Any, scale: Numbers | None, *how: Any) -> Control:
        """The ControlNets with the hints `image`."""
        return control_of(self.controlnets, self.unet.config, image, self.conditioning_scale if scale is None else scale, *how)

    def canvas(
        self, pictures: Tensor | None, mask_image: Pictures | None, strength: float | None, shape: Sequence[int], draw: Draw,
        control: Control | None,
    ) -> Canvas:  # fmt: skip
        """The start for latents of `shape`: noise, or a picture under noise."""
        unet: UNetCall = getattr(self.unet, "plainly", self.unet)  # past the second way to call it: draw/habits.py
        unet = control.with_control(unet) if control else unet
        unet = unet if self.tile_size is None else in_tiles(unet, self.tile_size // self.downscale)
        if control:
            unet = control.with_hints(unet, shape[0], shape[2] * self.downscale, shape[3] * self.downscale)
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
            text = tuple(torch.zeros(side.count, *shape, device=self.device, dtype=self.dtype) for shape in shapes)
        else:
            text = self.encode_text(side.prompts, clip_skip, chunks)
        if not width:
            return text
        sizes = embed_sizes(torch.tensor([side.sizes] * side.count, device=self.device), width)
        return text[0], torch.cat([text[1], sizes.to(self.dtype)], dim=1)

    def encode_text(self, prompts: Sequence[Prompt], clip_skip: int = 0, chunks: int = 1) -> Text:
        """Parsed prompts -> (B, 77 k, D), in SDXL also (B, P). Equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        text = encode_prompts(self.tokenizer, self.encoders, distinct, self.placeholders, clip_skip, chunks)
        if not all(rows.isfinite().all() for rows in text):
            raise MinidiffError(NONFINITE.format("text encoder"))
        return tuple(rows[[distinct.index(p) for p in prompts]].to(self.dtype) for rows in text)

    def encode_prompt(self, prompts: str | Sequence[str], clip_skip: int = 0, chunks: int = 1) -> Any:
        """Prompts in the prompt language -> (B, 77 k, D) in the U-Net's dtype, k >= `chunks`; in SDXL these and (B, P).

        LoRA tags have no effect here, only in `__call__`.
        """
        parsed = [parse_prompt(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        text = self.encode_text(parsed, clip_skip, chunks)
        return text if len(text) > 1 else text[0]

    def encode_captions(self, captions: Sequence[str]) -> Text:
        """Captions as training reads them, without the prompt language, cut off at 75 tokens -> (B, 77, D); perhaps (B, P)."""
        text = self.encoders(tokenize(self.tokenizer, captions, self.placeholders))
        return tuple(rows.to(self.dtype) for rows in text)

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


def sampler_for(name: str, spacing: str | None = None, karras: bool | None = None, eta: float = 0.0) -> Sampler:
    """The sampler of this name. SettingsError if there is none, or if it does not take these settings."""
    if name not in SAMPLERS:
        check_sampler(name)
    sampler = SAMPLERS[name]
    if spacing and sampler.spacing is None:
        raise SettingsError(f"timestep_spacing is {spacing}; {name} has its own timesteps. Leave it out.")
    if spacing not in (None, *SPACINGS):
        raise SettingsError(f'timestep_spacing "{spacing}" is unknown; it is one of {", ".join(SPACINGS)}.')
    if karras and not sampler.karras:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.karras)
        raise SettingsError(f"use_karras_sigmas is on; only these samplers take Karras sigmas: {able}.")
    if not 0 <= eta <= 1 or (eta and not sampler.eta):
        raise SettingsError(f"eta is {eta}; only ddim and tcd have one, from 0 (deterministic) to 1 (all new noise).")
    return sampler


def check_steps(name: str, steps: int, strength: float, spacing: str | None, schedule: NoiseSchedule) -> None:
    """SettingsError if the sampler of this name cannot take so many steps, or start where they say."""
    most = LCM_STEPS if SAMPLERS[name].spacing is None else len(schedule.sigmas)
    if not 1 <= steps <= most:
        raise SettingsError(f"num_inference_steps is {steps}; it can be 1 to {most} with {name}.")
    if not 0 < strength <= 1:
        raise SettingsError(f"strength is {strength}; it can be above 0 (the image as it is) to 1.")
    if not int(steps * strength):
        raise SettingsError(f"0 denoising steps: {steps} steps at strength {strength} are too few; use more of either.")
    if name == "heun" and spacing != "leading" and schedule.sigmas[-1] > 1000:  # a mean of two directions there is noise
        raise SettingsError("heun cannot begin at zero terminal SNR; use euler, or leading timestep_spacing.")


def noise_source(
    shape: Sequence[int], seed: int | Sequence[int] | None = None, generator: Generators | None = None,
    latents: Tensor | None = None,
) -> Draw:  # fmt: skip
    """draw(purpose) -> standard normal noise of `shape` (B, C, h, w); for the purpose "latents", the caller's if given.

    The purpose is "latents", "posterior" (a picture's own latents), "surroundings" (inpainting models), or i for step i. Noise
    for picture b is a function of seed + b (or seed[b]) and the purpose, fp32 on the CPU for any device. A torch.Generator, or
    one for each picture, gives its next numbers for any purpose, on its own device: the order of calls counts, as in diffusers.
    """
    if latents is not None and finite_floats("latents", latents).shape != tuple(shape):
        raise SettingsError(f"latents have the shape {tuple(latents.shape)}; for this call it must be {tuple(shape)}.")
    of_each = [] if generator is None else generators_of(generator, shape[0])
    if seed is None:
        seed = 0 if of_each else int(torch.randint(2**31, ()))
    if isinstance(seed, Iterable) and not isinstance(seed, str):
        seeds = [as_int("seed", one) for one in seed]
    else:  # plain ints: the hash of numpy's would draw other pictures
        seeds = [as_int("seed", seed) + i for i in range(shape[0])]
    if len(seeds) != shape[0]:
        raise SettingsError(f"{len(seeds)} seeds were given for {shape[0]} pictures; give one number, or one for each.")

    def draw(purpose: int | str) -> Tensor:
        if latents is not None and purpose == "latents":
            return latents.float()
        if of_each:
            return torch.cat([torch.randn((n, *shape[1:]), generator=g, device=g.device) for g, n in of_each])
        where = ("step", purpose) if isinstance(purpose, int) else (purpose,)
        return torch.stack([normal(shape[1:], one, *where) for one in seeds])

    return draw


def as_int(name: str, value: int) -> int:
    """A plain int from any integer type; SettingsError for 64.0 and other types."""
    try:
        return index(value)
    except TypeError:
        raise SettingsError(f"{name} is {value!r}; it must be a whole number.") from None
