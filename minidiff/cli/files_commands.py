"""The commands `minidiff inspect`, `convert` and `merge`, given their flags: files in, a new file and a few lines out.

Everything that is written appears under its name when it is whole and has been read again, or not at all.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from minidiff.cli.flags import Bake, Convert, Extract, Inspect, Join, Resize
from minidiff.core.config import SD15_UNET
from minidiff.core.errors import AdapterError, SettingsError
from minidiff.core.inject import adapter_names, set_adapters
from minidiff.core.lora import LoRAWeights
from minidiff.files import merge as merging
from minidiff.files import names as keymaps
from minidiff.files import word_file as embeddings
from minidiff.files.atomic import called, new_output
from minidiff.files.convert import (
    convert_embedding,
    convert_lora,
    kept_metadata,
    largest_change,
    largest_difference,
    read_pickle,
)
from minidiff.files.inspect import find_file
from minidiff.files.inspect import inspect as reports_on
from minidiff.files.lora_file import LoRAFile, load_lora, read_lora, save_lora
from minidiff.files.model import SINGLE_FILE, cast, empty_model, is_single_file, read_model, write_model
from minidiff.files.weights import PICKLES, TensorFile, check_ending, is_pickle, read_header, save

WORST = 10  # rows of a table of errors
OF_MODELS = ("pretrained_model_name_or_path", "tokenizer")  # flags


def inspect(s: Inspect) -> None:
    model = empty_model(s.pretrained_model_name_or_path) if s.pretrained_model_name_or_path else None
    reports = reports_on(s.file, model)
    if s.json:
        print(json.dumps([report.as_dict() for report in reports], indent=2))
    else:
        print(*reports, sep="\n\n")


# --- convert -------------------------------------------------------------------------------------------------------------


def convert(s: Convert) -> None:
    with new_output(output_of(s)) as place:
        source = Path(s.source)
        if not source.is_dir() and (source.suffix in PICKLES or is_pickle(source)):
            source = place.parent / "opened" / f"{source.stem}.safetensors"
            with called(source, s.source):
                save(read_pickle(Path(s.source)), source)
        with called(source, s.source):
            moved = converted(s, source, place)
    print(moved, f"{s.output}: written, and read again", sep="\n")


def converted(s: Convert, source: Path, place: Path) -> str:
    """Write `source`, a safetensors file or a folder, to `place`, as what it is. Returns how far the numbers moved."""
    if (source / "model_index.json").is_file():
        return converted_model(s, source, place)
    file = read_header(find_file(source))
    if s.to == "safetensors":
        return unpickled(s, file, place)
    if keymaps.lora_dialect(file.tensors):
        return converted_lora(s, source, file, place)
    if embeddings.is_embedding(file.tensors):
        return converted_embedding(s, source, file, place)
    return converted_model(s, source, place)


def converted_lora(s: Convert, source: Path, file: TensorFile, place: Path) -> str:
    check_flags(s, "a LoRA", ("diffusers", "kohya", "peft"), "token", "tokenizer")
    config = empty_model(s.pretrained_model_name_or_path).unet.config if s.pretrained_model_name_or_path else SD15_UNET
    lora = read_lora(source, alpha=s.alpha, config=config)
    print(lora)
    return f"max |ΔW - ΔW'| = {convert_lora(lora, place, s.to, dtype_named(s.dtype) or dtype_of(file), config):.3g}"


def converted_embedding(s: Convert, source: Path, file: TensorFile, place: Path) -> str:
    check_flags(s, "a textual inversion", ("diffusers", "kohya"), "alpha", "dtype", *OF_MODELS)
    embedding = embeddings.read_embedding(source, s.token)
    try:
        embeddings.check_spelling(embedding.word)
    except AdapterError as error:
        raise AdapterError(f"{s.source}: {error} --token gives the file's word another name.") from error
    print(embedding)
    if s.to == "kohya" and place.stem != embedding.word:
        print(f'Note: programs that read this form take the file\'s name for the word: "{place.stem}".')
    return f"max |v - v'| = {convert_embedding(embedding, place, s.to, file.metadata):.3g}"


def converted_model(s: Convert, source: Path, place: Path) -> str:
    check_flags(s, "a model", ("diffusers", "ldm"), "alpha", "token")
    if (place.suffix == SINGLE_FILE) != (s.to == "ldm"):
        form = f"a file that ends in {SINGLE_FILE}" if s.to == "ldm" else "a folder"
        raise SettingsError(f"{s.output}: a model in the form {s.to} is {form}; choose another name, or another --to.")
    model = read_model(source, s.pretrained_model_name_or_path, s.tokenizer)
    before = model.weights()
    if dtype := dtype_named(s.dtype):
        cast(model, dtype)
    write_model(model, place)
    return f"max |W - W'| = {largest_difference(before, read_model(place, model.home).weights()):.3g}"


def unpickled(s: Convert, file: TensorFile, place: Path) -> str:
    """A pickle's tensors, whatever they are."""
    check_flags(s, "a pickle", ("safetensors",), "alpha", "token", "dtype", *OF_MODELS)
    if file.path == Path(s.source) or place.suffix != SINGLE_FILE:
        raise SettingsError(f"--to safetensors makes {SINGLE_FILE} files of pickles; {s.source} and {s.output} are not these.")
    before = {key or "tensor": tensor for key, tensor in file.read().items()}
    save(before, place)
    return f"max |W - W'| = {largest_difference(before, read_header(place).read()):.3g}"


