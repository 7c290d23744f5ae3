"""Adapters in a whole model: inject them, mix them, merge them into the weights, eject them.

    inject(unet, rank=4)   ->   train `trainable(unet)`   ->   merge(unet), or not   ->   eject(unet)

The name of a layer is its dotted path ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"); the name of an adapter is
any word ("default", "dog"). A layer can have several adapters: W' = W + Σ strength · ΔW. `model` is a U-Net or a text encoder.
"""

import math
import re
from collections.abc import Mapping, Sequence

from torch import nn

from minidiff.core.errors import AdapterError, did_you_mean
from minidiff.core.lora import LoRAConv2d, LoRALayer, LoRALinear, LoRAWeights, fresh
from minidiff.core.rng import generator

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the layers of every self- and cross-attention
GROUPS = {  # a word for several layers
    "attention": DEFAULT_TARGETS,
    "cross_attention": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "projections": ("proj_in", "proj_out"),  # into and out of each transformer
    "resnets": ("conv1", "conv2", "time_emb_proj", "conv_shortcut"),
    "samplers": ("downsamplers.0.conv", "upsamplers.0.conv"),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj"),  # the text encoder's attention
    "text_mlp": ("fc1", "fc2"),
}


def inject(
    model: nn.Module, rank: int, alpha: float | None = None, targets: str | Sequence[str] = DEFAULT_TARGETS, seed: int = 0,
    adapter_name: str = "default", *, rank_of: Mapping[str, int] = {}, rslora: bool = False, dora: bool = False,
    dropout: float = 0.0,
) -> dict[str, LoRALayer]:  # fmt: skip
    """Freeze `model` and give a new adapter to every layer that a target names. Returns these layers by name.

    A target is a word of GROUPS, or the end of a layer's path in whole words ("to_q", "to_out.0", "attn2.to_k"). The default
    of `alpha` is the rank of each layer. `rank_of`, target -> rank, gives some layers another rank; the last that fits wins.
    `dropout` is the share of the adapters' inputs that is dropped in training. AdapterErrors come before anything is changed.
    """
    if known := adapter_names(model):
        adapted_layers(model)  # an error if they are merged: then a new adapter would have no effect
    if adapter_name in known:
        raise AdapterError(f'an adapter called "{adapter_name}" is there already; choose another name, or eject first.')
    ranks = {name: rank for t in ([targets] if isinstance(targets, str) else targets) for name in layers_of(model, t)}
    if not ranks:
        raise AdapterError("no targets were given.")
    for target, other in rank_of.items():
        if not (chosen := ranks.keys() & layers_of(model, target)):
            raise AdapterError(f'a rank is given for "{target}", and no such layer is among the targets; add it to them.')
        ranks |= dict.fromkeys(chosen, other)
    weights = {name: layer.weight.detach() for name, layer in adaptable_layers(model).items() if name in ranks}
    for name, W in weights.items():
        if not 1 <= ranks[name] <= min(W.flatten(1).shape):
            raise AdapterError(f"rank {ranks[name]} is not possible for {name}: it can be 1 to {min(W.flatten(1).shape)}.")
    model.requires_grad_(False)
    for name, r in ranks.items():
        random = generator(seed, "lora_A", name)
        adapter = fresh(weights[name], r, r if alpha is None else alpha, rslora, dora, random)
        wrap(model, name).add(adapter_name, adapter, dropout)
    return {name: layer for name, layer in lora_layers(model).items() if name in ranks}


def wrap(model: nn.Module, name: str) -> LoRALayer:
    """The layer `name` as a LoRALayer: the present one, or a new one around the plain layer."""
    module = network(model).get_submodule(name)
    if isinstance(module, nn.Linear | nn.Conv2d):
        layer = LoRALinear(module) if isinstance(module, nn.Linear) else LoRAConv2d(module)
        module = layer.train(module.training)  # a new module is in training mode, where dropout is on
        network(model).set_submodule(name, module)
    assert isinstance(module, LoRALayer)
    return module


def eject(model: nn.Module) -> None:
    """Remove every adapter: the same layer objects return, with the same bits (still frozen)."""
    for name, layer in lora_layers(model).items():
        layer.unmerge()
        network(model).set_submodule(name, layer.base)


def set_adapters(model: nn.Module, names: Sequence[str], strengths: Sequence[float] | None = None) -> None:
    """Switch on the adapters `names`, each at its strength (default 1), and all others off."""
    strengths = [1.0] * len(names) if strengths is None else strengths
    layers, known, wanted = adapted_layers(model), adapter_names(model), dict(zip(names, strengths))
    if len(names) != len(strengths) or len(wanted) < len(names) or not all(map(math.isfinite, strengths)):
        raise AdapterError(f"adapters {list(names)}, weights {list(strengths)}: each adapter needs one finite weight.")
    if unknown := next((name for name in names if name not in known), None):
        raise AdapterError(f'no adapter is called "{unknown}"; there is {", ".join(known)}.{did_you_mean(unknown, known)}')
    for layer in layers:
        layer.strength = {name: float(wanted.get(name, 0.0)) for name in layer.strength}


def merge(model: nn.Module) -> None:
    """Add the adapters, at their present strengths, to the weights. The old weights are kept."""
    for layer in adapted_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the old weights return, bit for bit."""
    for layer in adapted_layers(model, merged=True):
        layer.unmerge()


def network(model: nn.Module) -> nn.Module:
    """The module in which paths begin. For CLIP in transformers 4 it is `text_model`, one level down."""
    return getattr(model, "text_model", model)


def adaptable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear layer and convolution, with or without an adapter, by its name in the plain model."""
    modules = network(model).named_modules()
    return {path.removesuffix(".base"): m for path, m in modules if isinstance(m, nn.Linear | nn.Conv2d)}


def layers_of(model: nn.Module, target: str) -> list[str]:
    """The layers that a target names. AdapterError if there are none."""
    layers = list(adaptable_layers(model))
    endings = tuple(f".{ending}" for ending in GROUPS.get(target, (target,)))  # of whole words: not "proj" for "time_emb_proj"
    if not (found := [name for name in layers if f".{name}".endswith(endings)]):
        asked = {"ff": "feed_forward", "attn": "attention", "attn2": "cross_attention"}.get(target, target)
        near = did_you_mean(asked, [*GROUPS, *(re.findall(r"[^.]+(?:\.\d+)?$", name)[0] for name in layers)])
        raise AdapterError(f'target "{target}" matches no linear layer or convolution of {type(model).__name__}.{near}')
    return found


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every layer with adapters, by name."""
    return {name: module for name, module in network(model).named_modules() if isinstance(module, LoRALayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in the model, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.lora_A))


def adapter_weights(model: nn.Module, adapter_name: str = "default") -> dict[str, LoRAWeights]:
    """One adapter, by layer; the tensors are the layers' own, without gradients."""
    layers = lora_layers(model).items()
    return {name: layer.weights(adapter_name) for name, layer in layers if adapter_name in layer.lora_A}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters for an optimizer, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model: nn.Module, merged: bool = False) -> list[LoRALayer]:
    """The layers with adapters. AdapterError if there are none, or if they are merged and should not be, or the reverse."""
    if not (layers := list(lora_layers(model).values())):
        raise AdapterError("the model has no adapter; inject or load one first.")
    if merged != any(layer.unmerged_weight is not None for layer in layers):
        already = "the adapters are merged already; unmerge (unfuse_lora) first."
        raise AdapterError("nothing is merged, so there is nothing to unmerge." if merged else already)
    return layers
