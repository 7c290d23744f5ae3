"""What one call of the pipeline needs: its noise, its prompts, the adapters they name, and checks of what it was asked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff.core.errors import SettingsError, did_you_mean
from minidiff.core.inject import adapter_names, lora_layers
from minidiff.core.rng import normal
from minidiff.core.text import LENGTH, count_chunks
from minidiff.draw.prompting import Prompt, parse_prompt

if TYPE_CHECKING:
    from minidiff.draw.pipeline import StableDiffusionPipeline

Draw = Callable[[int | str], Tensor]


def noise_source(shape: tuple[int, ...], seed: int | Sequence[int] | None, generator: torch.Generator | None) -> Draw:
    """draw(purpose) -> standard normal noise of `shape`; the purpose is "latents", "posterior" (a picture's own latents),
    "surroundings" (inpainting models), or i for the noise of step i.

    From seeds, each picture's noise is a function of its seed and the purpose, fp32 on the CPU, for any device. A generator
    does not look at the purpose: it gives its next numbers, on its own device, so the order of the calls is diffusers'.
    """
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise SettingsError(f"generator is a {type(generator).__name__}; give one torch.Generator, or seeds.")
        return lambda purpose: torch.randn(shape, generator=generator, device=generator.device)
    seeds = check_seeds(int(torch.randint(2**31, ())) if seed is None else seed, shape[0])

    def draw(purpose: int | str) -> Tensor:
        where: tuple[int | str, ...] = ("step", purpose) if isinstance(purpose, int) else (purpose,)
        return torch.stack([normal(shape[1:], s, *where) for s in seeds])

    return draw


def check_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed for each picture. Plain ints: numpy's look different to the hash, and would draw other pictures."""
    try:
        seeds = [index(s) for s in seed] if isinstance(seed, Iterable) else [index(seed) + i for i in range(count)]
    except TypeError:
        raise SettingsError(f"seed is {seed!r}; it must be a whole number, or one for each picture.") from None
    if len(seeds) != count:
        raise SettingsError(f"{len(seeds)} seeds were given for {count} pictures; give one number, or one for each.")
    return seeds


def pairs(
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    per_prompt: int,
    embeds: Tensor | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """Each prompt `per_prompt` times, and a negative prompt for each; `embeds` (B, 77 k, D) stand in for the prompts."""
    if per_prompt < 1:
        raise SettingsError(f"num_images_per_prompt is {per_prompt}; it must be at least 1.")
    if (prompt is None) == (embeds is None):
        raise SettingsError("give either a prompt or prompt_embeds.")
    if embeds is not None:
        prompts = [""] * len(check_floats("prompt_embeds", embeds))
    else:
        prompts = as_list(prompt if prompt is not None else "")
    negatives = as_list(negative_prompt or "")
    if not prompts or not all(isinstance(p, str) for p in prompts + negatives):
        raise SettingsError("prompt and negative_prompt must be a text, or a list of texts.")
    prompts = [p for p in prompts for _ in range(per_prompt)]
    negatives = negatives * len(prompts) if len(negatives) == 1 else [n for n in negatives for _ in range(per_prompt)]
    if len(prompts) != len(negatives):
        raise SettingsError(f"{len(negatives)} negative prompts for {len(prompts)} pictures; give one, or one for each prompt.")
    return [parse_prompt(p) for p in prompts], [parse_prompt(n) for n in negatives]


def encode_both(
    pipe: "StableDiffusionPipeline",
    prompts: Sequence[Prompt],
    negatives: Sequence[Prompt],
    clip_skip: int,
    embeds: tuple[Tensor | None, Tensor | None],
    guided: bool,
) -> tuple[Tensor, Tensor | None]:
    """Prompts and negative prompts as (B, 77 k, D), with the same k; `embeds` stand in for either. None: not needed."""
    count, width = len(prompts), pipe.text_encoder.config.hidden_size
    given = [
        None if x is None else one_for_each(name, x, count, width).to(pipe.device, pipe.dtype)
        for name, x in zip(("prompt_embeds", "negative_prompt_embeds"), embeds)
    ]
    wanted = [prompts, negatives] if guided else [prompts]
    k = count_chunks(pipe.tokenizer, [p for side in wanted for p in side], pipe.placeholders)
    k = max(k, *(0 if x is None else x.shape[1] // LENGTH for x in given))
    rows = [pipe.encode_prompt(side, clip_skip, k) if x is None else x for x, side in zip(given, wanted)]
    if guided and rows[0].shape != rows[1].shape:
        raise SettingsError(f"prompt_embeds are {rows[0].shape[1]} tokens long and the negative ones {rows[1].shape[1]}.")
    return rows[0], rows[1] if guided else None


def one_for_each(name: str, given: Tensor, count: int, width: int) -> Tensor:
    """Embeddings (B, 77 k, D) -> (count, 77 k, D); SettingsError where they do not go into it."""
    check_floats(name, given)
    if given.ndim != 3 or not len(given) or count % len(given) or given.shape[1] % LENGTH or given.shape[2] != width:
        fits = f"for {count} pictures it must be (1 or {count}, {LENGTH} k, {width})"
        raise SettingsError(f"{name} has the shape {tuple(given.shape)}; {fits}, as encode_prompt gives it.")
    return given.repeat_interleave(count // len(given), dim=0)


def check_output_type(output_type: str) -> None:
    if output_type not in ("pil", "pt", "latent"):
        raise SettingsError(f'output_type "{output_type}" is unknown; it is pil, pt or latent.')


def finished(drawn: Tensor, output_type: str) -> Any:
    """Pictures (B, 3, H, W) in [-1, 1] as they are for "pt", else as PIL's."""
    if output_type == "pt":
        return drawn
    from minidiff.draw.images import to_pil  # only now: Pillow takes time to import

    return to_pil(drawn)


def check_floats(name: str, given: Tensor) -> Tensor:
    """A caller's own tensor, unless it is none of plain finite floats."""
    if not isinstance(given, Tensor) or not given.is_floating_point() or not given.ndim:
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise SettingsError(f"{name}: this is a {kind}; give a tensor of floats.")
    if not given.isfinite().all():
        raise SettingsError(f"{name}: there is NaN or infinity in the tensor; look where it was made.")
    return given


def whole(name: str, value: int) -> int:
    """A plain int, from any kind of whole number; SettingsError for 64.0 and its like."""
    try:
        return index(value)
    except TypeError:
        raise SettingsError(f"{name} is {value!r}; it must be a whole number.") from None


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(check_floats("latents", latents).shape) != shape:
        raise SettingsError(f"latents have the shape {tuple(latents.shape)}; for this call it must be {shape}.")
    return latents.float()


def as_list(value: str | Sequence[str]) -> list[str]:
    """A text becomes a list of one. So does anything that is not iterable, for the caller's check to refuse."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


# --- adapters that a prompt names ----------------------------------------------------------------------------------------


def loras_of(prompts: Sequence[Prompt], negatives: Sequence[Prompt] = ()) -> dict[str, float]:
    """The adapters that <lora:NAME:weight> names, and their weights, added up where one is named twice, as in A1111.

    A batch runs through one U-Net, so all of its prompts must agree.
    """
    if len({prompt.loras for prompt in prompts}) > 1:
        raise SettingsError("the prompts of one call name different LoRAs; draw them one by one.")
    if any(negative.loras for negative in negatives):
        raise SettingsError("the negative prompt names a LoRA, which would act on both halves; name it in the prompt.")
    weights: dict[str, float] = {}
    for name, weight in prompts[0].loras:
        weights[adapter_name_of(name)] = weights.get(adapter_name_of(name), 0.0) + weight
    return weights


def adapter_name_of(name: str) -> str:
    """A file's name as an adapter's: without dots, which part the names of modules, and with a _ where it is torch's own."""
    plain = name.replace(".", "_")
    return f"{plain}_" if hasattr(nn.ParameterDict(), plain) else plain


def in_lora_dir(folder: str, name: str) -> Path:
    """The file or folder of that name; SettingsError, with what is there, if there is none. A name is no path."""
    for path in (Path(folder, name), Path(folder, f"{name}.safetensors")):
        if Path(name).name == name and name not in ("", "..") and path.exists():
            return path
    there = sorted(path.name.removesuffix(".safetensors") for path in Path(folder).glob("*"))[:10]
    raise SettingsError(
        f'<lora:{name}>: no such file or folder in --lora_dir "{folder}"; there is {", ".join(there) or "nothing"}.'
    )


@contextmanager
def at_strengths(model: nn.Module, strengths: Mapping[str, float]) -> Iterator[None]:
    """Inside the `with`, these adapters have these strengths, and all others the ones they had."""
    known, layers = adapter_names(model), lora_layers(model).values()
    for name in strengths:
        if name not in known:
            there = f"there is {', '.join(known)}" if known else "none is loaded"
            raise SettingsError(f"<lora:{name}>: no adapter is called so; {there}.{did_you_mean(name, known)}")
    if strengths and any(layer.unmerged_weight is not None for layer in layers):
        raise SettingsError("the adapters are fused into the weights, so <lora:…> cannot change them; unfuse_lora first.")
    before = [layer.strength for layer in layers]
    for layer in layers:
        layer.strength = {name: strengths.get(name, own) for name, own in layer.strength.items()}
    try:
        yield
    finally:
        for layer, strength in zip(layers, before):
            layer.strength = strength
