"""The drawing commands, given their flags: sample, sheet, morph, filmstrip, attention, tokens."""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling, fromarray
from torch import Tensor

from minidiff.cli.draw_flags import Attention, Filmstrip, Morph, Sample, Sampling, Sheet, Tokens, picture_size
from minidiff.cli.first_line import of_drawing
from minidiff.core.errors import SettingsError
from minidiff.core.guidance import Text
from minidiff.core.inject import adapter_names
from minidiff.draw.canny import canny
from minidiff.draw.canvas import size_of
from minidiff.draw.device import chosen_device
from minidiff.draw.images import contact_sheet, load_image, save_png
from minidiff.draw.lora_tags import adapter_name_of, in_lora_dir
from minidiff.draw.pipeline import EMBEDS, StableDiffusionPipeline, sampler_for
from minidiff.draw.prompting import parse_prompt
from minidiff.draw.speed import compile_unet, keep_memory, light_text
from minidiff.files.atomic import called
from minidiff.files.controlnet import read_controlnet
from minidiff.files.folder import local_folder
from minidiff.files.model import is_single_file, read_model
from minidiff.files.text_files import load_tokenizer
from minidiff.files.word_file import FILE_NAME
from minidiff.studio.inside import AttentionMaps, Film, attention_sheet, words_of
from minidiff.studio.inside import filmstrip as strip_of
from minidiff.studio.morph import check_animation, check_loop, keyframe_tensors, save_animation
from minidiff.studio.morph import morph as frames_of
from minidiff.studio.recipe import OURS, Origin, check_origin, parameters, recipe_texts, several
from minidiff.studio.sheet import NEEDS_LOADING, check_count, contact_sheet_of, parse_axis
from minidiff.studio.tokens import plain_text, token_view, warn_of_unknown_words

CALL = (  # the flags that are arguments of `pipe()`, too
    *("negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler", "timestep_spacing", "use_karras_sigmas"),
    *("eta", "clip_skip", "width", "height", "image", "mask_image", "strength", "guess_mode"),
)


# --- the commands ------------------------------------------------------------------------------------------------------


def sample(s: Sample) -> None:
    """One file for each picture; how it was made is written into it."""
    names = output_files(s)
    pipe = load(s, [s.prompt], s.num_images_per_prompt)
    for name, seed in zip(names, range(s.seed, s.seed + s.num_images_per_prompt)):  # each alone: see `recipe_texts`
        alone = replace(s, seed=seed)
        image = draw(pipe, alone, s.prompt)
        save_png(image, name, recipe_texts(vars(alone), pipe, image.size))
        print(name)


def sheet(s: Sheet) -> None:
    """Two settings against each other; or the model before and after its LoRAs and new words."""
    drawn, about = (before_and_after if s.columns is s.rows is None else over_settings)(s)
    save_png(drawn, s.output, {"parameters": about})
    print(s.output)


def before_and_after(s: Sheet) -> tuple[Image, str]:
    """A column for each prompt, the same seeds in every row; the sheet and how it was made."""
    learned = bool(s.lora or s.textual_inversion)
    pictures = len(s.prompts) * s.num_images_per_prompt * (1 + learned)
    check_count(pictures)
    pipe = load(replace(s, lora=(), lora_weight=(), textual_inversion=()), s.prompts, pictures)
    rows, labels = [], []
    for when in ("before", "after") if learned else ("",):
        if when == "after":
            attach(pipe, s, s.prompts)
        for seed in range(s.seed, s.seed + s.num_images_per_prompt):
            rows.append([draw(pipe, replace(s, seed=seed), prompt) for prompt in s.prompts])
            labels.append(", ".join(filter(None, (when, f"seed {seed}" if s.num_images_per_prompt > 1 else ""))))
    about = how(s, pipe, " | ".join(s.prompts), rows[0][0])
    return contact_sheet(rows, labels, s.prompts, s.title, s.tile), about


