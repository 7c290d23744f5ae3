"""Speed and memory, plugged in from outside: faster classes for the plain modules of `core`.

    fast.install(unet)                        less time on a CPU, and less memory in training; the same numbers
    fast.install(unet, fast.CHECKPOINTED)     on top of it: much less memory in training, a third more time
    fast.remove(unet)                         the plain classes again

The class of a module says how it computes. `install` gives each module another class, a subclass of its own. Parameters, names
and hooks stay, so checkpoints, adapters and optimizers notice nothing. PyTorch's `parametrize` works in the same way. Install
once after loading, and again after an adapter was injected.

This room can be deleted: then everything is computed as `core` says.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from minidiff.core.attention import GEGLU, CrossAttention, FeedForward, naive_attention
from minidiff.core.blocks import NormSiLU
from minidiff.core.errors import SettingsError, did_you_mean
from minidiff.core.ip_adapter import ImageAttention
from minidiff.core.lora import LoRAConv2d, LoRALinear
from minidiff.core.unet import DownLevel, UpLevel
from minidiff.fast import frozen, lean, lean_lora, memory
from minidiff.fast.frozen import cast_layerwise, frozen_weights
from minidiff.fast.tiled_attention import tiled_attention

__all__ = [
    "ADAPTERS", "CHECKPOINTED", "FAST", "attention", "cast_layerwise", "frozen_weights", "install", "memory",
    "remove",
]  # fmt: skip

Classes = Mapping[type[nn.Module], type[nn.Module]]  # plain class -> fast class, a subclass of it

ADAPTERS: Classes = {LoRALinear: lean_lora.LeanLoRALinear, LoRAConv2d: lean_lora.LeanLoRAConv2d}
FAST: Classes = {
    nn.Conv2d: frozen.FastConv2d,
    nn.Linear: frozen.FastLinear,
    nn.GroupNorm: lean.LeanGroupNorm,
    nn.LayerNorm: lean.LeanLayerNorm,
    NormSiLU: lean.LeanNormSiLU,
    GEGLU: lean.LeanGEGLU,
    FeedForward: frozen.FeedForwardInPieces,
    CrossAttention: frozen.CachedAttention,
    ImageAttention: frozen.CachedImageAttention,
    UpLevel: lean.LeanUpLevel,
    **ADAPTERS,
}
CHECKPOINTED: Classes = {DownLevel: lean.CheckpointedDownLevel, lean.LeanUpLevel: lean.CheckpointedUpLevel}  # on top of FAST


def install(model: nn.Module, classes: Classes = FAST) -> None:
    """Give each module of the model the fast class for its own class."""
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))


def remove(model: nn.Module, classes: Classes = FAST) -> None:
    """Undo `install`."""
    install(model, {fast: plain for plain, fast in classes.items()})


sdpa = scaled_dot_product_attention  # PyTorch's fused kernels
IMPLS: dict[str, Callable[..., Tensor]] = {"auto": sdpa, "naive": naive_attention, "tiled": tiled_attention, "sdpa": sdpa}
GPU_IMPLS = ("triton",)


def attention(q: Tensor, k: Tensor, v: Tensor, impl: str = "auto") -> Tensor:
    """softmax(q kᵀ / √D) v: "Attention Is All You Need" (arXiv 1706.03762), eq. 1.

    Takes q (B, N, L, D) and k, v (B, N, S, D) of any strides; gives (B, N, L, D). `impl`: `naive` is the formula, `tiled`
    FlashAttention in plain PyTorch, `sdpa` PyTorch's fused kernels, `triton` our own kernels for NVIDIA GPUs; `auto` is `sdpa`.
    SettingsError for an unknown `impl`, and for `triton` where it cannot run.
    """
    if impl == "triton":
        from minidiff.fast.flash import flash_attention  # only now: Triton takes long to import, and may be missing

        return flash_attention(q, k, v)
    if impl not in IMPLS:
        known = [*IMPLS, *GPU_IMPLS]
        raise SettingsError(f'attention impl "{impl}" is unknown; it is one of {", ".join(known)}.{did_you_mean(impl, known)}')
    return IMPLS[impl](q, k, v)
