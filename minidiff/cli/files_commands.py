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
from minidiff.draw.images import read_png_text
from minidiff.files import convert as converting
from minidiff.files import inspect as inspecting
from minidiff.files import merge as merging
from minidiff.files.atomic import new_output
from minidiff.files.lora_file import LoRAFile, load_lora, read_lora
from minidiff.files.model import cast, is_single_file, read_again, read_model, write_model


def inspect(s: Inspect) -> None:
    if s.file.lower().endswith(".png"):
        made = read_png_text(s.file).get("parameters", "It does not say: editors and messengers take such texts out.")
        reports = [{"path": s.file, "is": "a picture", "made with": made}]
    else:
        reports = inspecting.inspect(s.file)
    print(json.dumps(reports, indent=2) if s.json else "\n\n".join(map(inspecting.as_text, reports)))


def convert(s: Convert) -> None:
    flags = vars(s) | {"dtype": s.dtype and getattr(torch, s.dtype)}
    given = {name: value for name, value in flags.items() if value is not None and name not in ("source", "output", "to")}
    with new_output(Path(s.output)) as place:
        lines = converting.convert(Path(s.source), place, s.to, given)
    report(lines, place, s.output)


# --- merge ---------------------------------------------------------------------------------------------------------------


def bake(s: Bake) -> None:
    with new_output(Path(s.output)) as place:
        model = read_model(s.pretrained_model_name_or_path, tokenizer=s.tokenizer, prediction_type=s.prediction_type)
        strengths = {f"lora{i}": strength for i, strength in enumerate(s.strengths)}
        for path, (name, strength) in zip(s.lora, strengths.items()):
            lora = load_lora(model.adaptable, path, name)
            print(f"{lora}; weight {strength:g}")
        for network in model.adaptable.values():
            if names := adapter_names(network):
                set_adapters(network, names, [strengths[name] for name in names])
        changed = merging.bake(model.adaptable.values())
        if s.dtype:
            cast(model, getattr(torch, s.dtype))
        write_model(model, place)
        moved = converting.moved(model.weights(), read_again(model, place).weights())
    report([moved, f"{changed} layers changed"], place, s.output)


def join(s: Join) -> None:
    with new_output(Path(s.output)) as place:
        loras = [read_lora(path) for path in s.lora]
        for lora, strength in zip(loras, s.strengths):
            print(f"{lora}; weight {strength:g}")
        joined = merging.join([lora.modules for lora in loras], s.strengths)
        if s.rank is not None:
            joined, error = merging.cut(joined, s.rank)
            print(loss(s.rank, error))
        lines = saved(s, joined, place, joined_metadata(loras, s.strengths))
    report(lines, place, s.output)


def joined_metadata(loras: Sequence[LoRAFile], strengths: Sequence[float]) -> dict[str, str]:
    """The files of the adapters, and every word that calls one of them up. A single adapter keeps all of its metadata."""
    about = dict(loras[0].metadata) if len(loras) == 1 else {}
    about["modelspec.merged_from"] = ", ".join(f"{lora.path.name} x {s:g}" for lora, s in zip(loras, strengths))
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
        print(loss(s.rank, error))
        if left := merging.left_out(base.networks, tuned.networks, modules):
            some = ", ".join(left[:3])
            print(f"{len(left)} tensors moved that no adapter can hold (biases, norms, embeddings, the VAE): {some} …")
        lines = saved(s, modules, place, {"base_model": s.base})
    report(lines, place, s.output)


def resize(s: Resize) -> None:
    join(Join(lora=(s.adapter,), rank=s.rank, to=s.to, dtype=s.dtype, output=s.output))


# --- what they share -----------------------------------------------------------------------------------------------------


def saved(s: Join | Extract, modules: Mapping[str, LoRAWeights], place: Path, metadata: Mapping[str, str]) -> list[str]:
    return converting.rewritten(modules, place, s.to, getattr(torch, s.dtype or "float32"), metadata)


def report(lines: Sequence[str], place: Path, output: str) -> None:
    print(*(line.replace(str(place), output) for line in lines), f"{output}: written, and read again", sep="\n")


def loss(rank: int, errors: Mapping[str, float]) -> str:
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return f"Relative error of ΔW at rank {rank}: {mean:.4f} on average of {len(errors)} layers, {errors[worst]:.4f} in {worst}"
