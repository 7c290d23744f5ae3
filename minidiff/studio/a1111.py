"""The text `parameters` in a picture: how it was made, in the words of AUTOMATIC1111 (A1111), for people and other programs.

text = parameters(settings, pipe, image.size)       # settings: the values of the flags by name
settings = read_a1111(text)                         # prompts (LoRA tags stay in them), steps, sampler, seed, size, guidance
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from minidiff import __version__
from minidiff.core.grids import SAMPLERS
from minidiff.draw.canvas import IMAGE_STRENGTH
from minidiff.draw.images import generation_text
from minidiff.draw.lora_tags import adapter_name_of, in_lora_dir
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.prompting import parse_prompt
from minidiff.studio.hashes import model_sha256

Settings = Mapping[str, Any]
SAMPLER_NAMES = {  # ours -> A1111's
    **{name: name.upper().replace("_", " ") for name in SAMPLERS},
    **{"pndm": "PLMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "unipc": "UniPC"},
}


# --- writing -----------------------------------------------------------------------------------------------------------


def parameters(settings: Settings, pipe: StableDiffusionPipeline, size: tuple[int, int]) -> str:
    """How a picture of `size` (W, H) was made, in the words and the order of A1111, which reads it back."""
    settings = with_named_loras(settings)
    prompt, sampler, model = settings["prompt"], settings["sampler"] or pipe.sampler, settings["pretrained_model_name_or_path"]
    loras = list(zip(map(title_of, settings["lora"]), settings["lora_weight"]))
    tags = [f"<lora:{name}:{weight:g}>" for name, weight in loras if f"<lora:{name}:" not in prompt]
    fields: dict[str, object] = {"Steps": settings["num_inference_steps"], "Sampler": SAMPLER_NAMES[sampler]}
    if SAMPLERS[sampler].karras:
        asked = settings["use_karras_sigmas"]
        fields["Schedule type"] = "Karras" if (pipe.noise_config.use_karras_sigmas if asked is None else asked) else "Uniform"
    fields |= {"CFG scale": settings["guidance_scale"], "Seed": settings["seed"], "Size": "{}x{}".format(*size)}
    fields |= {"Model hash": model_sha256(model)[:10], "Model": title_of(model)}
    if settings["image"]:
        fields["Denoising strength"] = strength_of(settings)
    if settings["clip_skip"]:
        fields["Clip skip"] = settings["clip_skip"] + 1  # A1111 counts from 1
    fields["Version"] = f"minidiff {__version__}"
    return generation_text(" ".join(filter(None, [prompt, *tags])), settings["negative_prompt"], fields)


def title_of(path: str) -> str:
    """The name of a file without its ending, or of a folder; without the marks that separate A1111's fields."""
    return os.path.basename(os.path.abspath(path)).removesuffix(".safetensors").replace(":", "").replace(",", "")


def strength_of(settings: Settings) -> float | None:
    """The strength that is used where there is a picture to start from."""
    usual = None if not settings["image"] else 1.0 if settings["mask_image"] else IMAGE_STRENGTH
    return usual if settings["strength"] is None else float(settings["strength"])


def with_named_loras(settings: Settings) -> dict[str, Any]:
    """The settings with the LoRAs that only the prompt names, <lora:dog:0.8>, as if --lora had given their files."""
    given = {adapter_name_of(title_of(path)) for path in settings["lora"]}
    named = dict(parse_prompt(settings["prompt"]).loras)
    found = {name: weight for name, weight in sorted(named.items()) if adapter_name_of(name) not in given}
    paths = (str(in_lora_dir(settings["lora_dir"], name)) for name in found)
    weights = settings["lora_weight"] or (1.0,) * len(settings["lora"])
    return {**settings, "lora": (*settings["lora"], *paths), "lora_weight": (*weights, *found.values())}


# --- reading -----------------------------------------------------------------------------------------------------------

FIELD = re.compile(r'(\w[\w /-]{0,60}): *("(?:\\.|[^"\\])*"|[^,]*)')  # A1111's own, with a limit: time stays linear
LINE = re.compile(r"\n(?=(?:Steps|Sampler|CFG scale|Seed|Size|Schedule type|Model|Version)[\w ]*: )(?=[^\n]*\bSteps: \d)")


def read_a1111(text: str) -> dict[str, Any]:
    """The settings in a text of A1111: prompt, `Negative prompt: …`, then one line `Steps: 20, Sampler: Euler a, …`.

    Other programs sort that line, so it may begin with another of its names.
    """
    *head, line = LINE.split(f"\n{text}") if LINE.search(f"\n{text}") else [f"\n{text}", ""]
    prompt, _, negative = "\n".join(head).partition("\nNegative prompt:")
    settings: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    fields = dict(FIELD.findall(line.partition("\n")[0]))
    numbers = {"Steps": ("num_inference_steps", int), "Seed": ("seed", int), "CFG scale": ("guidance_scale", float)}
    for label, (name, kind) in numbers.items():
        with suppress(KeyError, ValueError):  # it is not there, or is no number
            settings[name] = kind(fields[label])
    with suppress(KeyError, ValueError):
        settings["width"], settings["height"] = map(int, fields["Size"].split("x"))
    theirs, schedule = fields.get("Sampler", "").lower(), fields.get("Schedule type", "").lower()
    names = {name.lower(): ours for ours, name in SAMPLER_NAMES.items()}
    if sampler := names.get(theirs.removesuffix(" karras")):  # `DPM++ 2M Karras` before A1111's version 1.9
        settings["sampler"] = sampler
        if SAMPLERS[sampler].karras:
            settings["use_karras_sigmas"] = theirs.endswith("karras") or schedule == "karras"
    return settings
