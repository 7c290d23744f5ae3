"""How a picture was made, in the picture: for people and A1111 as `parameters`, and exactly as JSON in the text `minidiff`.

    save_png(image, path, chunks(settings, pipe, seed, image))

studio/replay.py reads it back.

What is stored: every setting, with this picture's own seed; sha256 of the model, the adapters and the input pictures; the
versions of minidiff, torch, transformers and Python; device, precision, threads. What is not: where files lie on the maker's
machine. A path that was typed relative to the working folder, or a hub id, stays as typed; of an absolute path, of one
through `..` or `~`, only the last name stays, as in A1111. On the same machine it is found again by its hash, because
studio/hashes.py remembers the place, outside the picture. No date, no user, no host.
"""

import json
import os
import platform
from dataclasses import fields, replace
from pathlib import PureWindowsPath
from typing import Any, TypeVar

import torch
from PIL import Image

from minidiff import __version__
from minidiff.cli.flags import Sample, Sampling
from minidiff.core.grids import SAMPLERS
from minidiff.draw.call import adapter_name_of, in_lora_dir
from minidiff.draw.canvas import IMAGE_STRENGTH
from minidiff.draw.images import generation_text
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.prompting import parse_prompt
from minidiff.files.lora_file import find_lora
from minidiff.studio.foreign import SAMPLER_NAMES
from minidiff.studio.hashes import HASHES, remember_place, sha256_of

AnySampling = TypeVar("AnySampling", bound=Sampling)
SCHEMA = 1
CHUNK = "minidiff"  # the key of the text in the PNG
TEXTS = ("prompt", "negative_prompt")
AS_IT_WAS = ("device", "torch_dtype")  # they stand under "machine", and say what was used, not what was asked for
NOT_PIXELS = ("output", "num_images_per_prompt", "preview", "lora_dir", "cuda_graph", *AS_IT_WAS)


# --- writing ---------------------------------------------------------------------------------------------------------


def chunks(settings: Sample, pipe: StableDiffusionPipeline, seed: int, image: Image.Image) -> dict[str, str]:
    """The texts of one picture, for `save_png`. `seed` is its own, and it must have been drawn alone: in a batch, matrix
    products round differently, and one value in ten thousand would differ by 1."""
    about = recipe(with_named_loras(settings, settings.prompt or ""), pipe, seed, image.size)
    text = parameters(settings, pipe, settings.prompt or "", seed, image)
    return {"parameters": text, CHUNK: json.dumps(about, separators=(",", ":"), allow_nan=False)}


def recipe(settings: Sample, pipe: StableDiffusionPipeline, seed: int, size: tuple[int, int]) -> dict[str, Any]:
    """What the JSON says: schema, settings, sha256 by setting, size (W, H), versions, machine.

    Paths in it are public (see above); private ones are remembered for this user under their hash.
    """
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in NOT_PIXELS}
    values |= {"seed": seed, "sampler": settings.sampler or pipe.sampler, "strength": _strength(settings)}
    values["lora_weight"] = settings.lora_weight or (1.0,) * len(settings.lora)
    hashes: dict[str, str | list[str]] = {}
    for name, value in values.items():
        if name in HASHES and value:
            found = [(path, HASHES[name](path)) for path in several(value)]
            for path, sha256 in found:
                if public_path(path) != path:
                    remember_place(sha256, path)
            hashes[name] = [sha256 for _, sha256 in found] if isinstance(value, tuple) else found[0][1]
        if name not in TEXTS:
            values[name] = _public(value)
    return {
        "schema": SCHEMA,
        "settings": values,
        "sha256": hashes,
        "size": list(size),
        "versions": versions(),
        "machine": machine(pipe),
    }


def with_named_loras(settings: AnySampling, prompt: str) -> AnySampling:
    """The settings with the LoRAs that only the prompt names, <lora:dog:0.8>, as if --lora had given their files."""
    given = {adapter_name_of(_title(path)) for path in settings.lora}
    named = dict(parse_prompt(prompt).loras)
    found = {name: weight for name, weight in sorted(named.items()) if adapter_name_of(name) not in given}
    paths = tuple(str(in_lora_dir(settings.lora_dir, name)) for name in found)
    weights = settings.lora_weight or (1.0,) * len(settings.lora)
    return replace(settings, lora=(*settings.lora, *paths), lora_weight=(*weights, *found.values()))