def over_settings(s: Sheet) -> tuple[Image, str]:
    """--columns and --rows; the sheet and how it was made. A model is loaded again only where a tile needs another one."""
    if s.num_images_per_prompt > 1:
        raise SettingsError("--num_images_per_prompt does nothing with --columns and --rows; give an axis such as seed=0..3.")
    axes = [parse_axis(text, Sampling, s.prompts) for text in (s.rows, s.columns) if text is not None]
    if len(s.prompts) > 1 and all(axis.name != "prompts" for axis in axes):
        if len(axes) == 2:
            raise SettingsError(f"{len(s.prompts)} prompts, --columns and --rows are three axes; a sheet has two.")
        axes.insert(0 if s.rows is None else 1, parse_axis("prompt", Sampling, s.prompts))
    here: dict[tuple[Any, ...], StableDiffusionPipeline] = {}  # one model at a time
    about: list[str] = []

    def tile(one: Sheet) -> Image:
        if (wanted := tuple(getattr(one, name) for name in NEEDS_LOADING)) not in here:
            here.clear()  # before the next model is loaded: two need twice the memory
            here[wanted] = load(one, s.prompts, 0 if about else math.prod(len(axis.values) for axis in axes))
        pipe = here[wanted]
        pipe.set_progress_bar_config(disable=True)  # the sheet has one of its own
        pipe.set_tile_size(one.tile_size)
        set_weights(pipe, one)
        image = draw(pipe, one, one.prompts[0])
        about.append(how(one, pipe, " | ".join(s.prompts), image))
        return image

    check = partial(check_before, prompts=s.prompts)  # of all tiles, before the first is drawn
    return contact_sheet_of(s, axes, tile, s.title, s.tile, check, s.tiles_per_row), about[0]


def morph(s: Morph) -> None:
    """A loop through keyframes, and its length before it starts."""
    check_animation(s.output)
    seeds = s.seeds or (tuple(range(s.seed, s.seed + 3)) if len(s.prompts) == 1 else (s.seed,))
    count = max(len(s.prompts), len(seeds))
    if {len(s.prompts), len(seeds)} - {1, count}:
        raise SettingsError(f"--seeds has {len(seeds)} numbers for {len(s.prompts)} prompts; give one for each, or one.")
    keys = [(s.prompts[i % len(s.prompts)], seeds[i % len(seeds)]) for i in range(count)]
    s = replace(s, seed=seeds[0])
    check_loop(keys, s.frames, s.sampler or "ddim", s.eta)
    pipe = load(s, s.prompts, count * s.frames if count > 2 else s.frames + 1)  # two keyframes: the way back is the same
    check_loop(keys, s.frames, s.sampler or pipe.sampler, s.eta)
    total = count * s.frames
    print(f"{count} keyframes x {s.frames} frames = {total} frames, there and back: {total / s.fps:.1f} s", file=sys.stderr)
    noises, texts = keyframe_tensors(pipe, keys, s.height, s.width, s.clip_skip, s.negative_prompt)
    pipe.set_progress_bar_config(disable=True)  # the loop has one of its own

    def frame(noise: Tensor, text: Text) -> Image:
        given: dict[str, Any] = dict(zip(EMBEDS, text))
        return draw(pipe, s, latents=noise, **given)

    pictures, times = frames_of(noises, texts, s.frames, frame)
    save_animation(pictures, s.output, s.fps, how(s, pipe, " | ".join(s.prompts), pictures[0]), times)
    print(s.output)


def filmstrip(s: Filmstrip) -> None:
    pipe = load(s, [s.prompt])
    with Film(pipe) as film:
        image = draw(pipe, s, s.prompt, callback=film)
    strip = strip_of(film, s.prompt, s.count)
    save_png(strip, s.output, {"parameters": how(s, pipe, s.prompt, image)})
    print(s.output)


