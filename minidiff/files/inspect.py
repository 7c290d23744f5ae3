"""Describe a weight file: its program and model family, ranks, trigger words, and what is odd about it.

    for report in inspect("dog.safetensors"): print(report)

A damaged adapter is described too: the report names numbers that are not finite, and each reason why minidiff could not
use the file.

Shapes: A (r, in[, kh, kw]), B (out, r); vectors (n, D).
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidiff.core.config import SD15_UNET
from minidiff.core.errors import AdapterError, WeightsError
from minidiff.core.inject import adaptable_layers
from minidiff.core.lora import LoRAWeights
from minidiff.files import lora_file as lora
from minidiff.files import names as keymaps
from minidiff.files import word_file as embeddings
from minidiff.files.folder import read_json
from minidiff.files.lora_module import METADATA, changed_shape, check_parts, flat, read_configs, weights_of
from minidiff.files.lora_names import Headers, lora_header
from minidiff.files.merge import svd
from minidiff.files.model import ModelParts
from minidiff.files.values import printable
from minidiff.files.weights import TensorFile, find_weights, is_finite, is_pickle, read_header

Parts = dict[str, Tensor]  # a module's tensors by part
NETWORKS = ("unet", "vae", "text_encoder")
PARTS_OF_SINGLE_FILES = {
    keymaps.UNET_PREFIX: "U-Net",
    keymaps.VAE_PREFIX: "VAE",
    "cond_stage_model.": "text encoder",
    "conditioner.": "text encoders",
    "model_ema.": "a second U-Net (EMA)",
}
ENERGY = 0.99


@dataclass(frozen=True)
class Report:
    """The facts about one file: label -> a text, a list of texts, or a table of texts."""

    path: Path
    looks_like: str
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = {"is": self.looks_like, **self.facts}
        width = max(map(len, facts)) + 2
        lines = [str(self.path)]
        for label, value in facts.items():
            first, *more = as_lines(value)
            lines += [f"  {label:<{width}}{first}", *(f"  {'':<{width}}{line}" for line in more)]
        return printable("\n".join(lines))

    def as_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "is": self.looks_like, **self.facts}


def as_lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        width = max(map(len, value))
        return [f"{name:<{width}}  {text if len(text) <= 100 else f'({len(text):,} letters)'}" for name, text in value.items()]
    if isinstance(value, list):
        return [*value[:10], *([f"… and {len(value) - 10} more"] if len(value) > 10 else [])]
    return [str(value)]


# --- any file ----------------------------------------------------------------------------------------------------------


def inspect(path: str | Path, model: ModelParts | None = None) -> list[Report]:
    """One report; for a model folder, another one for each network. With `model`, it also says whether the file fits it."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        return [describe_folder(path), *(describe(find_weights(path / part), model) for part in NETWORKS)]
    return [describe(find_file(path), model)]


def describe_folder(path: Path) -> Report:
    index = read_json(path / "model_index.json", "a model folder has one")
    schedule = read_json(path / "scheduler" / "scheduler_config.json", "a model folder has one")
    facts = {
        "pipeline": str(index.get("_class_name", "not said")),
        "predicts": str(schedule.get("prediction_type", "epsilon")),
        "sampler": str(schedule.get("_class_name", "not said")),
    }
    return Report(path, "a model folder in the diffusers layout", facts)


def find_file(path: Path) -> Path:
    """The file itself, or the weights in a folder."""
    if not path.is_dir():
        return path
    there = sorted(path.glob("*.safetensors"))
    usual = [file for file in there if file.name in (lora.FILE_NAME, lora.PEFT_FILE, embeddings.FILE_NAME)]
    if len(chosen := usual or there) == 1:
        return chosen[0]
    names = ", ".join(file.name for file in chosen)
    raise WeightsError(f"{path} has {f'several weight files, {names}: name one' if names else 'no .safetensors file'}.")


def describe(path: Path, model: ModelParts | None) -> Report:
    """WeightsError if it is no safetensors file, or damaged."""
    if is_pickle(path):
        raise WeightsError(
            f"{path} is a pickle, which can run code when it is opened. Convert it first, which runs none: "
            f"minidiff convert {path} NEW.safetensors --to safetensors"
        )
    file = read_header(path)
    if keymaps.lora_dialect(file.tensors):
        facts = lora_facts(file, model)
    elif embeddings.is_embedding(file.tensors):
        facts = embedding_facts(file, model)
    else:
        facts = model_facts(file, model)
    if about := {key: text for key, text in sorted(file.metadata.items()) if key not in ("format", METADATA)}:
        facts["metadata"] = about
    return Report(path, file.looks_like, {"size": size(file), **facts})


