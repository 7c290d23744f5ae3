"""The drawing commands, given their flags: sample, sheet, morph, filmstrip, attention, tokens."""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image

from minidiff.cli.draw_flags import Attention, Filmstrip, Morph, Sample, Sampling, Sheet, Tokens
from minidiff.core.errors import SettingsError
from minidiff.core.grids import sampler_named
from minidiff.core.inject import adapter_names
from minidiff.draw.device import chosen_device
from minidiff.draw.images import contact_sheet, save_png
from minidiff.draw.lora_tags import adapter_name_of, in_lora_dir
from minidiff.draw.pipeline import MAX_SIDE, StableDiffusionPipeline
from minidiff.draw.prompting import parse_prompt
from minidiff.draw.speed import compile_unet, keep_memory
from minidiff.files.folder import config_of, local_folder, sampler_of
from minidiff.files.weights import read_header
from minidiff.studio.recipe import Origin, check_origin, check_outputs, parameters, recipe_texts, several

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.core.grids import Step
    from minidiff.studio.sheet import Axis

Callback = Callable[["Step"], None]
LOADED = (  # the settings that decide which model is loaded, and what is attached to it
    *("pretrained_model_name_or_path", "tokenizer", "torch_dtype", "device", "compile", "plain"),
    *("lora", "lora_dir", "textual_inversion"),
)
MAX_WORDS = 100


# --- the commands ------------------------------------------------------------------------------------------------------


def sample(s: Sample) -> None:
    """One file for each picture; how it was made is written into it."""
    assert s.prompt is not None  # checked
    names = output_files(s)
    pipe = load(s, [s.prompt])
    preview = preview_of(pipe, s.preview)
    for name, seed in zip(names, range(s.seed, s.seed + s.num_images_per_prompt)):  # each alone: see `recipe_texts`
        alone = replace(s, seed=seed)
        image = draw(pipe, alone, s.prompt, callback=preview)
        save_png(image, name, recipe_texts(vars(alone), pipe, image.size))
        print(name)


def sheet(s: Sheet) -> None:
    """Two settings against each other; or the model before and after its LoRAs and new words."""
    output_files(s)
    drawn, about = (before_and_after if s.columns is s.rows is None else over_settings)(s)
    save_png(drawn, s.output, {"parameters": about})
    print(s.output)


def before_and_after(s: Sheet) -> tuple[Image, str]:
    """A column for each prompt, the same seeds in every row; the sheet and how it was made."""
    from minidiff.studio.sheet import check_count

    learned = bool(s.lora or s.textual_inversion)
    check_count(len(s.prompts), s.num_images_per_prompt * (1 + learned))
    pipe = load(replace(s, lora=(), lora_weight=(), textual_inversion=()), s.prompts)
    rows, labels = [], []
    for when in ("before", "after") if learned else ("",):
        if when == "after":
            attach(pipe, s, s.prompts)
        for seed in range(s.seed, s.seed + s.num_images_per_prompt):
            rows.append([draw(pipe, replace(s, seed=seed), prompt) for prompt in s.prompts])
            labels.append(", ".join(filter(None, (when, f"seed {seed}" if s.num_images_per_prompt > 1 else ""))))
    about = how(s, pipe, " | ".join(s.prompts), rows[0][0])
    return contact_sheet(rows, labels if any(labels) else (), s.prompts, s.title, s.tile), about


