"""Describe a weight file: its program and model family, its size, ranks and alpha, trigger words, and what is broken.

    for report in inspect("dog.safetensors"): print(as_text(report))
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from minidiff.core.config import SD15_UNET
from minidiff.core.errors import MinidiffError
from minidiff.core.lora import LoRAWeights
from minidiff.files.folder import read_json
from minidiff.files.lora_file import check_match, read_modules
from minidiff.files.lora_module import METADATA, alpha_of
from minidiff.files.lora_names import lora_header
from minidiff.files.model import ModelParts, split_single_file
from minidiff.files.names import UNET_PREFIX, lora_dialect, modern
from minidiff.files.values import listed, printable
from minidiff.files.weights import TensorFile, check_fit, find_weights, named, read_header
from minidiff.files.word_file import KOHYA, is_embedding

Facts = Iterator[tuple[str, Any]]  # labels, and for each a text, a list of texts, or a table of texts
FITS = "the file fits it"


def inspect(path: str | Path, model: ModelParts | None = None) -> list[dict[str, Any]]:
    """A report on a file; for a folder, on each weight file in it. With `model`, also whether the file fits it."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        networks = [describe(find_weights(path / part), model) for part in ("unet", "vae", "text_encoder")]
        return [describe_folder(path), *networks]
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return [describe(file, model) for file in files or [find_weights(path)]]


def as_text(report: Mapping[str, Any]) -> str:
    """A report for people: the path, and below it the labels and their texts."""
    width = max(map(len, report)) + 2
    lines = []
    for label, value in report.items():
        if isinstance(value, Mapping):  # metadata
            short = {name: text if len(text) <= 100 else f"({len(text):,} letters)" for name, text in value.items()}
            value = [f"{name:<{max(map(len, value))}}  {text}" for name, text in short.items()]
        first, *more = value if isinstance(value, list) else str(value).splitlines()
        lines += [first if label == "path" else f"  {label:<{width}}{first}", *(f"  {'':<{width}}{line}" for line in more)]
    return printable("\n".join(lines))


def describe_folder(path: Path) -> dict[str, Any]:
    index = read_json(path / "model_index.json", "a model folder has one")
    schedule = read_json(path / "scheduler" / "scheduler_config.json", "a model folder has one")
    said = {"pipeline": index.get("_class_name"), "predicts": schedule.get("prediction_type", "epsilon")}
    said["sampler"] = schedule.get("_class_name")
    return {"path": str(path), "is": "a model folder in the diffusers layout", **{key: str(said[key]) for key in said}}


def describe(path: Path, model: ModelParts | None) -> dict[str, Any]:
    """WeightsError if it is no safetensors file. Other damage is in the report, in the words of the error in loading."""
    file = read_header(path)
    report: dict[str, Any] = {"path": str(path), "is": file.looks_like, "size": size(file)}
    is_lora, is_word = lora_dialect(file.tensors), is_embedding(file.tensors)
    try:
        for label, value in (lora_facts if is_lora else word_facts if is_word else model_facts)(file, model):
            report[label] = value
    except MinidiffError as error:
        report["problem"] = str(error)
    if about := {key: text for key, text in sorted(file.metadata.items()) if key not in ("format", METADATA)}:
        report["metadata"] = about
    return report


def size(file: TensorFile) -> str:
    numbers: Counter[str] = Counter()
    for info in file.tensors.values():
        numbers[str(info.dtype).removeprefix("torch.")] += prod(info.shape)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in numbers.most_common())
    return f"{file.path.stat().st_size:,} bytes; {len(file.tensors):,} tensors of {kinds or 'nothing'}"


# --- LoRA --------------------------------------------------------------------------------------------------------------


def lora_facts(file: TensorFile, model: ModelParts | None) -> Facts:
    if words := trigger_words(file.metadata):
        yield "trigger words", words
    header = lora_header(file, model.unet.config if model else SD15_UNET)
    lora = read_modules(header, None)
    yield "layers", layer_groups(lora.modules)
    if not lora.alpha_known:
        yield "alpha", "not in the file; then it is the rank"
    if untrained := [name for name, weights in lora.modules.items() if not weights.B.any()]:
        yield "never trained", listed("layers, where B is 0", untrained).strip()
    if model:
        check_match(model.adaptable, header)
        yield "model", FITS


def layer_groups(modules: Mapping[str, LoRAWeights]) -> list[str]:
    """Lines such as `128 of the U-Net: rank 8, alpha 8 (to_k, to_out.0, to_q, to_v)`, the largest group first."""
    groups: dict[str, list[str]] = {}
    for name, change in modules.items():
        component = "text encoder" if name.startswith("text_encoder.") else "U-Net"
        dora = ", DoRA" if change.magnitude is not None else ""
        last = re.findall(r"[^.]+(?:\.\d+)?$", name)[0]  # "to_q", but "to_out.0"
        groups.setdefault(f"of the {component}: rank {change.rank}, alpha {alpha_of(change):g}{dora}", []).append(last)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"{len(names)} {what} ({', '.join(sorted(set(names)))})" for what, names in largest]


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


# --- textual inversion, models -----------------------------------------------------------------------------------------


def word_facts(file: TensorFile, model: ModelParts | None) -> Facts:
    shapes = {key: (1, *info.shape)[-2:] for key, info in file.tensors.items()}
    said = file.metadata.get("token", file.path.stem)
    yield "vectors", [f"{said if key == KOHYA else key}: {n} of width {width}" for key, (n, width) in shapes.items()]
    if zero := [key for key, tensor in file.read().items() if not tensor.any()]:
        yield "never trained", listed("words, whose vectors are 0", zero).strip()
    if model:
        width = model.text_encoder.config.hidden_size
        fits = all(shape[1] == width for shape in shapes.values())
        yield "model", FITS if fits else f"the text encoder is {width} wide: the vectors do not fit"


def model_facts(file: TensorFile, model: ModelParts | None) -> Facts:
    file.read()  # WeightsError for NaN and infinity
    if model:
        keys = {modern(key) for key in file.tensors}
        if any(key.startswith(UNET_PREFIX) for key in keys):
            networks = split_single_file(file.path, model.unet.config, model.vae.config)
        else:
            networks = {max(model.networks, key=lambda part: len(keys & named(model.networks[part]).keys())): file}
        for part, inside in networks.items():
            check_fit(model.networks[part], inside)
        yield "model", FITS
