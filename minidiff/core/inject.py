"""Adapters in a whole model: put them in, mix them, fold them into the weights, take them out.

    inject(unet, rank=4)   ->   train `trainable(unet)`   ->   merge(unet) or keep the detours   ->   eject(unet)

A module is called by its dotted path ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"), an adapter by any
word ("default", "dog"). A layer can carry several adapters: W' = W + Σ strength · ΔW. (Adding up their A and their B
instead would give (B1 + B2)(A1 + A2), with two products in it that nobody trained.)

The same functions serve the text encoder. transformers 4 has CLIP's tower one level down, in `text_model`; transformers 5
has not. Names here never have this prefix.

Shapes: as in lora.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from minidiff.core.errors import AdapterError, did_you_mean, listed
from minidiff.core.lora import LoRAConv2d, LoRALayer, LoRALinear, LoRAWeights, tuned_lengths
from minidiff.core.rng import generator
from minidiff.core.targets import DEFAULT_TARGETS, TEXT, adaptable_layers, chosen, find_targets

# --- in, and out -----------------------------------------------------------------------------------------------------


def inject(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
    adapter_name: str = "default",
    *,
    rank_of: Mapping[str, int] = {},
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
) -> dict[str, LoRALayer]:
    """Freeze `model` and put a fresh adapter on every layer that a target names; gives them by module name.

    A target is a name of `targets.GROUPS`, or the end of a module's path in whole words ("to_q", "to_out.0", "attn2.to_k").
    `rank_of` gives some of the layers another rank: target -> rank, the last that fits wins. alpha defaults to the rank,
    of each layer, so that alpha / r = 1; an alpha that is given holds for all. `dropout` is the share of the detours'
    inputs that are dropped in training. Raises AdapterError before anything is changed.
    """
    names = find_targets(model, (targets,) if isinstance(targets, str) else targets)
    ranks = dict.fromkeys(names, rank)
    for target, other in rank_of.items():
        ranks |= dict.fromkeys(chosen(model, target, names), other)
    check_adapter_name(model, adapter_name)
    check_sizes(model, ranks, alpha, dropout)
    model.requires_grad_(False)
    for name, r in ranks.items():
        layer = wrap(model, name)
        layer.add(adapter_name, fresh(layer, r, r if alpha is None else alpha, rslora, dora, seed, name), dropout)
    return {name: layer for name, layer in lora_layers(model).items() if name in ranks}


def fresh(layer: LoRALayer, rank: int, alpha: float, rslora: bool, dora: bool, seed: int, name: str) -> LoRAWeights:
    """An adapter that changes nothing yet: B = 0 and m = ||W||.

    The LoRA paper (section 4.1) draws A from a Gaussian. Here, as in the authors' own code and in peft, A is uniform in
    ±1/√(numbers that go in), which is kaiming_uniform with a = √5; from `seed` and the name.
    """
    W = layer.base.weight.detach()
    B = torch.zeros(len(W), rank, device=W.device)
    A = torch.empty(rank, *W.shape[1:], device="meta" if W.is_meta else "cpu")
    if not W.is_meta:  # a model without numbers, to count parameters with, gets none
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator(seed, "lora_A", name))
    scale = alpha / (math.sqrt(rank) if rslora else rank)  # rsLoRA (arXiv 2312.03732), theorem 3.2
    weights = LoRAWeights(A.to(W.device), B, scale)
    if not dora:
        return weights
    one_for_each_output = torch.Size([len(W)] + [1] * (W.ndim - 1))
    m = tuned_lengths(W, weights, one_for_each_output)  # as in `LoRALayer.gain`, so that m / ||V|| is exactly 1
    return LoRAWeights(weights.A, B, scale, m)


def attach(model: nn.Module, weights: Mapping[str, LoRAWeights], adapter_name: str = "default") -> None:
    """Put a trained adapter on, at strength 1: module name -> its change.

    Raises AdapterError, before anything is changed, for a name or a shape that the model does not have.
    """
    check_adapter_name(model, adapter_name)
    layers = adaptable_layers(model)
    if strangers := weights.keys() - layers.keys():
        matched = f"{len(weights) - len(strangers)} of {len(weights)} modules"
        raise AdapterError(f"{matched} match {type(model).__name__}.\n{listed('without a layer', strangers)}")
    for name, change in weights.items():
        check_shapes(name, change, layers[name].weight.shape)
    for name, change in weights.items():
        wrap(model, name).add(adapter_name, change)


def adapter_weights(model: nn.Module, adapter_name: str = "default") -> dict[str, LoRAWeights]:
    """One adapter: module name -> its change. What `attach` takes; the tensors are the layers' own, without gradients."""
    layers = lora_layers(model).items()
    return {name: layer.weights(adapter_name) for name, layer in layers if adapter_name in layer.lora_A}


