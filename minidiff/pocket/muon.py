"""Muon: momentum whose steps are made orthogonal, for the hidden matrices of a network trained from scratch.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), and "Muon is Scalable for LLM
Training" (arXiv 2502.16982), whose scaling lets AdamW's learning rates serve. The gradient of a matrix is mostly a few
strong directions; an orthogonal step moves along the weak ones as far. Pretraining the pocket checkpoint uses it. Vectors,
tables and the first and last layers get AdamW in the same optimizer.

Shapes: a weight (out, in, …) is taken as the matrix (out, in · …).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Muon for `hidden`, AdamW for `others`; each group has its own learning rate."""

    def __init__(self, hidden: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float, adam_lr: float) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(hidden), "lr": lr, "muon": True},
            {"params": list(others), "lr": adam_lr, "muon": False},
        ]
        super().__init__(groups, {"momentum": 0.95, "betas": (0.9, 0.99), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(update(p, p.grad, group), alpha=group["lr"])

    def _muon(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        m = state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(group["momentum"]).add_(grad)
        ahead = grad + group["momentum"] * m  # Nesterov: the momentum of the step to come
        direction = orthogonalize(ahead.flatten(1))
        return 0.2 * max(direction.shape) ** 0.5 * direction.view_as(p)  # 2502.16982, eq. 4: AdamW's usual size of step

    def _adam(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        state, (beta1, beta2) = self.state[p], group["betas"]
        step = state.setdefault("step", torch.zeros((), dtype=torch.float32)).add_(1).item()
        m = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(grad, 1 - beta1)
        v = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(grad.square(), 1 - beta2)
        return m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + group["eps"])  # Adam (1412.6980), algorithm 1


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """The nearest (half-)orthogonal matrix to G (m, n), about: singular values end between 0.7 and 1.2.

    A Newton-Schulz iteration, X <- (a + b X Xᵀ + c (X Xᵀ)²) X; the coefficients are those of Jordan's article, chosen for
    speed. All its steps are polynomials of one Gram matrix, so they are taken there: a convolution's matrix is nine times
    as wide as it is high, and is touched twice instead of twenty times.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.shape[0] > G.shape[1]
    X = (G.mT if tall else G) / (G.norm() + 1e-7)  # (m, n), m <= n, spectral norm at most 1
    A, Q = X @ X.mT, torch.eye(len(X), device=X.device, dtype=X.dtype)  # (m, m): the Gram matrix, and the way so far
    for _ in range(steps):
        step = b * A + c * A @ A
        step.diagonal().add_(a)
        Q, A = step @ Q, step @ A @ step  # polynomials of one symmetric matrix commute
    return (Q @ X).mT if tall else Q @ X


def split(model: nn.Module, outer: tuple[str, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices, and all the others: vectors, embeddings, and whatever has a word of `outer` in its name."""
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (others if p.ndim < 2 or any(word in name for word in outer) else hidden).append(p)
    return hidden, others
