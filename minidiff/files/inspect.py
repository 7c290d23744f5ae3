"""Describe a weight file: its program and model family, its size, ranks and alpha, trigger words, and what is broken.

    for report in inspect("dog.safetensors"): print(as_text(report))
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from minidiff.core.errors import MinidiffError
from minidiff.core.lora import LoRAWeights
from minidiff.files.bundled import here_or_bundled
from minidiff.files.folder import read_json
from minidiff.files.looks import kind_of
from minidiff.files.lora_file import read_lora
from minidiff.files.lora_names import COMPONENTS, METADATA, alpha_of
from minidiff.files.values import listed, printable
from minidiff.files.weights import TensorFile, find_weights, read_header
from minidiff.files.word_file import word_of

Facts = dict[str, Any]  # labels, and for each a text, a list of texts, or a table of texts


def inspect(path: str | Path) -> list[Facts]:
    """A report on a file; for a folder, on each weight file in it."""
    path = here_or_bundled(path)
    if (path / "model_index.json").is_file():
        parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if (path / "text_encoder_2").is_dir() else [])]
        return [describe_folder(path), *(describe(find_weights(path / part)) for part in parts)]
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return [describe(file) for file in files or [find_weights(path)]]


def as_text(report: Facts) -> str:
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


def describe_folder(path: Path) -> Facts:
    index = read_json(path / "model_index.json", "a model folder has one")
    schedule = read_json(path / "scheduler" / "scheduler_config.json", "a model folder has one")
    return {
        "path": str(path),
        "is": "a model folder in the diffusers layout",
        "pipeline": str(index.get("_class_name")),
        "predicts": str(schedule.get("prediction_type", "epsilon")),
        "sampler": str(schedule.get("_class_name")),
    }


def describe(path: Path) -> Facts:
    """WeightsError if it is no safetensors file. Other damage is in the report, in the words of the error in loading."""
    file = read_header(path)
    report: Facts = {"path": str(path), "is": file.looks_like, "size": size(file)}
    try:
        if (kind := kind_of(file.tensors)) in ("a model", "a ControlNet", "an IP-Adapter"):
            file.read()  # WeightsError for NaN and infinity
        else:
            report |= lora_facts(file) if kind == "a LoRA" else word_facts(file)
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


def lora_facts(file: TensorFile) -> Facts:
    lora = read_lora(file)
    facts: Facts = {"trained by": "minidiff" if "base_fingerprint" in file.metadata else ""}
    facts |= {"trigger words": trigger_words(file.metadata), "new words": list(lora.words)}
    if file.metadata.get("trigger"):  # as in the model card: the word, and the prompt that it stood in
        facts["prompt"] = file.metadata.get("modelspec.trigger_phrase", "")
    facts["layers"] = layer_groups(lora.modules)
    if not lora.alpha_known:
        facts["alpha"] = "not in the file; then it is the rank"
    if untrained := [name for name, weights in lora.modules.items() if not weights.B.any()]:
        facts["never trained"] = listed("layers, where B is 0", untrained).strip()
    return {label: fact for label, fact in facts.items() if fact}


def layer_groups(modules: Mapping[str, LoRAWeights]) -> list[str]:
    """Lines such as `128 of the U-Net: rank 8, alpha 8 (to_k, to_out.0, to_q, to_v)`, the largest group first."""
    groups: dict[str, list[str]] = {}
    for name, change in modules.items():
        component = COMPONENTS[name.partition(".")[0]]
        dora = ", DoRA" if change.magnitude is not None else ""
        last = re.findall(r"[^.]+(?:\.\d+)?$", name)[0]  # "to_q", but "to_out.0"
        groups.setdefault(f"of the {component}: rank {change.rank}, alpha {alpha_of(change):g}{dora}", []).append(last)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"{len(names)} {what} ({', '.join(sorted(set(names)))})" for what, names in largest]


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words for a prompt, from the metadata of minidiff, kohya and others."""
    keys = ("trigger",) if metadata.get("trigger") else ("modelspec.trigger_phrase", "instance_prompt")
    words = [metadata[key] for key in keys if metadata.get(key)]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = sum((Counter(tags) for tags in folders.values()), Counter())
    except (ValueError, TypeError, AttributeError, RecursionError):  # not kohya's table
        counts = Counter()
    if counts:
        words.append("most frequent in the captions: " + ", ".join(f"{tag} ({n})" for tag, n in counts.most_common(8)))
    return list(dict.fromkeys(words))


def word_facts(file: TensorFile) -> Facts:
    words = {key: word_of(key, file.path, file.metadata.get("token"))[1] for key in file.tensors}
    shapes = [(words[key], *(1, *info.shape)[-2:]) for key, info in file.tensors.items()]
    facts: Facts = {"vectors": [f"{name}: {n} of width {width}" for name, n, width in shapes]}
    if zero := [key for key, tensor in file.read().items() if not tensor.any()]:
        facts["never trained"] = listed("words, whose vectors are 0", zero).strip()
    return facts
