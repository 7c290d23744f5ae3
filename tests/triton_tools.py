"""What the tests of all Triton kernels share: when to skip them, and what the compiler makes of them without a GPU."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason='triton is not installed: pip install "minidiff[triton]"')
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

SHARED_MEMORY = {86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}  # bytes a program may have; CUDA's guide, table 28
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
}
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # the kernel, and its arguments


class Recorder:
    """Stands in for a kernel, notes how it is launched, and launches it unless told otherwise."""

    def __init__(self, kernel: Any, calls: list[Launch], run: bool) -> None:
        self.kernel, self.calls, self.run = kernel, calls, run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.calls.append((self.kernel, args, kwargs))
            if self.run:
                self.kernel[grid](*args, **kwargs)

        return launch


@contextmanager
def launches_of(module: ModuleType, names: Sequence[str], run: bool = True) -> Iterator[list[Launch]]:
    """The kernels, with their arguments, that `module`, where they go by `names`, launches meanwhile."""
    calls: list[Launch] = []
    kernels = {name: getattr(module, name) for name in names}
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel, calls, run))
    yield calls
    for name, kernel in kernels.items():
        setattr(module, name, kernel)


def compiled(kernel: Any, arguments: dict[str, Any], architecture: int) -> Any:
    """As a launch with these arguments would compile it: what 16 divides and what is 1 is known to the compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, constants, attributes = {}, {}, {}
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constexprs:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, tuple):
            signature[name] = tuple("constexpr" if stride == 1 else "i32" for stride in value)
            constants |= {(i, j): 1 for j, stride in enumerate(value) if stride == 1}
            attributes |= {(i, j): [["tt.divisibility", 16]] for j, stride in enumerate(value) if stride % 16 == 0}
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else {int: "i32", float: "fp32"}[type(value)]
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in arguments}
    return compile(ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", architecture, 32), options)


def assembly(binary: Any) -> str:
    """What the GPU will execute, from the disassembler that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def spills(code: str) -> int:
    """Instructions that store a register into memory or load it back, for want of registers."""
    return len(re.findall(r"\b(?:STL|LDL)\b", code))