def size(file: TensorFile) -> str:
    numbers: Counter[str] = Counter()
    for info in file.tensors.values():
        numbers[str(info.dtype).removeprefix("torch.")] += prod(info.shape)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in numbers.most_common())
    return f"{file.path.stat().st_size:,} bytes; {len(file.tensors):,} tensors of {kinds or 'nothing'}"


def tensors_of(file: TensorFile) -> Iterator[tuple[str, Tensor]]:
    """One after the other, because a model may be large. NaN and infinity are not refused."""
    try:
        with safe_open(file.path, framework="pt") as opened:
            for name, info in file.tensors.items():
                yield name, opened.get_tensor(info.key)
    except SafetensorError as error:
        raise WeightsError(f"{file.path} is damaged: {error}.") from error


# --- LoRA --------------------------------------------------------------------------------------------------------------


def lora_facts(file: TensorFile, model: ModelParts | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    config = model.unet.config if model else SD15_UNET
    try:
        header = lora_header(file, config)
        configs = read_configs(file)
    except AdapterError as error:  # another kind of adapter, or an incomplete one
        return {"problems": [str(error)]}
    tensors, problems = dict(tensors_of(file)), [f"{key} is no part of an adapter for SD" for key in header.unknown]
    found: dict[str, tuple[Parts, float | None]] = {}
    changes: list[LoRAWeights] = []
    for name, infos in header.modules.items():
        parts = {part: tensors[info.key] for part, info in infos.items()}
        try:
            check_parts(name, infos)
            scale = lora.said_scale(file.path, name, parts, configs)
            changes.append(weights_of(name, parts, 1.0))
            found[name] = parts, scale
        except AdapterError as error:
            problems.append(str(error))
    facts["layers"] = layer_groups(found)
    if model:
        facts["model"] = lora_match(header.modules, len(file.tensors), model)
    if words := trigger_words(file.metadata):
        facts["trigger words"] = words
    if plain := [change for change in changes if change.magnitude is None and is_finite(change.A) and is_finite(change.B)]:
        facts["rank needed"] = rank_needed(plain)
    if untrained := [name for name, (parts, _) in found.items() if not parts["up"].any()]:
        facts["never trained"] = [f"{len(untrained)} of {len(found)} layers, where B is 0:", *untrained]
    return facts | oddities(tensors, problems)


def layer_groups(found: Mapping[str, tuple[Parts, float | None]]) -> list[str]:
    """Lines such as `128 of the U-Net: rank 8, alpha 8 (to_k, to_out.0, to_q, to_v)`, the largest group first."""
    groups: dict[str, list[str]] = {}
    for name, (parts, scale) in found.items():
        component = "text encoder" if name.startswith("text_encoder.") else "U-Net"
        rank = len(parts["down"])
        alpha = "not said (then it is the rank)" if scale is None else f"{scale * rank:g}, alpha/rank {scale:g}"
        dora = ", DoRA" if parts.keys() & {"magnitude", "dora_scale"} else ""
        last = re.findall(r"[^.]+(?:\.\d+)?$", name)[0]  # "to_q", but "to_out.0"
        groups.setdefault(f"of the {component}: rank {rank}, alpha {alpha}{dora}", []).append(last)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"{len(names)} {what} ({', '.join(sorted(set(names)))})" for what, names in largest] or ["none"]


def lora_match(modules: Headers, count: int, model: ModelParts) -> str:
    """How many tensors have a layer of their shape in the model."""
    shapes = {
        f"{part}.{name}": flat(tuple(layer.weight.shape))
        for part, network in model.adaptable.items()
        for name, layer in adaptable_layers(network).items()
    }
    fitting = [
        parts for name, parts in modules.items() if {"down", "up"} <= parts.keys() and changed_shape(parts) == shapes.get(name)
    ]
    return f"matches {sum(map(len, fitting))} of {count} tensors of the file"


