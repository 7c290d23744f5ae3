"""`--compile`: the U-Net through `torch.compile`, which fuses small operations; on a GPU it also records CUDA graphs.

A step of SD 1.5 is some thousand kernels, and starting each of them from Python can take longer than the kernel itself. With
mode "reduce-overhead" PyTorch records all launches of a call once, and then replays them as one CUDA graph.

`Module.compile()` compiles the module in place: names, adapters, hooks and the state dict stay as they are. Whatever changes
the module (an adapter, another shape of the input) compiles it again at the next call.
"""

import shutil
import sys
from typing import Any

from torch import Tensor, nn

from minidiff.core.errors import SettingsError
from minidiff.core.unet import UNet2DConditionModel

BACKEND = "inductor"  # tests take "eager" or "aot_eager", which need no C++ compiler


class CompiledUNet(UNet2DConditionModel):
    """A compiled U-Net. Its output is a copy, because a CUDA graph writes the next output into the same memory."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        output: Tensor = super().__call__(*inputs)
        return output.clone()


def compile_unet(unet: nn.Module) -> None:
    """Compile the U-Net in place, for the device on which it is now. SettingsError where that cannot work."""
    if BACKEND == "inductor" and not (sys.platform == "win32" or any(map(shutil.which, ("g++", "c++", "clang++")))):
        raise SettingsError("--compile needs a C++ compiler, and there is none (g++ or clang++): install one, or leave it out.")
    on_gpu = next(unet.parameters()).device.type == "cuda"
    mode: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu and BACKEND == "inductor" else {}
    unet.__class__ = CompiledUNet
    unet.compile(backend=BACKEND, **mode)
