"""The algebra of adapters: join them, cut their rank, get one out of two checkpoints.

An adapter's change of a layer is ΔW = scale · B A. Two of them together are the sum of their changes, never (B1 + B2)(A1 + A2):
that has terms B1 A2 and B2 A1, which nobody trained. Two exact ways to write a sum, or a shorter form, as one adapter:

    concatenation   [B1 B2] [A1; A2] = B1 A1 + B2 A2              exact; the ranks add up
    truncated SVD   ΔW = U S Vᵀ, keep the largest r values of S   the best of rank r (Eckart and Young 1936); error known

Shapes: A (r, in[, kh, kw]), B (out, r), W (out, in[, kh, kw]); convolutions are taken as (out, in · kh · kw).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.adapters.lora import LoRAWeights
from minidiff.errors import AdapterError

Modules = Mapping[str, LoRAWeights]


@dataclass(frozen=True)
class Cut:
    """An adapter of lower rank, and what was lost: ||ΔW - ΔW'|| / ||ΔW|| of each module, in the Frobenius norm."""

    modules: dict[str, LoRAWeights]
    error: dict[str, float]


def join(adapters: Sequence[Modules], strengths: Sequence[float]) -> dict[str, LoRAWeights]:
    """Σ strength · ΔW as one adapter, exactly, by concatenation. A module need not be in each of them."""
    if len(adapters) != len(strengths):
        raise AdapterError(f"{len(adapters)} adapters but {len(strengths)} weights; give one weight for each.")
    check_linear(adapters)
    joined = {}
    for name in dict.fromkeys(name for modules in adapters for name in modules):
        parts = [(modules[name], strength) for modules, strength in zip(adapters, strengths) if name in modules]
        if len({part.A.shape[1:] for part, _ in parts}) > 1 or len({len(part.B) for part, _ in parts}) > 1:
            raise AdapterError(f"{name} has another shape in each adapter; they are for different models.")
        A = torch.cat([part.A.float() for part, _ in parts])
        B = torch.cat([strength * part.scale * part.B.float() for part, strength in parts], dim=1)
        joined[name] = LoRAWeights(A, B, 1.0)
    return joined


def cut(modules: Modules, rank: int) -> Cut:
    """The best adapter of at most this rank: the truncated SVD of every ΔW.

    B A is never multiplied out: with the QR decompositions B = Qb Rb and Aᵀ = Qa Ra, the SVD of the small Rb Raᵀ gives that
    of B A, for B A = Qb (Rb Raᵀ) Qaᵀ, and Qb, Qa have orthonormal columns.
    """
    if rank < 1:
        raise AdapterError(f"--rank is {rank}; it must be at least 1.")
    check_linear([modules])
    shorter, error = {}, {}
    for name, old in modules.items():
        Qb, Rb = torch.linalg.qr(old.scale * old.B.double())
        Qa, Ra = torch.linalg.qr(old.A.double().flatten(1).mT)
        U, S, Vt = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
        shorter[name] = split_evenly(Qb @ U, S, Vt @ Qa.mT, rank, old.A.shape)
        error[name] = lost(S, rank)
    return Cut(shorter, error)


def extract(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int, least: float = 1e-6) -> Cut:
    """The adapter of at most this rank that leads from one model to the other: the truncated SVD of every W' - W.

    Both are state dicts of the same network. Layers that moved less than `least` of their size are left out. Vectors, such as
    biases, cannot be adapted: where they moved, the error says so with a 1.
    """
    if base.keys() != tuned.keys() or any(base[key].shape != tuned[key].shape for key in base):
        raise AdapterError("the two models differ in their layers; an adapter leads between two weights of one network.")
    found, error = {}, {}
    for key, W in base.items():
        change = tuned[key].double() - W.double()
        if change.norm() <= least * W.double().norm():
            continue
        if not key.endswith(".weight") or W.ndim < 2:
            error[key] = 1.0
            continue
        U, S, Vt = torch.linalg.svd(change.flatten(1), full_matrices=False)
        found[key.removesuffix(".weight")] = split_evenly(U, S, Vt, rank, W.shape)
        error[key.removesuffix(".weight")] = lost(S, rank)
    if not found:
        raise AdapterError("the two models have the same weights; there is no adapter between them.")
    return Cut(found, error)


def split_evenly(U: Tensor, S: Tensor, Vt: Tensor, rank: int, shape: Sequence[int]) -> LoRAWeights:
    """U S Vᵀ, cut to `rank`, as B A with √S in each half, so that neither is large; A gets the kernel of `shape` back."""
    root = S[:rank].sqrt()
    A = (root[:, None] * Vt[:rank]).float().unflatten(1, tuple(shape[1:]))
    return LoRAWeights(A.contiguous(), (U[:, :rank] * root).float().contiguous(), 1.0)


def lost(S: Tensor, rank: int) -> float:
    """√(Σ dropped σ² / Σ σ²): the relative error of the best approximation of that rank (Eckart and Young 1936)."""
    return ((S[rank:].square().sum() / S.square().sum().clamp(min=1e-300)).sqrt()).item()


def check_linear(adapters: Sequence[Modules]) -> None:
    """DoRA's change depends on W and is no product of two thin matrices."""
    for modules in adapters:
        if dora := next((name for name, weights in modules.items() if weights.magnitude is not None), None):
            raise AdapterError(
                f"{dora} is DoRA, whose change is no product B A; it cannot be joined or cut. Bake it: minidiff merge bake."
            )
