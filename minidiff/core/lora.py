"""LoRA: learn a small change of a big matrix (arXiv 2106.09685). DoRA learns its lengths separately (arXiv 2402.09353).

A frozen layer W gets a second path of two thin matrices: A leads down to r numbers, B leads up again.

    y = W x + scale · B A x                       LoRA, eq. 3; scale = alpha / r, section 4.1
                                                  rsLoRA: scale = alpha / √r, which lets high ranks learn (arXiv 2312.03732)

r is the rank; alpha only sets how strong the change is. B starts at zero, so the tuned model starts as the base model.
For a convolution W, A is a convolution to r channels, and B a 1 x 1 convolution from them.

DoRA splits the tuned matrix V = W + scale · B A into lengths and directions, and learns the lengths m separately:

    W' = m · V / ||V||                            DoRA, eq. 5; ||V|| is one norm for each row of V: for each output

m starts at ||W||, so this starts as the base model, too. (Old adapters of LyCORIS have one norm for each input. The shape of m
says which kind it is.)

    W (out, in)         A (r, in)           B (out, r)    m (out, 1) or (1, in)                x (…, in)
    W (out, in, k, k)   A (r, in, k, k)     B (out, r)    m (out, 1, 1, 1) or (1, in, 1, 1)    x (batch, in, H, W)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRAWeights:
    """One adapter of one layer."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None  # DoRA's m

    @property
    def rank(self) -> int:
        return len(self.A)

    def product(self) -> Tensor:
        """scale · B A, in fp32, shaped as W."""
        return self.scale * (self.B.float() @ self.A.float().flatten(1)).unflatten(1, self.A.shape[1:])

    def delta(self, W: Tensor) -> Tensor:
        """ΔW = W' - W, in fp32, shaped as W."""
        if self.magnitude is None:
            return self.product()
        V, m = W.float() + self.product(), self.magnitude.float()
        return m / lengths(V, m.shape) * V - W.float()  # DoRA (arXiv 2402.09353), eq. 5


def lengths(V: Tensor, shape: torch.Size) -> Tensor:
    """||V||: one norm for each output or each input. `shape` is the shape of m; it is 1 on the axes that are summed over."""
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return torch.linalg.vector_norm(V, dim=axes, keepdim=True).clamp(min=1e-12)  # not 0, as m is divided by it


def fresh(W: Tensor, rank: int, alpha: float, rslora: bool, dora: bool, random: torch.Generator) -> LoRAWeights:
    """An adapter of W that changes nothing yet: B = 0 and m = ||W||.

    The LoRA paper (section 4.1) draws A from a Gaussian. Here, as in the authors' own code and in peft, A is uniform in
    ±1/√(inputs), which is kaiming_uniform with a = √5.
    """
    A, B = torch.empty(rank, *W.shape[1:]), torch.zeros(len(W), rank)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=random)
    scale = alpha / (math.sqrt(rank) if rslora else rank)  # rsLoRA (arXiv 2312.03732), theorem 3.2
    one_for_each_output = torch.Size([len(W)] + [1] * (W.ndim - 1))
    return LoRAWeights(A.to(W.device), B.to(W.device), scale, lengths(W.float(), one_for_each_output) if dora else None)


