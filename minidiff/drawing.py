"""What the drawing commands do, given their flags: sample, sheet, morph, filmstrip, attention, tokens."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from minidiff.adapters.inject import adapter_names
from minidiff.call import adapter_name_of, in_lora_dir
from minidiff.device import chosen_device
from minidiff.errors import DataError, SettingsError
from minidiff.flags import Attention, Filmstrip, Morph, Sample, Sampling, Sheet, Tokens
from minidiff.images import contact_sheet, read_png_text, save_png
from minidiff.models.prompt import parse_prompt
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.studio.provenance import chunks, parameters
from minidiff.weights import read_header

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.diffusion.samplers import Step
    from minidiff.studio.sheets import Axis

Callback = Callable[["Step"], None]
LOADED = (  # what decides which model is loaded, and what is attached to it
    *("pretrained_model_name_or_path", "tokenizer", "torch_dtype", "device"),
    *("lora", "lora_dir", "textual_inversion"),
)


# --- the commands ------------------------------------------------------------------------------------------------------


def sample(s: Sample) -> None:
    """One file for each picture; how it was made is written into it."""
    assert s.prompt is not None  # checked
    names = output_files(s.output, s.num_images_per_prompt)
    pipe = load(s, [s.prompt])
    preview = preview_of(pipe, s.preview)
    for name, seed in zip(names, range(s.seed, s.seed + s.num_images_per_prompt)):  # each alone: see `chunks`
        image = draw(pipe, replace(s, seed=seed), s.prompt, callback=preview)
        save_png(image, name, chunks(s, pipe, seed, image))
        print(name)


def sheet(s: Sheet) -> None:
    """Two settings against each other; or the model before and after its LoRAs and new words."""
    output_files(s.output)
    drawn, about = (over_settings if s.columns or s.rows else before_and_after)(s)
    save_png(drawn, s.output, {"parameters": about})
    print(s.output)


def before_and_after(s: Sheet) -> tuple[Image, str]:
    """A column for each prompt, the same seeds in every row; the sheet and how it was made."""
    learned = bool(s.lora or s.textual_inversion)
    pipe = load(replace(s, lora=(), lora_weight=(), textual_inversion=()), s.prompts)
    rows, labels = [], []
    for when in ("before", "after") if learned else ("",):
        if when == "after":
            attach(pipe, s, s.prompts)
        for seed in range(s.seed, s.seed + s.num_images_per_prompt):
            rows.append([draw(pipe, replace(s, seed=seed), prompt) for prompt in s.prompts])
            labels.append(", ".join(filter(None, (when, f"seed {seed}" if s.num_images_per_prompt > 1 else ""))))
    about = parameters(s, pipe, " | ".join(s.prompts), s.seed, rows[0][0])
    return contact_sheet(rows, labels if any(labels) else (), s.prompts, s.title, s.tile), about


def over_settings(s: Sheet) -> tuple[Image, str]:
    """--columns and --rows; the sheet and how it was made. A model is loaded again only where a tile needs another one."""
    from minidiff.studio import sheets

    prompts = sheets.Axis("prompts", tuple((prompt,) for prompt in s.prompts))
    axes = [named_weights(sheets.parse_axis(text, Sampling, s.prompts), s) if text else None for text in (s.columns, s.rows)]
    if len(s.prompts) > 1 and not any(axis and axis.name == prompts.name for axis in axes):
        if all(axes):
            raise SettingsError(f"{len(s.prompts)} prompts, --columns and --rows are three axes; a sheet has two.")
        axes[axes.index(None)] = prompts
    here: dict[Sampling, StableDiffusionPipeline] = {}  # one model at a time
    about: list[str] = []

    def tile(settings: Sheet) -> Image:
        if (wanted := Sampling(**{name: getattr(settings, name) for name in LOADED})) not in here:
            here.clear()  # before the next one comes: two would need twice the memory
            here[wanted] = load(wanted, s.prompts)
        pipe = here[wanted]
        pipe.set_progress_bar_config(disable=True)  # the sheet has one of its own
        pipe.set_tile_size(settings.tile_size)
        set_weights(pipe, settings)
        image = draw(pipe, settings, settings.prompts[0])
        if not about:
            about.append(parameters(settings, pipe, " | ".join(s.prompts), settings.seed, image))
        return image

    return sheets.contact_sheet_of(s, axes[0], axes[1], tile, s.title, s.tile), about[0]


def named_weights(axis: "Axis", s: Sheet) -> "Axis":
    """Where several LoRAs are weighed, the labels say which is which: "sks-dog 1 + chalk 0.7"."""
    if axis.name != "lora_weight" or len(s.lora) < 2 or any(len(weights) != len(s.lora) for weights in axis.values):
        return axis
    names = lora_names(s.lora)
    said = [" + ".join(f"{name} {weight:g}" for name, weight in zip(names, weights)) for weights in axis.values]
    return replace(axis, said=tuple(said))


def morph(s: Morph) -> None:
    """A loop through keyframes, and its length before it starts."""
    from minidiff.studio.morph import Keyframe, Loop, check_sampler, keyframe_tensors, save_animation
    from minidiff.studio.morph import morph as frames_of

    check_new(s.output, "--output")
    seeds = s.seeds or (tuple(range(s.seed, s.seed + 3)) if len(s.prompts) == 1 else (s.seed,))
    count = max(len(s.prompts), len(seeds))
    keys = [Keyframe(s.prompts[i % len(s.prompts)], seeds[i % len(seeds)]) for i in range(count)]
    loop = Loop(len(keys), s.frames, s.fps, s.ease)
    pipe = load(s, s.prompts)
    check_sampler(s.sampler or pipe.sampler, s.eta, keys)
    print(loop, file=sys.stderr)
    noises, texts = keyframe_tensors(pipe, keys, s.height, s.width, s.clip_skip, s.negative_prompt)

    def frame(noise: "Tensor", text: "Tensor") -> Image:
        return draw(pipe, replace(s, seed=seeds[0]), latents=noise, prompt_embeds=text)

    pipe.set_progress_bar_config(disable=True)  # the loop has one of its own
    save_animation(frames_of(loop, noises, texts, frame), s.output, s.fps)
    print(s.output)


def filmstrip(s: Filmstrip) -> None:
    from minidiff.studio.filmstrip import Film
    from minidiff.studio.filmstrip import filmstrip as strip

    output_files(s.output)
    pipe = load(s, [s.prompt or ""])
    with Film(pipe) as film:
        image = draw(pipe, s, s.prompt, callback=film)
    about = {"parameters": parameters(s, pipe, s.prompt or "", s.seed, image)}
    save_png(strip(film, pipe.decode, pipe.schedule, s.prompt or "", s.count), s.output, about)
    print(s.output)


def attention(s: Attention) -> None:
    from minidiff.studio.attention_maps import AttentionMaps, attention_sheet, words_of

    output_files(s.output)
    pipe = load(s, [s.prompt or ""])
    words = words_of(pipe.tokenizer, s.prompt or "", pipe.placeholders)
    with AttentionMaps(pipe) as maps:
        image = draw(pipe, s, s.prompt)
    about = {"parameters": parameters(s, pipe, s.prompt or "", s.seed, image)}
    save_png(attention_sheet(image, maps.mean(s.resolution), words, s.prompt or ""), s.output, about)
    print(s.output)


def tokens(s: Tokens) -> None:
    from minidiff.layout import local_folder
    from minidiff.models.text import load_tokenizer
    from minidiff.models.tokens import token_view

    tokenizer = load_tokenizer(local_folder(s.pretrained_model_name_or_path) / "tokenizer")
    print(token_view(tokenizer, s.prompt or "", trigger=s.trigger))


# --- what they share ---------------------------------------------------------------------------------------------------


def check_new(output: str, flag: str, ours: bool = False) -> None:
    """Refuse to write over a file that does not say that minidiff drew it."""
    if Path(output).exists() and not ours:
        raise SettingsError(f"{flag} {output} is there already, and does not say that minidiff drew it; choose another name.")


def output_files(output: str, count: int = 1, flag: str = "--output") -> list[Path]:
    """Where the pictures go. What minidiff drew is drawn over (it says how to draw it again); any other file is left alone."""
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise SettingsError(f'{flag} "{output}": pictures are written as PNG; give a name that ends in .png.')
    names = [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
    for name in names:
        try:
            ours = not name.exists() or "minidiff" in read_png_text(name).get("parameters", "")
        except DataError:  # no picture
            ours = False
        check_new(str(name), flag, ours)
    return names


def load(s: Sampling, prompts: Sequence[str]) -> StableDiffusionPipeline:
    """The model on its device, with the LoRAs and new words of the flags and of the prompts attached."""
    device = chosen_device(s.device)
    dtype = getattr(torch, s.torch_dtype or ("float32" if device == "cpu" else "float16"))
    name = s.pretrained_model_name_or_path
    if single := Path(name).is_file():
        read_header(name)  # what is no model file at all is told first
    if single or name.endswith(".safetensors"):
        if s.tokenizer is None:
            raise SettingsError(
                f"{name}: a model in a single file holds no vocabulary; give --tokenizer, the tokenizer folder of SD 1.5. "
                "(If it is a LoRA, give it with --lora, and the model it belongs to here.)"
            )
        pipe = StableDiffusionPipeline.from_single_file(name, s.tokenizer, dtype)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(name, dtype)
    pipe.to(device)
    pipe.set_tile_size(s.tile_size)
    attach(pipe, s, prompts)
    return pipe


def attach(pipe: StableDiffusionPipeline, s: Sampling, prompts: Sequence[str]) -> None:
    """All LoRAs of the flags, each at its weight; those that prompts name, off until such a prompt is drawn; new words."""
    for path, name in zip(s.lora, lora_names(s.lora)):
        print(pipe.load_lora_weights(path, adapter_name=name), file=sys.stderr)
    named = {name for prompt in prompts for name, _ in parse_prompt(prompt).loras}
    named -= {name for name in named if adapter_name_of(name) in lora_names(s.lora)}
    for name in sorted(named):
        print(pipe.load_lora_weights(in_lora_dir(s.lora_dir, name), adapter_name_of(name)), file=sys.stderr)
    set_weights(pipe, s)
    for path in s.textual_inversion:
        print(pipe.load_textual_inversion(path), file=sys.stderr)


def set_weights(pipe: StableDiffusionPipeline, s: Sampling) -> None:
    """The flags' LoRAs at the flags' weights; those that only prompts name are off between the prompts."""
    if adapter_names(pipe.adaptable):
        pipe.set_adapters(lora_names(s.lora), s.lora_weight or (1.0,) * len(s.lora))


def lora_names(paths: Sequence[str]) -> list[str]:
    """The adapters' names: those of their files or folders, so that <lora:NAME:0.8> finds them; doubled ones get a number."""
    stems = [adapter_name_of(Path(path).name.removesuffix(".safetensors")) for path in paths]
    return [stem if stem not in stems[:i] else f"{stem}-{i}" for i, stem in enumerate(stems)]