def eject(model: nn.Module) -> None:
    """Take every adapter out: the very same layers return, with the very same bits (still frozen)."""
    for name, layer in lora_layers(model).items():
        layer.unmerge()
        set_module(model, name, layer.base)


# --- mixing and merging ----------------------------------------------------------------------------------------------


def set_adapters(model: nn.Module, names: Sequence[str], strengths: Sequence[float] | None = None) -> None:
    """Switch on the adapters `names`, each at its strength (1 if none are given), and every other one off."""
    strengths = [1.0] * len(names) if strengths is None else strengths
    if len(names) != len(strengths):
        each = f"{len(names)} adapters {list(names)} but {len(strengths)} weights {list(strengths)}"
        raise AdapterError(f"{each}; give one weight for each.")
    layers = adapted_layers(model, "set_adapters")
    known, wanted = adapter_names(model), dict(zip(names, strengths))
    for name, strength in wanted.items():
        if name not in known:
            raise AdapterError(f'no adapter is called "{name}"; there is {", ".join(known)}.{did_you_mean(name, known)}')
        if not math.isfinite(strength):
            raise AdapterError(f'the weight of adapter "{name}" is {strength}; it must be a finite number.')
    if len(wanted) < len(names):
        raise AdapterError(f"an adapter is named twice in {list(names)}; give each of them once, with one weight.")
    for layer in layers.values():
        layer.strength = {name: float(wanted.get(name, 0.0)) for name in layer.strength}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model answers as its base does, to the bit."""
    layers = adapted_layers(model, "adapters_off").values()
    before = [layer.strength for layer in layers]
    for layer in layers:
        layer.strength = dict.fromkeys(layer.strength, 0.0)
    try:
        yield
    finally:
        for layer, strength in zip(layers, before):
            layer.strength = strength


def merge(model: nn.Module) -> None:
    """Fold the adapters, at their strengths of now, into the weights: no detour to compute any more.

    W' is rounded to W's dtype, so the outputs change a little: for one layer and a LoRA by at most
    (n + r + 4) · eps · (|W| |x| + strength · scale · |B| |A| |x| + |bias|), where n numbers go into an output and eps is that
    of the dtype (Higham 2002, section 3.1). For the same reason a small ΔW can be lost in half precision.

    Keeps the old weights, so that `unmerge` is exact to the bit. That costs a second copy of the layers concerned: on
    SD 1.5 with the default targets 178 MiB in fp16, 357 MiB in fp32.
    """
    for layer in adapted_layers(model, "merge").values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the old weights return, bit for bit, and the detours are computed again."""
    layers = lora_layers(model).values()
    if not any(layer.unmerged_weight is not None for layer in layers):
        raise AdapterError("nothing is merged, so there is nothing to unmerge.")
    for layer in layers:
        layer.unmerge()