def without_autocast(x: Tensor) -> torch.autocast:
    """Inside the `with`, autocast does not round products on x's device to half precision. ("meta" has no autocast.)"""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class LoRALayer(nn.Module):
    """A frozen layer and its adapters, by name: `LoRALinear` or `LoRAConv2d`.

    Several adapters add up, each times its strength: W' = W + Σ strength · ΔW. A, B and m are fp32, whatever the dtype of the
    base. So cast a model before it gets adapters, not after.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # adapter name -> A, and B
        self.lora_magnitude = nn.ParameterDict()  # adapter name -> m, where the adapter is DoRA
        self.scale: dict[str, float] = {}  # alpha / r, fixed
        self.strength: dict[str, float] = {}  # the user's choice: 0 is off, 1 as trained
        self.dropout: dict[str, float] = {}  # share of A's input that is dropped in training
        self.unmerged_weight: Tensor | None
        self.register_buffer("unmerged_weight", None, persistent=False)  # a buffer, so that it follows .to(device)

    def add(self, name: str, weights: LoRAWeights, dropout: float = 0.0) -> None:
        """Add a copy of an adapter, in fp32, at strength 1."""
        parts = ((self.lora_A, weights.A), (self.lora_B, weights.B), (self.lora_magnitude, weights.magnitude))
        for table, tensor in parts:
            if tensor is not None:
                table[name] = nn.Parameter(tensor.detach().to(self.base.weight.device, torch.float32, copy=True))
        self.scale[name], self.strength[name], self.dropout[name] = weights.scale, 1.0, dropout

    def weights(self, name: str) -> LoRAWeights:
        """One adapter. The tensors are the layer's own, without gradients."""
        m = self.lora_magnitude[name].detach() if name in self.lora_magnitude else None
        return LoRAWeights(self.lora_A[name].detach(), self.lora_B[name].detach(), self.scale[name], m)

    def forward(self, x: Tensor) -> Tensor:
        """W' x + bias, in the dtype of the base's output."""
        y = tuned = self.base(x)
        if self.unmerged_weight is not None:  # W is W' already
            return y
        for name, strength in self.strength.items():
            if strength:
                change = self.dora(name, x, y) if name in self.lora_magnitude else self.lora(name, x)
                tuned = tuned + (strength * change).to(y.dtype)
        return tuned

    def lora(self, name: str, x: Tensor) -> Tensor:
        """scale · B A x."""
        A, B = self.lora_A[name], self.lora_B[name]
        x = F.dropout(x.to(A.dtype), self.dropout[name], self.training)
        return self.scale[name] * self.up(self.down(x, A), B)  # LoRA (arXiv 2106.09685), eq. 3

    def dora(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """W' x - W x, with W' = g V and g = m / ||V|| (DoRA, eq. 5); y is W x + bias. Only the x of B A x has dropout."""
        g = self.gain(name)
        if self.lora_magnitude[name].shape[1] == 1:  # a length for each output: g V x = g W x + g B A x
            Wx = y.float() if self.base.bias is None else y.float() - self.base.bias.float().view(-1, *g.shape[1:])
            return (g - 1) * Wx + g * self.lora(name, x)
        return self.down((g - 1) * x, self.base.weight.float()) + self.lora(name, g * x)  # for each input: V (g x)

    def gain(self, name: str) -> Tensor:
        """DoRA's g = m / ||V||, one number for each channel of x or y, shaped as their factor; exactly 1 at the start."""
        m, W = self.lora_magnitude[name], self.base.weight
        with torch.no_grad(), without_autocast(W):  # section 4.3: the norm counts as a constant
            norm = lengths(W.float() + self.weights(name).product(), m.shape)
        return (m / norm).view(-1, *[1] * (W.ndim - 2))

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        """W x or A x."""
        return F.linear(x, weight)

    def up(self, x: Tensor, B: Tensor) -> Tensor:
        """B x."""
        return F.linear(x, B)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """W' - W: the sum of strength · ΔW over the adapters, fp32, in the shape of W."""
        W = self.base.weight if self.unmerged_weight is None else self.unmerged_weight
        with without_autocast(W):
            changes = (strength * self.weights(name).delta(W) for name, strength in self.strength.items() if strength)
            return sum(changes, start=torch.zeros_like(W, dtype=torch.float32))

    def merge(self) -> None:
        """W' = W + ΔW, added in fp32 and rounded once to W's dtype. The old W is kept."""
        self.unmerge()  # else a second merge would keep W' as the old W
        W = self.base.weight.data
        self.unmerged_weight, self.base.weight.data = W, (W.float() + self.delta()).to(W.dtype)

    def unmerge(self) -> None:
        """Restore the old W. To subtract ΔW instead would leave rounding errors."""
        if self.unmerged_weight is not None:
            self.base.weight.data, self.unmerged_weight = self.unmerged_weight, None


class LoRALinear(LoRALayer):
    """A frozen `nn.Linear` and its adapters."""

    base: nn.Linear


class LoRAConv2d(LoRALayer):
    """A frozen `nn.Conv2d` and its adapters. A has the stride, padding and dilation of W."""

    base: nn.Conv2d

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.base.stride, self.base.padding, self.base.dilation)

    def up(self, x: Tensor, B: Tensor) -> Tensor:
        return F.conv2d(x, B[:, :, None, None])