def draw(
    pipe: StableDiffusionPipeline,
    s: Sampling,
    prompt: str | None = None,
    latents: "Tensor | None" = None,
    prompt_embeds: "Tensor | None" = None,
    callback: Callback | None = None,
) -> Image:
    """The one picture of these settings."""
    image: Image = pipe(
        prompt,
        s.negative_prompt,
        seed=s.seed,
        latents=latents,
        prompt_embeds=prompt_embeds,
        num_inference_steps=s.num_inference_steps,
        guidance_scale=s.guidance_scale,
        sampler=s.sampler,
        timestep_spacing=s.timestep_spacing,
        use_karras_sigmas=s.use_karras_sigmas,
        eta=s.eta,
        clip_skip=s.clip_skip,
        width=s.width,
        height=s.height,
        image=s.image,
        mask_image=s.mask_image,
        strength=s.strength,
        callback=callback,
    ).images[0]
    return image


def preview_of(pipe: StableDiffusionPipeline, path: str | None) -> Callback | None:
    """A callback that keeps a small picture of what is coming at `path`."""
    if path is None:
        return None
    from minidiff.studio.previews import PreviewFile, fit_preview

    output_files(path, flag="--preview")
    return PreviewFile(fit_preview(pipe.vae), path)


DRAWING: dict[type, Callable[[Any], None]] = {
    Sample: sample,
    Sheet: sheet,
    Morph: morph,
    Filmstrip: filmstrip,
    Attention: attention,
    Tokens: tokens,
}