def check_flags(s: Convert, kind: str, forms: Sequence[str], *meaningless: str) -> None:
    """SettingsError for a form that this kind of file has not, and for flags that would be ignored."""
    if s.to not in forms:
        raise SettingsError(f"{s.source} is {kind}, and that has no form --to {s.to}; it has {', '.join(forms)}.")
    if given := [flag for flag in meaningless if getattr(s, flag) is not None]:
        raise SettingsError(f"{s.source} is {kind}, for which --{given[0]} means nothing; leave it out.")


# --- merge ---------------------------------------------------------------------------------------------------------------


def bake(s: Bake) -> None:
    with new_output(output_of(s)) as place:
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
        difference = largest_difference(model.weights(), read_model(place, model.home).weights())
    if not changed:
        print("Note: this is the base model again: the weights are 0, or the adapters change nothing.")
    print(f"max |W - W'| = {difference:.3g}", f"{s.output}: {changed} layers changed; written, and read again", sep="\n")


def join(s: Join) -> None:
    with new_output(output_of(s)) as place:
        loras = [read_lora(path) for path in s.lora]
        for lora, strength in zip(loras, s.strengths):
            print(f"{lora}; weight {strength:g}")
        joined = merging.join([lora.modules for lora in loras], s.strengths)
        if s.rank is not None:
            shorter = merging.cut(joined, s.rank)
            joined = shorter.modules
            print(table(f"Relative error of ΔW at rank {s.rank}", shorter.error))
        save_and_check(s, joined, place, joined_metadata(loras, s.strengths))


def joined_metadata(loras: Sequence[LoRAFile], strengths: Sequence[float]) -> dict[str, str]:
    """The files of the adapters, and every word that calls one of them up."""
    sources = ", ".join(f"{lora.path.name} x {strength:g}" for lora, strength in zip(loras, strengths))
    words, bases = (
        list(dict.fromkeys(lora.metadata[key] for lora in loras if lora.metadata.get(key)))
        for key in ("modelspec.trigger_phrase", "base_model")
    )
    about = {"modelspec.merged_from": sources}
    about |= {"modelspec.trigger_phrase": ", ".join(words)} if words else {}
    return about | ({"base_model": bases[0]} if len(bases) == 1 else {})


def extract(s: Extract) -> None:
    with new_output(output_of(s)) as place:
        base = read_model(s.base, None if is_single_file(s.tuned) else s.tuned)
        tuned = read_model(s.tuned, None if is_single_file(s.base) else s.base)
        found = merging.extract(base.adaptable, tuned.adaptable, s.rank)
        print(table(f"Relative error of ΔW at rank {s.rank}", found.error))
        left = [*found.left_out, *merging.moved_tensors("vae", base.vae, tuned.vae)]
        if left:
            some = ", ".join(left[:3])
            print(f"{len(left)} tensors moved that no adapter can hold (biases, norms, embeddings, the VAE): {some} …")
        save_and_check(s, found.modules, place, {"base_model": s.base})


def resize(s: Resize) -> None:
    with new_output(output_of(s)) as place:
        lora = read_lora(s.adapter)
        print(lora)
        shorter = merging.cut(lora.modules, s.rank)
        print(table(f"Relative error of ΔW at rank {s.rank}", shorter.error))
        save_and_check(s, shorter.modules, place, kept_metadata(lora.metadata))


def save_and_check(
    s: Join | Extract | Resize, modules: Mapping[str, LoRAWeights], place: Path, metadata: Mapping[str, str]
) -> None:
    dtype = dtype_named(s.dtype) or torch.float32
    written = save_lora(modules, place, s.to, dtype, metadata)
    after = read_lora(written.parent if s.to == "peft" else written)
    moved = f"max |ΔW - ΔW'| = {largest_change(modules, after.modules):.3g}"
    print(moved, str(after).replace(str(after.path), s.output), sep="\n")


# --- what they share -----------------------------------------------------------------------------------------------------


def output_of(s: Convert | Bake | Join | Extract | Resize) -> Path:
    check_ending(Path(s.output))
    return Path(s.output)


def table(title: str, values: Mapping[str, float]) -> str:
    """The largest values, and the mean of all."""
    worst = sorted(values.items(), key=lambda item: -item[1])[:WORST]
    heading = f"{title}: {len(values)} layers, {mean(values):.4f} on average; the largest:"
    return "\n".join([heading, *(f"  {value:8.4f}  {name}" for name, value in worst)])


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def dtype_named(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def dtype_of(file: TensorFile) -> torch.dtype:
    """The one dtype of a file's matrices, if it is a half; else fp32."""
    dtypes = {info.dtype for info in file.tensors.values() if len(info.shape) > 1}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16} else torch.float32
