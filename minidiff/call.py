"""What one call of the pipeline needs: its noise, its prompts, the adapters they name, and checks of what it was asked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.adapters.inject import adapter_names, lora_layers
from minidiff.errors import SettingsError, did_you_mean
from minidiff.models.prompt import Prompt
from minidiff.rng import normal

Draw = Callable[[int | str], Tensor]


def noise_source(shape: tuple[int, ...], seed: int | Sequence[int] | None, generator: torch.Generator | None) -> Draw:
    """draw(purpose) -> standard normal noise of `shape`; the purpose is "latents", or i for the noise of step i.

    From seeds, each picture's noise is a function of its seed and the purpose, fp32 on the CPU, for any device. A generator
    does not look at the purpose: it gives its next numbers, on its own device, so the order of the calls is diffusers'.
    """
    if generator is not None:
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
) -> tuple[list[str], list[str]]:
    """Each prompt `per_prompt` times, and a negative prompt for each; `embeds` (B, L, D) stand in for the prompts."""
    if per_prompt < 1:
        raise SettingsError(f"num_images_per_prompt is {per_prompt}; it must be at least 1.")
    if (prompt is None) == (embeds is None):
        raise SettingsError("give either a prompt or prompt_embeds.")
    prompts, negatives = as_list("" if prompt is None else prompt), as_list(negative_prompt or "")
    if not prompts or not all(isinstance(p, str) for p in prompts + negatives):
        raise SettingsError("prompt and negative_prompt must be a text, or a list of texts.")
    prompts = [p for p in (prompts if embeds is None else [""] * len(embeds)) for _ in range(per_prompt)]
    negatives = negatives * len(prompts) if len(negatives) == 1 else [n for n in negatives for _ in range(per_prompt)]
    if len(prompts) != len(negatives):
        raise SettingsError(f"{len(negatives)} negative prompts for {len(prompts)} pictures; give one, or one for each prompt.")
    return prompts, negatives


def check_output_type(output_type: str) -> None:
    if output_type not in ("pil", "pt", "latent"):
        raise SettingsError(f'output_type "{output_type}" is unknown; it is pil, pt or latent.')


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(latents.shape) != shape:
        raise SettingsError(f"latents have the shape {tuple(latents.shape)}; for this call it must be {shape}.")
    return latents.float()


def as_list(value: str | Sequence[str]) -> list[str]:
    """A text as a list of one; what is no list either is left for the checks to refuse, in a list as well."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


# --- adapters that a prompt names ----------------------------------------------------------------------------------------


def loras_of(prompts: Sequence[Prompt]) -> dict[str, float]:
    """The adapters that <lora:NAME:weight> names, and their weights, added up where one is named twice, as in A1111.

    A batch runs through one U-Net, so all of its prompts must agree.
    """
    if len({prompt.loras for prompt in prompts}) > 1:
        raise SettingsError("the prompts of one call name different LoRAs; draw them one by one.")
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
        if Path(name).name == name and path.exists():
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
