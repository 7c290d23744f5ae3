"""Where minidiff.fast is plugged in. Without that room everything is computed as `core` says; only time and memory change."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from minidiff.core.errors import SettingsError

fast: Any
try:
    import minidiff.fast as fast
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("minidiff.fast"):
        raise
    fast = None  # the room was deleted


def speed_up(pipe: Any) -> None:
    """Give a pipeline's networks fast classes, unless it is `plain`. Call this again after an adapter was injected."""
    if not pipe.plain:
        speed_up_network(pipe.unet)
        speed_up_network(pipe.vae)
        for tower in pipe.parts.towers.values():
            fast.install(tower, fast.ADAPTERS)  # transformers' own layers stay as they are


def speed_up_network(network: nn.Module) -> None:
    """Give a U-Net or VAE of ours fast classes."""
    if fast:
        fast.install(network)


def checkpoint_gradients(unet: nn.Module, on: bool = True) -> None:
    """--gradient_checkpointing: save only the inputs of each layer, and compute the layer again in the backward pass."""
    if on:
        needed("--gradient_checkpointing").install(unet, fast.CHECKPOINTED)
    elif fast:
        fast.remove(unet, fast.CHECKPOINTED)


def light_text(plain: bool = False) -> Any:
    """For `read_model`, in a process that only draws: CLIP without the seconds that the import of transformers takes."""
    if fast is None or plain:
        return None
    from minidiff.fast import clip

    return clip


def keep_memory(keep: bool = True) -> None:
    """Let this process keep the memory of freed tensors for the next ones: faster. Without `keep`, return it at once."""
    if fast:
        fast.memory.keep_memory(keep)


def peak_memory(device: str) -> int | None:
    """The most memory that this process has had, in bytes; None where it is not known."""
    return fast.memory.peak_memory(device) if fast else None


def compile_unet(unet: nn.Module) -> None:
    """--compile: compile the U-Net in place, for the device on which it is now."""
    needed("--compile")
    from minidiff.fast.compiled import compile_unet as compile_in_place

    compile_in_place(unet)


def frozen_weights(models: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Use this while frozen weights do not change: a CPU's rearranged copies of small ones are cached."""
    return fast.frozen_weights(models, large=False) if fast else nullcontext()


def needed(flag: str) -> Any:
    """The room `fast`; SettingsError, naming the flag that needs it, where the room was deleted."""
    if fast is None:
        raise SettingsError(f"{flag} is done by the folder minidiff/fast, which is missing here; leave the flag out.")
    return fast
