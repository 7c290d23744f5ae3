"""NaN and infinity: which module was the first to output them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.core.errors import MinidiffError


def nonfinite_error(name: str, module: nn.Module, again: Callable[[], Tensor]) -> MinidiffError:
    """The error for NaN or infinity in a picture. `again` repeats the computation, to find the part of `module` that broke."""
    _, culprit = first_nonfinite({name: module}, again)
    return MinidiffError(
        f"NaN or infinity comes out of {culprit or name}, so the picture would be black. Where half precision overflowed, "
        "run in float32 or bfloat16 (--torch_dtype); where training diverged, take an earlier checkpoint."
    )


def first_nonfinite(modules: Mapping[str, nn.Module], forward: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
    """The output of `forward`, and the name of the first module, innermost first, whose output had NaN or infinity."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(t.isfinite().all() for t in tensors_in(output)):
                found.append(f"{name} ({type(module).__name__}){blame(module)}")

        return module.register_forward_hook(look)

    paths = ((f"{top}.{path}".rstrip("."), m) for top, model in modules.items() for path, m in model.named_modules())
    handles = [watch(path, module) for path, module in paths]
    try:
        with torch.no_grad():
            return forward(), found[0] if found else None
    finally:
        for handle in handles:
            handle.remove()


def blame(module: nn.Module) -> str:
    """Words for a module's own weights, if they have NaN or infinity; otherwise nothing."""
    broken = [name for name, p in module.named_parameters() if not p.isfinite().all()]
    return f", whose {broken[0]} itself holds NaN or infinity: get its file again" if broken else ""


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in a module's output: one, several, or a dictionary of them."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]
