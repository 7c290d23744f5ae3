"""LoRA: learn a small change of a big matrix (arXiv 2106.09685).

A frozen linear layer W (out, in) gets a detour of two thin matrices: A (r, in) leads down to r numbers, B (out, r) up.

    y = W x + (alpha / r) B A x          eq. 3, with the alpha / r of section 4.1

B starts at zero, so the tuned model starts as the base model. r is the rank; alpha only sets how strong the detour is.

    inject(unet, rank=4)   ->   train `trainable(unet)`   ->   merge(unet) or keep the detour   ->   eject(unet)

A module is called by its dotted path ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"), an adapter by any
word ("default", "dog"). A layer can carry several adapters; their changes ΔW add up, each times its own strength.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import AdapterError, did_you_mean
from minidiff.rng import generator

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # every attention projection, self and cross


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` and its adapters.

    A and B are fp32 whatever the dtype of the base. Cast the model before, not after: `.to(torch.float16)` on the
    whole of it would cast them too.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.ParameterDict()  # adapter name -> (r, in)
        self.lora_B = nn.ParameterDict()  # adapter name -> (out, r)
        self.scale: dict[str, float] = {}  # alpha / r: belongs to the file
        self.strength: dict[str, float] = {}  # 0 off, 1 as trained: belongs to the user
        self.unmerged_weight: Tensor | None
        self.register_buffer("unmerged_weight", None, persistent=False)  # a buffer, so that it follows .to(device)

    def add(self, adapter_name: str, A: Tensor, B: Tensor, scale: float) -> None:
        """Put an adapter on, at strength 1: A (r, in), B (out, r), scale = alpha / r."""
        device = self.base.weight.device
        self.lora_A[adapter_name] = nn.Parameter(A.to(device, torch.float32))
        self.lora_B[adapter_name] = nn.Parameter(B.to(device, torch.float32))
        self.scale[adapter_name], self.strength[adapter_name] = scale, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype that the base gives."""
        y = self.base(x)
        if self.unmerged_weight is not None:
            return y
        for name, A in self.lora_A.items():
            if factor := self.strength[name] * self.scale[name]:
                detour = F.linear(F.linear(x.to(A.dtype), A), self.lora_B[name])  # B A x: LoRA (arXiv 2106.09685), eq. 3
                y = y + (factor * detour).to(y.dtype)
        return y

    @torch.no_grad()
    def delta(self) -> Tensor:
        """ΔW = Σ strength · (alpha / r) · B A over the adapters, (out, in) in fp32."""
        total = torch.zeros_like(self.base.weight, dtype=torch.float32)
        for name, A in self.lora_A.items():
            total += self.strength[name] * self.scale[name] * (self.lora_B[name].float() @ A.float())
        return total

    def merge(self) -> None:
        """W' = W + ΔW, added in fp32 and rounded once to W's dtype. The old W stays beside it."""
        W = self.base.weight.data
        self.unmerged_weight, self.base.weight.data = W, (W.float() + self.delta()).to(W.dtype)

    def unmerge(self) -> None:
        """The kept W back: subtracting ΔW again would leave rounding errors."""
        if self.unmerged_weight is not None:
            self.base.weight.data, self.unmerged_weight = self.unmerged_weight, None


# --- the whole model -------------------------------------------------------------------------------------------------


def inject(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
    adapter_name: str = "default",
) -> dict[str, LoRALinear]:
    """Freeze `model` and put a fresh adapter on every linear layer that a target names; gives them by module name.

    A target is a module's last name or names ("to_q", "to_out.0", "attn2.to_k"), whole words between the dots. alpha
    defaults to rank, so that alpha / r = 1. A is uniform in ±1/√in (kaiming_uniform with a = √5, as in peft), drawn
    afresh from `seed` and the module's name; B is zero. Raises AdapterError before anything is changed.
    """
    alpha = rank if alpha is None else alpha
    names = find_targets(model, (targets,) if isinstance(targets, str) else targets)
    check_adapter_name(model, adapter_name)
    check_sizes(model, names, rank, alpha)
    model.requires_grad_(False)
    for name in names:
        layer = wrap(model, name)
        A = torch.empty(rank, layer.base.in_features, device="cpu")
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator(seed, "lora_A", name))
        layer.add(adapter_name, A, torch.zeros(layer.base.out_features, rank, device="cpu"), alpha / rank)
    return {name: layer for name, layer in lora_layers(model).items() if name in names}


def eject(model: nn.Module) -> None:
    """Take every adapter out: the very same `nn.Linear` objects return, with the very same bits (still frozen)."""
    for name, layer in lora_layers(model).items():
        layer.unmerge()
        set_module(model, name, layer.base)