def versions() -> dict[str, str]:
    import transformers

    return {
        "minidiff": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(pipe: StableDiffusionPipeline) -> dict[str, str | int]:
    """What the last bit of a pixel depends on: the kernels are those of the CPU's instructions, or of the GPU."""
    gpu = pipe.device.type == "cuda"
    kernels = torch.cuda.get_device_name(pipe.device) if gpu else torch.backends.cpu.get_cpu_capability()
    dtype = str(pipe.dtype).removeprefix("torch.")
    return {"device": pipe.device.type, "dtype": dtype, "threads": torch.get_num_threads(), "kernels": kernels}


def public_path(path: str) -> str:
    """A path as typed, if it leads down from the working folder (or is a hub id); else its last name alone."""
    pure = PureWindowsPath(path)  # knows both kinds of slash, and drives
    if not (path.startswith(("~", "/", "\\")) or pure.drive or ".." in pure.parts):
        return path
    return "unnamed" if pure.name in ("", "..") or path.startswith("~") and len(pure.parts) == 1 else pure.name


def _public(value: Any) -> Any:
    """Any setting but the prompts: whatever looks like a private path is shortened."""
    if isinstance(value, str):
        return public_path(value)
    return [_public(one) for one in value] if isinstance(value, tuple) else value


def several(value: Any) -> list[Any]:
    """One value, or many, as a list."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


# --- A1111's text ----------------------------------------------------------------------------------------------------


def parameters(settings: Sampling, pipe: StableDiffusionPipeline, prompt: str, seed: int, image: Image.Image) -> str:
    """How a picture was made, in the words and the order of A1111, which reads it back."""
    settings = with_named_loras(settings, prompt)
    sampler = settings.sampler or pipe.sampler
    loras = zip(map(_title, settings.lora), settings.lora_weight or (1.0,) * len(settings.lora))
    tags = [f"<lora:{name}:{weight:g}>" for name, weight in loras if f"<lora:{name}:" not in prompt]
    said: dict[str, object] = {"Steps": settings.num_inference_steps, "Sampler": SAMPLER_NAMES[sampler]}
    if SAMPLERS[sampler].karras:
        said["Schedule type"] = "Karras" if _karras(settings, pipe) else "Uniform"
    said |= {"CFG scale": settings.guidance_scale, "Seed": seed, "Size": f"{image.width}x{image.height}"}
    said["Model hash"] = HASHES["pretrained_model_name_or_path"](settings.pretrained_model_name_or_path)[:10]
    said["Model"] = _title(settings.pretrained_model_name_or_path)
    if settings.image:
        said["Denoising strength"] = _strength(settings)
    if settings.clip_skip:
        said["Clip skip"] = settings.clip_skip + 1  # theirs counts from 1
    if sampler == "ddim" and settings.eta:
        said["Eta DDIM"] = settings.eta
    if settings.lora:
        hashed = [f"{_title(path)}: {sha256_of(find_lora(path, None), data_only=True)[:12]}" for path in settings.lora]
        said["Lora hashes"] = ", ".join(hashed)
    if settings.textual_inversion:
        found = [f"{_title(path)}: {HASHES['textual_inversion'](path)[:12]}" for path in settings.textual_inversion]
        said["TI hashes"] = ", ".join(found)
    said["Version"] = f"minidiff {__version__}"
    return generation_text(" ".join(filter(None, [prompt, *tags])), settings.negative_prompt, said)


def _title(path: str) -> str:
    """The name of a file without its ending, or of a folder; without the letters that part A1111's fields."""
    return os.path.basename(os.path.abspath(path)).removesuffix(".safetensors").replace(":", "").replace(",", "")


def _strength(settings: Sampling) -> float | None:
    """What is used where there is a picture to start from."""
    if settings.strength is not None or not settings.image:
        return settings.strength
    return 1.0 if settings.mask_image else IMAGE_STRENGTH


def _karras(settings: Sampling, pipe: StableDiffusionPipeline) -> bool:
    return pipe.noise_config.use_karras_sigmas if settings.use_karras_sigmas is None else settings.use_karras_sigmas
