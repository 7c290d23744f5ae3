"""The commands `minidiff inspect`, `convert` and `merge`, given their flags: files in, a new file and a few lines out.

Everything that is written appears under its name when it is whole and has been read again, or not at all.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from minidiff.cli.flags import Bake, Convert, Extract, Inspect, Join, Resize
from minidiff.core.inject import adapter_names, set_adapters
from minidiff.core.lora import LoRAWeights
from minidiff.files import convert as converting
from minidiff.files import inspect as inspecting
from minidiff.files import merge as merging
from minidiff.files.atomic import new_output
from minidiff.files.lora_file import LoRAFile, load_lora, read_lora
from minidiff.files.model import cast, empty_model, is_single_file, read_model, write_model


def inspect(s: Inspect) -> None:
    model = empty_model(s.pretrained_model_name_or_path) if s.pretrained_model_name_or_path else None
    reports = inspecting.inspect(s.file, model)
    print(json.dumps(reports, indent=2) if s.json else "\n\n".join(map(inspecting.as_text, reports)))


def convert(s: Convert) -> None:
    options = converting.Options(dtype_named(s.dtype), s.alpha, s.token, s.pretrained_model_name_or_path, s.tokenizer)
    with new_output(Path(s.output)) as place:
        lines = converting.convert(Path(s.source), place, s.to, options)
    report(lines, place, s.output)


# --- merge ---------------------------------------------------------------------------------------------------------------


def bake(s: Bake) -> None:
    with new_output(Path(s.output)) as place:
        model = read_model(s.pretrained_model_name_or_path, tokenizer=s.tokenizer)
        strengths = {f"lora{i}": strength for i, strength in enumerate(s.strengths)}
        for path, (name, strength) in zip(s.lora, strengths.items()):
            lora = load_lora(model.adaptable, path, name)
            print(f"{lora}; weight {strength:g}")
            if strength != 1 and any(weights.magnitude is not None for weights in lora.modules.values()):
                print(f"  DoRA at weight {strength:g}: W' lies on the straight line from the base (0) to what was trained (1).")
        for network in model.adaptable.values():
            if names := adapter_names(network):
                set_adapters(network, names, [strengths[name] for name in names])
        changed = merging.bake(model.adaptable.values())
        if dtype := dtype_named(s.dtype):
            cast(model, dtype)
        write_model(model, place)
        moved = converting.moved(model.weights(), read_model(place, model.home).weights())
    note = "" if changed else ". This is the base model again: the weights are 0, or the adapters change nothing"
    report([moved, f"{changed} layers changed{note}"], place, s.output)


def join(s: Join) -> None:
    with new_output(Path(s.output)) as place:
        loras = [read_lora(path) for path in s.lora]
        for lora, strength in zip(loras, s.strengths):
            print(f"{lora}; weight {strength:g}")
        joined = merging.join([lora.modules for lora in loras], s.strengths)
        if s.rank is not None:
            joined, error = merging.cut(joined, s.rank)
            print(table(s.rank, error))
        lines = saved(s, joined, place, joined_metadata(loras, s.strengths))
    report(lines, place, s.output)


def joined_metadata(loras: Sequence[LoRAFile], strengths: Sequence[float]) -> dict[str, str]:
    """The files of the adapters, and every word that calls one of them up."""
    about = {"modelspec.merged_from": ", ".join(f"{lora.path.name} x {s:g}" for lora, s in zip(loras, strengths))}
    for key in ("modelspec.trigger_phrase", "base_model"):
        texts = list(dict.fromkeys(lora.metadata[key] for lora in loras if lora.metadata.get(key)))
        if len(texts) == 1 or (texts and key != "base_model"):
            about[key] = ", ".join(texts)
    return about


def extract(s: Extract) -> None:
    with new_output(Path(s.output)) as place:
        base = read_model(s.base, None if is_single_file(s.tuned) else s.tuned)
        tuned = read_model(s.tuned, None if is_single_file(s.base) else s.base)
        modules, error = merging.extract(base.adaptable, tuned.adaptable, s.rank)
        print(table(s.rank, error))
        if left := merging.left_out(base.networks, tuned.networks, modules):
            some = ", ".join(left[:3])
            print(f"{len(left)} tensors moved that no adapter can hold (biases, norms, embeddings, the VAE): {some} …")
        lines = saved(s, modules, place, {"base_model": s.base})
    report(lines, place, s.output)


def resize(s: Resize) -> None:
    with new_output(Path(s.output)) as place:
        lora = read_lora(s.adapter)
        print(lora)
        modules, error = merging.cut(lora.modules, s.rank)
        print(table(s.rank, error))
        lines = saved(s, modules, place, converting.kept_metadata(lora.metadata))
    report(lines, place, s.output)


# --- what they share -----------------------------------------------------------------------------------------------------


def saved(
    s: Join | Extract | Resize, modules: Mapping[str, LoRAWeights], place: Path, metadata: Mapping[str, str]
) -> list[str]:
    return converting.rewritten(modules, place, s.to, dtype_named(s.dtype) or torch.float32, metadata)


def report(lines: Sequence[str], place: Path, output: str) -> None:
    print(*(line.replace(str(place), output) for line in lines), f"{output}: written, and read again", sep="\n")


def table(rank: int, errors: Mapping[str, float]) -> str:
    """The mean error of a cut, and the ten largest."""
    worst = sorted(errors.items(), key=lambda item: -item[1])[:10]
    mean = sum(errors.values()) / len(errors)
    heading = f"Relative error of ΔW at rank {rank}: {len(errors)} layers, {mean:.4f} on average; the largest:"
    return "\n".join([heading, *(f"  {value:8.4f}  {name}" for name, value in worst)])


def dtype_named(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