def over_settings(s: Sheet) -> tuple[Image, str]:
    """--columns and --rows; the sheet and how it was made. A model is loaded again only where a tile needs another one."""
    from minidiff.studio import sheet as sheets

    prompts = sheets.Axis("prompts", tuple((prompt,) for prompt in s.prompts))
    axes = [
        None if text is None else named_weights(sheets.parse_axis(text, Sampling, s.prompts), s) for text in (s.columns, s.rows)
    ]
    if len(s.prompts) > 1 and not any(axis and axis.name == prompts.name for axis in axes):
        if all(axes):
            raise SettingsError(f"{len(s.prompts)} prompts, --columns and --rows are three axes; a sheet has two.")
        axes[axes.index(None)] = prompts
    here: dict[Sampling, StableDiffusionPipeline] = {}  # one model at a time
    about: list[str] = []

    def tile(settings: Sheet) -> Image:
        if (wanted := Sampling(**{name: getattr(settings, name) for name in LOADED})) not in here:
            here.clear()  # before the next model is loaded: two need twice the memory
            here[wanted] = load(wanted, s.prompts)
        pipe = here[wanted]
        pipe.set_progress_bar_config(disable=True)  # the sheet has one of its own
        pipe.set_tile_size(settings.tile_size)
        set_weights(pipe, settings)
        image = draw(pipe, settings, settings.prompts[0])
        if not about:
            about.append(how(settings, pipe, " | ".join(s.prompts), image))
        return image

    return sheets.contact_sheet_of(s, axes[0], axes[1], tile, s.title, s.tile, check=check_tile), about[0]


def check_tile(s: Sheet) -> None:
    """Find missing files and impossible sampler settings before the first tile is drawn."""
    output_files(s)  # an axis of pictures may hold the sheet's own name
    for name, side in (("width", s.width), ("height", s.height), ("tile_size", s.tile_size)):
        if side is not None and not 1 <= side <= MAX_SIDE:
            raise SettingsError(f"{name} is {side}; it can be 1 to {MAX_SIDE} pixels.")
    for name in ("tokenizer", "lora", "textual_inversion", "image", "mask_image"):
        for path in filter(None, several(getattr(s, name))):
            if not Path(path).exists():
                raise SettingsError(f"{name} {path}: no such file or folder.")
    model, sampler = s.pretrained_model_name_or_path, s.sampler or "ddim"
    if not Path(model).is_file():
        folder = local_folder(model) / "scheduler"
        sampler = s.sampler or sampler_of(*config_of(folder, "scheduler_config.json"))
    sampler_named(sampler).check(s.timestep_spacing, s.use_karras_sigmas, s.eta)


def named_weights(axis: "Axis", s: Sheet) -> "Axis":
    """Where several LoRAs are weighed, the labels say which is which: "sks-dog 1 + chalk 0.7"."""
    if axis.name != "lora_weight" or len(s.lora) < 2 or any(len(weights) != len(s.lora) for weights in axis.values):
        return axis
    names = lora_names(s.lora)
    said = [" + ".join(f"{name} {weight:g}" for name, weight in zip(names, weights)) for weights in axis.values]
    return replace(axis, said=tuple(said))


def morph(s: Morph) -> None:
    """A loop through keyframes, and its length before it starts."""
    from minidiff.studio.morph import Keyframe, Loop, check_animation, check_sampler, keyframe_tensors, save_animation
    from minidiff.studio.morph import morph as frames_of

    check_animation(s.output, s.fps)
    output_files(s)
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
    pictures = list(frames_of(loop, noises, texts, frame))
    save_animation(pictures, s.output, s.fps, how(replace(s, seed=seeds[0]), pipe, " | ".join(s.prompts), pictures[0]))
    print(s.output)


def filmstrip(s: Filmstrip) -> None:
    from minidiff.studio.filmstrip import Film
    from minidiff.studio.filmstrip import filmstrip as strip

    output_files(s)
    pipe = load(s, [s.prompt or ""])
    with Film(pipe) as film:
        image = draw(pipe, s, s.prompt, callback=film)
    about = {"parameters": how(s, pipe, s.prompt or "", image)}
    save_png(strip(film, pipe.decode, pipe.schedule, s.prompt or "", s.count), s.output, about)
    print(s.output)


def attention(s: Attention) -> None:
    from minidiff.studio.maps import AttentionMaps, attention_sheet, words_of

    output_files(s)
    pipe = load(s, [s.prompt or ""])
    words = words_of(pipe.tokenizer, s.prompt or "", pipe.placeholders)
    if len(words) > MAX_WORDS:
        raise SettingsError(f"the prompt has {len(words)} words, and each gets a tile; give {MAX_WORDS} at most.")
    with AttentionMaps(pipe) as maps:
        image = draw(pipe, s, s.prompt)
    about = {"parameters": how(s, pipe, s.prompt or "", image)}
    save_png(attention_sheet(image, maps.mean(s.resolution), words, s.prompt or ""), s.output, about)
    print(s.output)