def merge(model: nn.Module) -> None:
    """Fold the adapters, at their strengths of now, into the weights: no detour to compute any more.

    Keeps the old weights, so that `unmerge` is exact to the bit. That costs a second copy of the layers concerned: on
    SD 1.5 with the default targets 178 MiB in fp16, 357 MiB in fp32.
    """
    layers = adapted_layers(model, "merge")
    for layer in layers.values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the old weights return, bit for bit, and the detours are computed again."""
    layers = lora_layers(model).values()
    if not any(layer.unmerged_weight is not None for layer in layers):
        raise AdapterError(f"{type(model).__name__}: nothing is merged, so there is nothing to unmerge.")
    for layer in layers:
        layer.unmerge()


def set_adapters(model: nn.Module, names: Sequence[str], strengths: Sequence[float] | None = None) -> None:
    """Switch on the adapters `names`, each at its strength (1 if none are given), and every other one off."""
    strengths = [1.0] * len(names) if strengths is None else strengths
    if len(names) != len(strengths):
        raise AdapterError(f"{len(names)} adapters {list(names)} but {len(strengths)} weights {list(strengths)}.")
    layers = adapted_layers(model, "set_adapters")
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise AdapterError(f'no adapter is called "{name}"; there is {", ".join(known)}.{did_you_mean(name, known)}')
    wanted = dict(zip(names, strengths))
    for layer in layers.values():
        layer.strength = {name: float(wanted.get(name, 0.0)) for name in layer.strength}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer of the model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def check_plain(model: nn.Module) -> None:
    """AdapterError while adapters are in the model: its state dict would have names that no other program knows."""
    if names := adapter_names(model):
        raise AdapterError(f"{type(model).__name__} carries adapters ({', '.join(names)}); unload_lora_weights first.")


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in the model, in the order in which they came."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.lora_A))


def lora_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """One adapter's tensors: `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r)."""
    state = {}
    for name, layer in lora_layers(model).items():
        if adapter_name in layer.lora_A:
            state[f"{name}.lora_A.weight"] = layer.lora_A[adapter_name].detach()
            state[f"{name}.lora_B.weight"] = layer.lora_B[adapter_name].detach()
    return state


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer should get, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def print_trainable_parameters(model: nn.Module) -> None:
    """One line, in peft's form: trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927"""
    some = sum(parameter.numel() for parameter in trainable(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    print(f"trainable params: {some:,} || all params: {every:,} || trainable%: {100 * some / every:.4f}")


# --- finding, checking and replacing layers --------------------------------------------------------------------------


def wrap(model: nn.Module, name: str) -> LoRALinear:
    """The layer called `name` as a LoRALinear: the one that is there already, or a new one around the `nn.Linear`."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        module = LoRALinear(module)
        set_module(model, name, module)
    assert isinstance(module, LoRALinear)
    return module


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its name in the plain model, whether it is wrapped or not."""
    return {name.removesuffix(".base"): m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The linear layers that the targets name; an AdapterError for a target that names none, or something else."""
    linears = linear_layers(model)
    found: dict[str, None] = {}
    for target in targets:
        others = [name for name, _ in model.named_modules() if ends_with(name, target) and name not in linears]
        matches = [name for name in linears if ends_with(name, target)]
        if not matches or others:
            raise AdapterError(why_not(model, target, others, linears))
        found.update(dict.fromkeys(matches))
    if not found:
        raise AdapterError(f"no targets were given; the default is {' '.join(DEFAULT_TARGETS)}.")
    return list(found)


def ends_with(name: str, target: str) -> bool:
    """Whole words only: "attn1.to_q" ends with "to_q", "proj_to_q" does not."""
    return f".{name}".endswith(f".{target}")


def why_not(model: nn.Module, target: str, others: list[str], linears: dict[str, nn.Linear]) -> str:
    """The message for a target that cannot be adapted, with what was perhaps meant."""
    endings = sorted({last_words(name) for name in linears})
    if not others:
        what = f"matches nothing in {type(model).__name__}"
    else:
        kind = type(model.get_submodule(others[0])).__name__
        what = f"names a {kind} ({others[0]}), and LoRA here adapts linear layers only"
    return f'target "{target}" {what}.{did_you_mean(target, endings)} The linear layers end in {", ".join(endings)}.'


def last_words(name: str) -> str:
    """The shortest ending that says something: "to_q", but "to_out.0" where the last word is a number."""
    words = name.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() else words[-1]


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
        raise AdapterError(f'"{adapter_name}" cannot name an adapter; take a plain word such as "dog".')
    if adapter_name in adapter_names(model):
        raise AdapterError(f'an adapter called "{adapter_name}" is there already; choose another name, or eject first.')
    if any(layer.unmerged_weight is not None for layer in lora_layers(model).values()):
        raise AdapterError("adapters are merged into the weights; unmerge (unfuse_lora) before adding another.")


def check_sizes(model: nn.Module, names: Sequence[str], rank: int, alpha: float) -> None:
    if rank < 1:
        raise AdapterError(f"rank is {rank}; it must be at least 1.")
    if not 0 < alpha < math.inf:
        raise AdapterError(f"alpha is {alpha}; it must be a positive number.")
    linears = linear_layers(model)
    for name in names:
        out_features, in_features = linears[name].weight.shape
        if rank > min(out_features, in_features):
            raise AdapterError(f"rank {rank} is more than {name} has: its weight is {out_features} x {in_features}.")


def adapted_layers(model: nn.Module, what: str) -> dict[str, LoRALinear]:
    """The adapted layers, or an AdapterError where there are none or they are merged already."""
    layers = lora_layers(model)
    if not layers:
        raise AdapterError(f"{what}: {type(model).__name__} has no adapter; inject or load one first.")
    if any(layer.unmerged_weight is not None for layer in layers.values()):
        raise AdapterError(f"{what}: the adapters are merged already; unmerge (unfuse_lora) first.")
    return layers
