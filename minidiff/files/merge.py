"""The algebra of adapters: join them, reduce their rank, extract one from two models, bake them into a model.

An adapter changes a layer by ΔW = scale · B A. Two adapters together are the sum of their changes, not (B1 + B2)(A1 + A2):
that product has the terms B1 A2 and B2 A1, which nobody trained. A sum as one adapter, and as one of lower rank:

    concatenation   [B1 B2] [A1; A2] = B1 A1 + B2 A2              exact; the ranks add up
    truncated SVD   ΔW = U S Vᵀ, keep the largest r values of S   the best of rank r (Eckart and Young 1936); error known

Shapes: A (r, in[, kh, kw]), B (out, r), W (out, in[, kh, kw]); convolutions are taken as (out, in · kh · kw).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidiff.core.errors import AdapterError
from minidiff.core.inject import adaptable_layers, eject, lora_layers
from minidiff.core.lora import LoRAWeights
from minidiff.files.lora_file import flat
from minidiff.files.weights import is_finite, named

Modules = Mapping[str, LoRAWeights]
LEAST = 1e-6  # a relative change below this is rounding


class Cut(NamedTuple):
    """An adapter of lower rank, and its error ||ΔW - ΔW'|| / ||ΔW|| in each layer, in the Frobenius norm."""

    modules: dict[str, LoRAWeights]
    error: dict[str, float]


def join(adapters: Sequence[Modules], strengths: Sequence[float]) -> dict[str, LoRAWeights]:
    """Σ strength · ΔW as one adapter, exactly, by concatenation. A layer need not be in each of them."""
    found: dict[str, list[tuple[LoRAWeights, float]]] = {}
    for modules, strength in zip(adapters, strengths, strict=True):
        for name, weights in modules.items():
            if weights.magnitude is not None:  # its change depends on W
                way = "Bake it into the model: minidiff merge bake. From that, merge extract gets a plain LoRA."
                raise AdapterError(f"{name} is DoRA, whose change is no product B A; it cannot be joined or cut. {way}")
            found.setdefault(name, []).append((weights, strength))
    return {name: concatenated(name, parts) for name, parts in found.items()}


def concatenated(name: str, parts: Sequence[tuple[LoRAWeights, float]]) -> LoRAWeights:
    shapes = {(len(weights.B), *flat(tuple(weights.A.shape))[1:]) for weights, _ in parts}
    if len(shapes) > 1:
        raise AdapterError(f"{name} is of the shapes {sorted(shapes)} in these adapters; they are for different models.")
    kernel = max((weights.A.shape[1:] for weights, _ in parts), key=len)  # a 1 x 1 convolution may be stored as a matrix
    A = torch.cat([weights.A.float().reshape(-1, *kernel) for weights, _ in parts])
    B = torch.cat([strength * weights.scale * weights.B.float() for weights, strength in parts], dim=1)
    return LoRAWeights(A, B, 1.0)


# --- rank --------------------------------------------------------------------------------------------------------------


def cut(modules: Modules, rank: int) -> Cut:
    """The best adapter of at most this rank: the truncated SVD of every ΔW. `modules` are as `join` gives them."""
    shorter = Cut({}, {})
    for name, old in modules.items():
        U, S, Vt = svd(old)
        shorter.modules[name], shorter.error[name] = split_evenly(U, S, Vt, rank, old.A.shape), lost(S, rank)
    return shorter


def svd(weights: LoRAWeights) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r), Vᵀ (r, in · kh · kw) of scale · B A, in fp64.

    B A is never multiplied out: with the QR decompositions B = Qb Rb and Aᵀ = Qa Ra, the SVD of the small Rb Raᵀ gives that
    of B A, for B A = Qb (Rb Raᵀ) Qaᵀ, and Qb, Qa have orthonormal columns.
    """
    Qb, Rb = torch.linalg.qr(weights.scale * weights.B.double())
    Qa, Ra = torch.linalg.qr(weights.A.double().flatten(1).mT)
    U, S, Vt = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vt @ Qa.mT


def split_evenly(U: Tensor, S: Tensor, Vt: Tensor, rank: int, shape: Sequence[int]) -> LoRAWeights:
    """U S Vᵀ, cut to `rank`, as B A with √S in each half, so that neither is large; A gets the kernel of `shape` back."""
    root = S[:rank].sqrt()
    A = (root[:, None] * Vt[:rank]).float().unflatten(1, tuple(shape[1:]))
    return LoRAWeights(A.contiguous(), (U[:, :rank] * root).float().contiguous(), 1.0)


def lost(S: Tensor, rank: int) -> float:
    """√(Σ dropped σ² / Σ σ²): the relative error of the best approximation of that rank (Eckart and Young 1936)."""
    total = S.square().sum().item()
    return math.sqrt(S[rank:].square().sum().item() / total) if total else 0.0


# --- models ------------------------------------------------------------------------------------------------------------


def extract(base: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module], rank: int) -> Cut:
    """The adapter of at most this rank that changes one model into the other: the truncated SVD of every W' - W.

    The models are {"unet": …, "text_encoder": …}. Layers that have not changed are left out.
    """
    from tqdm import tqdm

    found = Cut({}, {})
    for part, model in base.items():
        after = {name: layer.weight for name, layer in adaptable_layers(tuned[part]).items()}
        for name, layer in tqdm(adaptable_layers(model).items(), part, unit="layer", leave=False, disable=None):
            W, path, new = layer.weight, f"{part}.{name}", after.get(name)
            if new is None or new.shape != W.shape:
                shapes = f"{tuple(W.shape)} in the base and {new if new is None else tuple(new.shape)} in the tuned model"
                raise AdapterError(f"the two models are of different shapes: {path}.weight is {shapes}.")
            if (change := moved(W, new)) is not None:
                U, S, Vt = torch.linalg.svd(change.flatten(1), full_matrices=False)
                found.modules[path], found.error[path] = split_evenly(U, S, Vt, rank, W.shape), lost(S, rank)
    if not found.modules:
        raise AdapterError("the two models have the same matrices; there is no adapter between them.")
    return found


def left_out(base: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module], modules: Modules) -> list[str]:
    """The tensors that differ between two models and are in no layer of the adapter `modules`."""
    left = []
    for part, network in base.items():
        after = named(tuned[part])
        for key, W in named(network).items():
            changed = key in after and moved(W, after[key]) is not None
            if changed and f"{part}.{key.removesuffix('.weight')}" not in modules:
                left.append(f"{part}.{key}")
    return left


@torch.no_grad()
def moved(before: Tensor, after: Tensor) -> Tensor | None:
    """W' - W in fp64, or None if it is zero but for rounding."""
    change = after.double() - before.double()
    return change if change.norm() > LEAST * before.double().norm() else None


def bake(models: Iterable[nn.Module]) -> int:
    """Add the adapters, at their present strengths, to the weights for good: in fp32, rounded once to W's dtype.

    Returns the number of layers that changed. AdapterError if a weight would be infinite; the models are unusable then.
    """
    changed = 0
    for model in models:
        for name, layer in lora_layers(model).items():
            layer.unmerge()  # else `eject` would bring the old weights back
            W = layer.base.weight.data
            tuned = (W.float() + layer.delta()).to(W.dtype)
            if not is_finite(tuned):
                raise AdapterError(f"{name}: with the adapters its weights are too large for {W.dtype}; lower --lora_weight.")
            changed += not torch.equal(tuned, W)
            layer.base.weight.data = tuned
        eject(model)
    return changed