def tokens(s: Tokens) -> None:
    from minidiff.files.text_files import load_tokenizer
    from minidiff.studio.tokens import token_view

    tokenizer = load_tokenizer(local_folder(s.pretrained_model_name_or_path) / "tokenizer")
    print(token_view(tokenizer, s.prompt or "", trigger=s.trigger))


# --- what they share ---------------------------------------------------------------------------------------------------


def output_files(s: Sample | Sheet | Morph | Filmstrip | Attention, origin: Path | None = None) -> list[Path]:
    """The files that a command writes; SettingsError where that would cost a file. `origin`: the picture of --from."""
    path = Path(s.output)
    count, preview = (s.num_images_per_prompt, s.preview) if isinstance(s, Sample) else (1, None)
    for flag, given in (("--output", s.output), ("--preview", preview)):
        if given is not None and Path(given).suffix.lower() != ".png" and not isinstance(s, Morph):
            raise SettingsError(f'{flag} "{given}": pictures are written as PNG; give a name that ends in .png.')
    names = [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
    written = [("--output", name) for name in names] + ([("--preview", Path(preview))] if preview else [])
    check_outputs(written, {"--image": s.image, "--mask_image": s.mask_image, "--from": origin})
    return names


def check_again(s: Sample, origin: Origin) -> None:
    """For --from: SettingsError where the file of the original would be lost; a note for each thing that differs here."""
    s.check()
    output_files(s, origin.path)
    for note in check_origin(origin, vars(s)):
        warnings.warn(note, stacklevel=1)


def how(s: Sampling, pipe: StableDiffusionPipeline, prompt: str, image: Image) -> str:
    """A1111's text on how a picture was made."""
    return parameters(vars(s) | {"prompt": prompt}, pipe, image.size)


def load(s: Sampling, prompts: Sequence[str]) -> StableDiffusionPipeline:
    """The model on its device, with the LoRAs and new words of the flags and of the prompts attached."""
    keep_memory()  # this process is only for drawing
    device = chosen_device(s.device)
    dtype = getattr(torch, s.torch_dtype or ("float32" if device == "cpu" else "float16"))
    name = s.pretrained_model_name_or_path
    if single := Path(name).is_file():
        read_header(name)  # first of all: is it a model file?
    if single or name.endswith(".safetensors"):
        if s.tokenizer is None:
            raise SettingsError(
                f"{name}: a model in a single file holds no vocabulary; give --tokenizer, the tokenizer folder of SD 1.5. "
                "(If it is a LoRA, give it with --lora, and the model it belongs to here.)"
            )
        pipe = StableDiffusionPipeline.from_single_file(name, s.tokenizer, dtype, s.plain)
    elif s.tokenizer is not None:
        raise SettingsError(f"--tokenizer is for a model in a single file; {name} is a folder with its own. Leave it out.")
    else:
        pipe = StableDiffusionPipeline.from_pretrained(name, dtype, plain=s.plain)
    pipe.to(device)
    pipe.set_tile_size(s.tile_size)
    attach(pipe, s, prompts)
    if s.compile:
        compile_unet(pipe.unet)
    return pipe


def attach(pipe: StableDiffusionPipeline, s: Sampling, prompts: Sequence[str]) -> None:
    """Load the LoRAs and new words of the flags, and the LoRAs that prompts name; these are off until their prompt is drawn."""
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
    """Give the LoRAs of the flags their weights; LoRAs that only prompts name are off between the prompts."""
    if adapter_names(pipe.adaptable):
        pipe.set_adapters(lora_names(s.lora), s.lora_weight or (1.0,) * len(s.lora))


def lora_names(paths: Sequence[str]) -> list[str]:
    """The adapters' names: those of their files or folders, as in <lora:NAME:0.8>. A name that repeats gets a number."""
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
    """A callback that writes a small preview of the picture to `path` at each step."""
    if path is None:
        return None
    from minidiff.studio.previews import PreviewFile, fit_preview

    return PreviewFile(fit_preview(pipe.vae), path)