def attention(s: Attention) -> None:
    pipe = load(s, [s.prompt])
    words = words_of(pipe.tokenizer, s.prompt, pipe.placeholders)
    check_count(len(words))
    with AttentionMaps(pipe) as maps:
        image = draw(pipe, s, s.prompt)
    drawn = attention_sheet(image, maps.mean(), words, s.prompt)
    save_png(drawn, s.output, {"parameters": how(s, pipe, s.prompt, image)})
    print(s.output)


def tokens(s: Tokens) -> None:
    tokenizer = load_tokenizer(local_folder(s.pretrained_model_name_or_path) / "tokenizer", light_text())
    print(token_view(tokenizer, s.prompt, trigger=s.trigger))
    warn_of_unknown_words(s.pretrained_model_name_or_path, tokenizer, [plain_text(s.prompt)])


# --- shared by the commands --------------------------------------------------------------------------------------------


def output_files(s: Any, origin: Path | None = None) -> list[Path]:
    """The files that a command writes. SettingsError where that would cost a file that is read (`origin`: the picture of
    --from), or one that minidiff did not draw; OSError where nothing can be written.
    """
    path, count = Path(s.output), s.num_images_per_prompt if isinstance(s, Sample) else 1
    if path.suffix.lower() != ".png" and not isinstance(s, Morph):
        raise SettingsError(f'--output "{path}": pictures are written as PNG; give a name that ends in .png.')
    names = [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
    flags = ("image", "mask_image", "control_image", "ip_adapter_image")
    read = {os.path.realpath(one): flag for flag in flags for one in several(getattr(s, flag))}
    read |= {os.path.realpath(origin): "from"} if origin else {}
    for name in names:
        if flag := read.get(os.path.realpath(name)):
            raise SettingsError(f"--output {name} is the file of --{flag}, too; choose another name.")
        if os.path.lexists(name) and not (name.is_file() and OURS in name.read_bytes()):
            raise SettingsError(f"--output {name} is there already, and minidiff did not draw it; choose another name.")
        with TemporaryDirectory(dir=next(folder for folder in name.absolute().parents if folder.exists())) as scratch:
            Path(scratch, name.name).touch()
    return names


def check_again(s: Sample, origin: Origin) -> None:
    """For --from: SettingsError where the file of the original would be lost; a note for each thing that differs here."""
    output_files(s, origin.path)
    for note in check_origin(origin, vars(s)):
        warnings.warn(note, stacklevel=1)


def how(s: Sampling, pipe: StableDiffusionPipeline, prompt: str, image: Image) -> str:
    """A1111's text on how a picture was made."""
    return parameters(vars(s) | {"prompt": prompt}, pipe, image.size)


def check_before(s: Sampling, prompts: Sequence[str]) -> None:
    """Find models and LoRAs that are not there, impossible sampler settings and lost files, before anything is loaded."""
    s.check()
    output_files(s)
    if not is_single_file(s.pretrained_model_name_or_path):
        local_folder(s.pretrained_model_name_or_path)
    if s.sampler:
        sampler_for(s.sampler, s.timestep_spacing, s.use_karras_sigmas, s.eta)
    tagged_loras(s, prompts)


def tagged_loras(s: Sampling, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Names and files of the adapters that prompts name and --lora does not."""
    tags = sorted({tag for prompt in prompts for tag, _ in parse_prompt(prompt).loras})
    names = [(adapter_name_of(tag), tag) for tag in tags]
    return [(name, str(in_lora_dir(s.lora_dir, tag))) for name, tag in names if name not in lora_names(s.lora)]


def load(s: Sampling, prompts: Sequence[str], pictures: int = 1) -> StableDiffusionPipeline:
    """The model with the LoRAs and new words of flags and prompts. It prints how long `pictures` take (0: not again)."""
    check_before(s, prompts)
    keep_memory()  # this process is only for drawing
    device, name = chosen_device(s.device), s.pretrained_model_name_or_path
    dtype = getattr(torch, s.torch_dtype or ("float32" if device == "cpu" else "float16"))
    dtypes = {"unet": dtype, "vae": torch.float32, "text_encoder": dtype}
    parts = read_model(name, None, s.tokenizer, dtypes, light_text(s.plain), s.prediction_type)
    pipe = StableDiffusionPipeline(**parts.arguments, name_or_path=name, plain=s.plain).to(device)
    pipe.set_tile_size(s.tile_size)
    attach(pipe, s, prompts)
    texts = map(plain_text, (*prompts, s.negative_prompt))
    warn_of_unknown_words(name, pipe.tokenizer, texts, pipe.placeholders)
    if pictures and prompts:
        of_drawing(pipe, s, pictures, lambda mark: draw(pipe, s, prompts[0], callback=mark))
    if s.compile:
        compile_unet(pipe.unet)
    return pipe


def attach(pipe: StableDiffusionPipeline, s: Sampling, prompts: Sequence[str]) -> None:
    """Load the LoRAs and new words of the flags, and the LoRAs that prompts name; these are off until their prompt is drawn."""
    words: list[tuple[str, str | None]] = [(path, None) for path in s.textual_inversion]
    for name, path in [*zip(lora_names(s.lora), s.lora), *tagged_loras(s, prompts)]:
        print(lora := pipe.load_lora_weights(path, adapter_name=name), file=sys.stderr)
        beside = [None] if (Path(path) / FILE_NAME).is_file() else []  # `train pivotal` leaves a LoRA and a word in one folder
        words += [(path, word) for word in (*lora.words, *beside) if path not in s.textual_inversion]
    if s.ip_adapter:
        pipe.load_ip_adapter(s.ip_adapter, image_encoder_folder=s.image_encoder or "image_encoder")
    pipe.controlnet = [read_controlnet(path, pipe.dtype, pipe.unet.config) for path in s.controlnet]
    set_weights(pipe, s)
    for path, word in words:
        print(pipe.load_textual_inversion(path, word), file=sys.stderr)


def set_weights(pipe: StableDiffusionPipeline, s: Sampling) -> None:
    """Give the LoRAs and the IP-Adapter of the flags their weights; LoRAs that only prompts name are off between prompts."""
    if adapter_names(pipe.adaptable):
        pipe.set_adapters(lora_names(s.lora), s.lora_weight or (1.0,) * len(s.lora))
    if s.ip_adapter:
        pipe.set_ip_adapter_scale(s.ip_adapter_scale)


def lora_names(paths: Sequence[str]) -> list[str]:
    """The adapters' names: those of their files or folders, as in <lora:NAME:0.8>. A name that repeats gets a number."""
    stems = [adapter_name_of(Path(path).name.removesuffix(".safetensors")) for path in paths]
    return [stem if stem not in stems[:i] else f"{stem}-{i}" for i, stem in enumerate(stems)]


def hint_of(s: Sampling, path: str | None, cell: int) -> Any:
    """A picture as a ControlNet wants it: as it is, or its edges at the size that is drawn."""
    if s.hint is None:
        return path
    height, width = size_of(picture_size(s.image or path or "")[::-1], s.height, s.width, cell)
    edges = canny(np.asarray(load_image(path or "").resize((width, height), Resampling.LANCZOS)))
    return fromarray(edges).convert("RGB")


def draw(pipe: StableDiffusionPipeline, s: Sampling, prompt: str | None = None, **more: Any) -> Image:
    """The one picture of these settings; `more` are other arguments of the pipeline's call."""
    given = {name: getattr(s, name) for name in CALL} | {"negative_prompt": s.negative_prompt or None}
    hints = s.control_image or (s.image,) * len(s.controlnet)
    given["control_image"] = [hint_of(s, path, pipe.downscale) for path in hints] or None
    given["ip_adapter_image"] = list(s.ip_adapter_image) or None
    for name in ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"):
        given[name] = value[0] if len(value := getattr(s, name)) == 1 else value
    with called(Path("mask_image"), f"--mask_image {s.mask_image}"):
        image: Image = pipe(prompt, **given, **more).images[0]
    return image