def rank_needed(changes: Sequence[LoRAWeights]) -> str:
    """How much of the rank is used: the number of singular values of ΔW that hold ENERGY of Σ σ²."""
    ranks = [rank_for(svd(weights)[1]) for weights in changes]
    mean, most = sum(ranks) / len(ranks), max(ranks)
    return f"{ENERGY:.0%} of what ΔW does is in rank {mean:.1f} on average, {most} at most (minidiff merge resize)"


def rank_for(S: Tensor, energy: float = ENERGY) -> int:
    """How many of the singular values S (r), the largest first, hold this share of Σ σ²; 0 where all are 0."""
    squares = S.square()
    return int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1 if squares.any() else 0


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words for a prompt, from the metadata of minidiff, kohya and others."""
    words = [metadata[key] for key in ("modelspec.trigger_phrase", "instance_prompt", "trigger") if metadata.get(key)]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = sum((Counter(tags) for tags in folders.values()), Counter())
    except (ValueError, TypeError, AttributeError, RecursionError):  # not kohya's table
        counts = Counter()
    if counts:
        words.append("most frequent in the captions: " + ", ".join(f"{tag} ({n})" for tag, n in counts.most_common(8)))
    return list(dict.fromkeys(words))


# --- textual inversion -------------------------------------------------------------------------------------------------


def embedding_facts(file: TensorFile, model: ModelParts | None) -> dict[str, Any]:
    tensors = dict(tensors_of(file))
    words = []
    for key, tensor in tensors.items():
        rows = torch.atleast_2d(tensor.float())
        word = file.metadata.get("token", file.path.stem) if key == embeddings.KOHYA else key
        norms = rows.norm(dim=1).tolist()
        words.append(f"{word}: {len(rows)} of width {rows.shape[1]}, lengths {', '.join(f'{n:.3g}' for n in norms[:8])}")
    facts: dict[str, Any] = {"vectors": words}
    if model:
        width = model.text_encoder.config.hidden_size
        fits = all(tensor.shape[-1] == width for tensor in tensors.values())
        facts["model"] = f"its text encoder is {width} wide: {'the vectors fit' if fits else 'the vectors do not fit'}"
    untrained = [name for name, tensor in tensors.items() if not tensor.any()]
    problems = [f"{name} is {'0: never trained' if tensors[name].numel() else 'empty'}" for name in untrained]
    return facts | oddities(tensors, problems)


# --- models ------------------------------------------------------------------------------------------------------------


def model_facts(file: TensorFile, model: ModelParts | None) -> dict[str, Any]:
    numbers: Counter[str] = Counter()
    for key, info in file.tensors.items():
        numbers.update({name: prod(info.shape) for prefix, name in PARTS_OF_SINGLE_FILES.items() if key.startswith(prefix)})
    facts: dict[str, Any] = {"parts": [f"{name}: {count:,} numbers" for name, count in numbers.items()]} if numbers else {}
    if model:
        names = names_in(model)
        matched = [key for key, info in file.tensors.items() if names.get(keymaps.modern(key)) == prod(info.shape)]
        facts["model"] = f"matches {len(matched)} of {len(file.tensors)} tensors of the file"
    infinite = [name for name, tensor in tensors_of(file) if not is_finite(tensor)]
    return facts | ({"not finite": infinite} if infinite else {})


def names_in(model: ModelParts) -> dict[str, int]:
    """The names of the model's tensors in every layout, and the size of each."""
    tables: tuple[tuple[str, str, Mapping[str, str]], ...] = (
        ("unet", keymaps.UNET_PREFIX, keymaps.unet_table(model.unet.config)),
        ("vae", keymaps.VAE_PREFIX, keymaps.vae_table(model.vae.config)),
        ("text_encoder", keymaps.TEXT_PREFIX + keymaps.CLIP, {}),
    )
    names: dict[str, int] = {}
    for part, prefix, table in tables:
        for key, tensor in model.networks[part].state_dict().items():
            ldm = keymaps.rename(keymaps.modern(key), table)
            names |= dict.fromkeys((keymaps.modern(key), ldm, prefix + ldm), tensor.numel())
    return names


def oddities(tensors: Mapping[str, Tensor], problems: list[str]) -> dict[str, Any]:
    infinite = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    return ({"not finite": infinite} if infinite else {}) | ({"problems": problems} if problems else {})