# --- what is there ---------------------------------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every adapted layer of the model, by module name."""
    return {name.removeprefix(TEXT): module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in the model, in the order in which they came."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.lora_A))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer should get, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def print_trainable_parameters(model: nn.Module) -> None:
    """One line, in peft's form: trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927"""
    some = sum(parameter.numel() for parameter in trainable(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    print(f"trainable params: {some:,} || all params: {every:,} || trainable%: {100 * some / every:.4f}")


# --- replacing layers ------------------------------------------------------------------------------------------------


def real_path(model: nn.Module, name: str) -> str:
    """Where `name` is in this model: below `text_model` for transformers 4."""
    return TEXT + name if TEXT.rstrip(".") in dict(model.named_children()) else name


def wrap(model: nn.Module, name: str) -> LoRALayer:
    """The layer called `name` as a LoRALayer: the one that is there already, or a new one around the plain layer."""
    module = model.get_submodule(real_path(model, name))
    if isinstance(module, nn.Linear | nn.Conv2d):
        layer = LoRALinear(module) if isinstance(module, nn.Linear) else LoRAConv2d(module)
        module = layer.train(module.training)  # new modules are in training mode: dropout would be on in a model at rest
        set_module(model, name, module)
    assert isinstance(module, LoRALayer)
    return module


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = real_path(model, name).rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_plain(model: nn.Module) -> None:
    """AdapterError while adapters are in the model: its state dict would have names that no other program knows."""
    if names := adapter_names(model):
        raise AdapterError(f"{type(model).__name__} carries adapters ({', '.join(names)}); unload_lora_weights first.")


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    taken = hasattr(nn.ParameterDict(), adapter_name)  # the layers keep A and B in one, and "keys" is a method of it
    if not adapter_name or "." in adapter_name or taken:
        raise AdapterError(f'"{adapter_name}" cannot name an adapter; take a plain word such as "dog".')
    if adapter_name in adapter_names(model):
        raise AdapterError(f'an adapter called "{adapter_name}" is there already; choose another name, or eject first.')
    if any(layer.unmerged_weight is not None for layer in lora_layers(model).values()):
        raise AdapterError("adapters are merged into the weights; unmerge (unfuse_lora) before adding another.")


def check_sizes(model: nn.Module, ranks: Mapping[str, int], alpha: float | None, dropout: float) -> None:
    if alpha is not None and not 0 < alpha < math.inf:
        raise AdapterError(f"alpha is {alpha}; it must be a positive number.")
    if not 0 <= dropout < 1:
        raise AdapterError(f"dropout is {dropout}; it must be at least 0 and less than 1.")
    layers = adaptable_layers(model)
    for name, rank in ranks.items():
        outputs, inputs = layers[name].weight.flatten(1).shape
        if rank < 1:
            raise AdapterError(f"rank is {rank}; it must be at least 1.")
        if rank > min(outputs, inputs):
            most = f"its weight is {outputs} x {inputs}, so give at most {min(outputs, inputs)}"
            raise AdapterError(f"rank {rank} is more than {name} has: {most}.")


def check_shapes(name: str, weights: LoRAWeights, shape: Sequence[int]) -> None:
    """AdapterError unless an adapter's tensors fit each other, and a W of this shape."""
    A, B = tuple(weights.A.shape), tuple(weights.B.shape)
    if len(B) != 2 or A[0] != B[1]:
        raise AdapterError(f"{name}: the ranks of A and B differ: A is {A}, B is {B}.")
    if (B[0], *A[1:]) != tuple(shape):
        raise AdapterError(f"{name}: the adapter is for a weight of {(B[0], *A[1:])}; the model has {tuple(shape)}.")
    ones = (1,) * (len(shape) - 2)
    for_outputs, for_inputs = (shape[0], 1, *ones), (1, shape[1], *ones)
    if weights.magnitude is not None and (m := tuple(weights.magnitude.shape)) not in (for_outputs, for_inputs):
        raise AdapterError(f"{name}: DoRA's magnitude is {m}; this layer takes {for_outputs} or {for_inputs}.")


def adapted_layers(model: nn.Module, what: str) -> dict[str, LoRALayer]:
    """The adapted layers, or an AdapterError where there are none or they are merged already."""
    layers = lora_layers(model)
    if not layers:
        raise AdapterError(f"{what}: the model has no adapter; inject or load one first.")
    if any(layer.unmerged_weight is not None for layer in layers.values()):
        raise AdapterError(f"{what}: the adapters are merged already; unmerge (unfuse_lora) first.")
    return layers
