"""LoRAs that a prompt names, <lora:NAME:weight>; the strengths of adapters, and their size."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from minidiff.core.errors import SettingsError, did_you_mean
from minidiff.core.inject import adapter_names, lora_layers, trainable
from minidiff.draw.prompting import Prompt
from minidiff.files.values import same_name


def loras_of(prompts: Sequence[Prompt], negatives: Sequence[Prompt] = ()) -> dict[str, float]:
    """The adapters that <lora:NAME:weight> names, and their weights; as in A1111, weights of the same name are added.

    A batch runs through one U-Net, so all of its prompts must name the same adapters.
    """
    if any(negative.loras for negative in negatives):
        raise SettingsError("the negative prompt names a LoRA, which would act on both halves; name it in the prompt.")
    if len({prompt.loras for prompt in prompts}) > 1:
        raise SettingsError("the prompts of one call name different LoRAs; draw them one by one.")
    weights: dict[str, float] = {}
    for name, weight in prompts[0].loras:
        weights[adapter_name_of(name)] = weights.get(adapter_name_of(name), 0.0) + weight
    return weights


def adapter_name_of(name: str) -> str:
    """A file's name as an adapter's name: _ for each dot, which module names cannot contain; and _ after names torch uses."""
    plain = name.replace(".", "_")
    return f"{plain}_" if hasattr(nn.ParameterDict(), plain) else plain


def in_lora_dir(folder: str, name: str) -> Path:
    """The file or folder of that name; SettingsError, with a list of those in the folder, if there is none."""
    for path in map(same_name, (Path(folder, name), Path(folder, f"{name}.safetensors"))):
        if Path(name).name == name and name not in ("", "..") and path.exists():  # a name is not a path
            return path
    there = ", ".join(sorted(path.name.removesuffix(".safetensors") for path in Path(folder).glob("*"))[:10])
    raise SettingsError(f'<lora:{name}>: no such file or folder in --lora_dir "{folder}"; there is {there or "nothing"}.')


@contextmanager
def at_strengths(model: nn.Module, strengths: Mapping[str, float]) -> Iterator[None]:
    """Inside the `with`, these adapters have these strengths; the other adapters keep theirs."""
    known, layers = adapter_names(model), lora_layers(model).values()
    for name in strengths:
        if name not in known:
            there = f"there is {', '.join(known)}" if known else "none is loaded"
            raise SettingsError(f"<lora:{name}>: no adapter is called so; {there}.{did_you_mean(name, known)}")
    if any(layer.unmerged_weight is not None for layer in layers):
        raise SettingsError("the adapters are fused into the weights, so <lora:…> cannot change them; unfuse_lora first.")
    before = [layer.strength for layer in layers]
    for layer in layers:
        layer.strength = {name: strengths.get(name, own) for name, own in layer.strength.items()}
    try:
        yield
    finally:
        for layer, strength in zip(layers, before):
            layer.strength = strength


def print_trainable_parameters(model: nn.Module) -> None:
    """One line, in peft's form: trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927"""
    some = sum(parameter.numel() for parameter in trainable(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    print(f"trainable params: {some:,} || all params: {every:,} || trainable%: {100 * some / every:.4f}")
