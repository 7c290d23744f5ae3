"""The Triton kernels: in Triton's interpreter, on a GPU where there is one, and compiled ahead of time for four kinds.

The interpreter has to be asked for before anything imports Triton, so it runs in a process of its own: this file, as a script.
"""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_tools import SHARED_MEMORY, Launch, assembly, compiled, launches_of, needs_gpu, needs_triton, spills

from minidiff.core.errors import SettingsError
from minidiff.fast import attention

HEAD_DIMS = (40, 64, 72, 80, 128, 160)
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


# --- what runs in the interpreter, and on a GPU -----------------------------------------------------------------------


def drawn(*shape: int, dtype: str, device: str, seed: int) -> Tensor:
    """(B, N, L, D), cut from the middle of a larger tensor by tokens that is NaN all around: a read beside it shows."""
    b, n, tokens, d = shape
    around = torch.full((b, tokens + 2, n, d + 16), math.nan, dtype=getattr(torch, dtype), device=device)
    inside = around[:, 1:-1, :, 8:-8]
    inside.copy_(torch.randn(b, tokens, n, d, generator=torch.Generator().manual_seed(seed)))
    return inside.transpose(1, 2)


def eq1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def with_gradients(impl: str, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """The output, and the gradients of those inputs that want one."""
    out = eq1(*inputs) if impl == "eq1" else attention(*inputs, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], d_out)]


def errors(inputs: list[Tensor], d_out: Tensor) -> list[float]:
    """Of the output and each gradient against fp64: |difference| / |right answer|, both Frobenius norms; infinite for NaN.

    Over a single key the right gradients of q and k are 0: dv's norm stands in for theirs.
    """
    ours = with_gradients("triton", inputs, d_out)
    right = with_gradients("eq1", [x.detach().double().requires_grad_(x.requires_grad) for x in inputs], d_out.double())
    assert [x.shape for x in ours] == [x.shape for x in right] and {x.dtype for x in ours} == {d_out.dtype}
    least = float(right[-1].norm()) if inputs[1].shape[-2] == 1 else 0.0
    found = [(one.double() - other).norm() / max(float(other.norm()), least) for one, other in zip(ours, right)]
    return torch.stack(found).nan_to_num(math.inf).tolist()  # of two numbers, max() may take either if one is NaN


def case(dtype: str, d: int, queries: int, keys: int, device: str = "cpu", heads: int = 1) -> tuple[list[Tensor], Tensor]:
    sizes = (queries, keys, keys, queries)
    q, k, v, d_out = (drawn(1, heads, n, d, dtype=dtype, device=device, seed=i) for i, n in enumerate(sizes))
    return [x.requires_grad_() for x in (q, k, v)], d_out


def launches(run: bool = True) -> AbstractContextManager[list[Launch]]:
    """The kernels, with their arguments, that flash.py launches meanwhile."""
    from minidiff.fast import flash

    return launches_of(flash, KERNELS, run)


def facts(device: str) -> dict[str, Any]:
    """Beside the errors: strides, bits, layout, and which kernels run when."""
    inputs, d_out = case("float16", 40, 70, 77, device)
    q, k, v = inputs
    with launches() as all_of_them:
        first = with_gradients("triton", inputs, d_out)
    second = with_gradients("triton", inputs, d_out)
    frozen = [q, k.detach(), v.detach()]
    with launches() as fewer:
        with_gradients("triton", frozen, d_out)
    packed = torch.randn(2, 33, 3, 2, 40, generator=torch.Generator().manual_seed(5)).to(device)  # one linear's output
    views = [x.detach().requires_grad_() for x in packed.transpose(1, 3).unbind(2)]
    backwards = torch.randn(40, 2, 33, 2, generator=torch.Generator().manual_seed(6)).to(device).permute(3, 1, 2, 0)
    steep = [(x * scale).detach().requires_grad_() for x, scale in zip(inputs, (8, 8, 1))]  # scores of hundreds
    low = [x.detach().requires_grad_() for x in (6 + q, 0.1 * k - 6, v)]  # all scores far below 0
    one = torch.ones(1, device=device).expand(2, 2, 33, 40)  # what sum() sends back: all strides 0
    return {
        "same bits": all(map(torch.equal, first, second)),
        "by tokens": all(x.transpose(1, 2).is_contiguous() for x in first),
        "packed": max(errors(views, backwards)),
        "strides of 0": max(errors(views, one)),
        "frozen": max(errors(frozen, d_out)),
        "steep": max(errors(steep, d_out)),
        "low": max(errors(low, d_out)),
        "kernels": [[kernel.__name__ for kernel, _, _ in calls] for calls in (all_of_them, fewer)],
    }


def interpreted(cases: list[tuple[str, int, int, int]]) -> dict[str, Any]:
    """`errors` of each case and `facts`, from a process of its own in which Triton interprets. Memory there starts as NaN."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main() -> None:
    from minidiff.fast import flash

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives with NaN
    assert torch.empty(1).isnan().all()
    flash.PART = 64  # so that small shapes have several parts too
    cases = json.loads(sys.argv[1])
    print(json.dumps({"errors": [errors(*case(*one)) for one in cases], "facts": facts("cpu")}))


# --- in the interpreter ----------------------------------------------------------------------------------------------

FEW = [("float32", 40, 17, 77), ("float16", 80, 77, 20), ("float32", 160, 1, 1), ("float32", 8, 20, 130)]
MANY = [
    (dtype, d, tokens, keys)
    for dtype in ("float32", "float16")
    for d in HEAD_DIMS
    for tokens in (1, 17, 64, 77, 200, 256)
    for keys in sorted({tokens, 77})
]


@pytest.fixture(scope="module")
def few() -> dict[str, Any]:
    return interpreted(FEW)


@needs_triton
@pytest.mark.parametrize("number", range(len(FEW)), ids=["-".join(map(str, one)) for one in FEW])
def test_interpreted_against_fp64(few: dict[str, Any], number: int) -> None:
    assert len(few["errors"][number]) == 4 and max(few["errors"][number]) < TOLERANCE[FEW[number][0]]


@needs_triton
@pytest.mark.slow
def test_interpreted_at_every_size() -> None:
    for (dtype, *sizes), found in zip(MANY, interpreted(MANY)["errors"], strict=True):
        assert max(found) < TOLERANCE[dtype], (dtype, *sizes)


def check_facts(found: dict[str, Any]) -> None:
    assert found["same bits"] and found["by tokens"]
    assert max(found["packed"], found["strides of 0"]) < 1e-5
    assert found["frozen"] < 1e-3
    assert found["steep"] < 5e-3 and found["low"] < 5e-2  # sdpa's errors, 1e-3 and 2e-2: dP - Δ is lost in fp16's rounding
    whole = ["forward_kernel", "d_q_kernel", "d_k_d_v_kernel"]
    assert found["kernels"] == [whole, whole[:2]]


@needs_triton
def test_interpreted_facts(few: dict[str, Any]) -> None:
    check_facts(few["facts"])


# --- on a GPU --------------------------------------------------------------------------------------------------------


@needs_triton
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 17, 64, 77, 200, 256, 1024, 4096])
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gpu_against_fp64(dtype: str, d: int, tokens: int) -> None:
    for keys in {tokens, 77}:
        assert max(errors(*case(dtype, d, tokens, keys, "cuda"))) < TOLERANCE[dtype]


@needs_triton
@needs_gpu
def test_gpu_facts() -> None:
    check_facts(facts("cuda"))


# --- compiled ahead of time ------------------------------------------------------------------------------------------

KERNELS = ("forward_kernel", "d_q_kernel", "d_k_d_v_kernel")
SD_SHAPES = {40: 4096, 80: 1024, 160: 256}  # D and L of SD 1.5 at 512², which has 8 heads
SHAPES = SD_SHAPES | {64: 1024, 72: 1024, 128: 256}  # and of others
FEW_SPILLS = {  # instructions that store a register or load it back, of some 2,000
    ("d_k_d_v_kernel", 86, "half", 72): 9,
    ("d_k_d_v_kernel", 89, "half", 72): 9,
    ("d_k_d_v_kernel", 90, "half", 64): 25,
    ("d_k_d_v_kernel", 90, "half", 72): 19,
    ("d_q_kernel", 120, "fp32", 64): 6,
    ("d_q_kernel", 120, "fp32", 128): 6,
    ("d_q_kernel", 120, "fp32", 160): 3,
    ("d_k_d_v_kernel", 90, "fp32", 72): 3,
    ("d_k_d_v_kernel", 90, "fp32", 80): 3,
    ("d_k_d_v_kernel", 120, "fp32", 128): 21,
    ("d_k_d_v_kernel", 120, "fp32", 160): 28,
}

Plans = dict[str, tuple[Any, dict[str, Any]]]


def planned(dtype: str, d: int, keys: int, padded: bool = False) -> Plans:
    """Each kernel that SD would launch, and its arguments by name; `padded` to the next power of two, as stock kernels do."""
    from minidiff.fast import flash

    sizes = (SHAPES[d], keys, keys)
    q, k, v = (torch.empty(2, n, 8, d, dtype=getattr(torch, dtype), device="meta").transpose(1, 2) for n in sizes)
    with launches(run=False) as calls:
        out, lse = flash.launch_forward(q, k, v)
        _, delta = flash.launch_d_q(q, k, v, out, lse, out)
        flash.launch_d_k_d_v(q, k, v, lse, delta, out)
    plans = {kernel.__name__: (kernel, dict(zip(kernel.arg_names, args)) | kwargs) for kernel, args, kwargs in calls}
    for _, arguments in plans.values():
        if padded:
            power = 1 << (d - 1).bit_length()
            arguments.update(D=power, MAIN=power, TAIL=0, OUT_TAIL=0)
    return plans


def multiplications(code: str) -> int:
    """Of all matrix instructions of a warp, or of a group of four on sm_90, where M x N x K is part of the name."""
    shapes = re.findall(r"\bH?G?MMA\.(\d+)x(\d+)x(\d+)", code)
    return code.count(" HMMA.16816.") * 16 * 8 * 16 + sum(int(m) * int(n) * int(k) for m, n, k in shapes)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("keys", ["as many", 77])
@pytest.mark.parametrize("d", SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_kernels_spill_nothing(architecture: int, dtype: str, d: int, keys: int | str) -> None:
    """But for a few. And they fit into the chip's memory, read 16 bytes at once, and use sm_90's own instructions."""
    for name, (kernel, arguments) in planned(dtype, d, keys if isinstance(keys, int) else SHAPES[d]).items():
        binary = compiled(kernel, arguments, architecture)
        code, where = assembly(binary), f"{name} {d} {keys} {dtype} sm_{architecture}"
        assert spills(code) <= FEW_SPILLS.get((name, architecture, "fp32" if dtype == "float32" else "half", d), 0), where
        assert binary.metadata.shared <= SHARED_MEMORY[architecture], where
        old_instructions = architecture == 90 and dtype != "float32" and " HMMA." in code
        assert not (old_instructions and arguments["BLOCK_L" if name != "d_k_d_v_kernel" else "BLOCK_S"] >= 64), where
        narrow = re.findall(r"\b(?:LDG|STG)\.E\.U?(?:8|16)\b", code)
        assert len(narrow) <= 4, where  # some, where a tile has fewer numbers than its threads could read at once


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("keys", ["as many", 77])
@pytest.mark.parametrize("d", SD_SHAPES)
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_kernels_multiply_little(architecture: int, d: int, keys: int | str) -> None:
    """At most 0.72 of what the same tile takes padded to the next power of two."""
    keys = keys if isinstance(keys, int) else SD_SHAPES[d]
    ours, padded = planned("float16", d, keys), planned("float16", d, keys, padded=True)
    for name in ours:
        few, many = (multiplications(assembly(compiled(*plans[name], architecture))) for plans in (ours, padded))
        assert 0 < few <= 0.72 * many, f"{name} {d} {keys} sm_{architecture}: {few} of {many}"


# --- where it cannot run ---------------------------------------------------------------------------------------------


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("minidiff.fast.flash")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    with pytest.raises(SettingsError, match=r'needs the package triton.*pip install "minidiff\[triton\]"; or take impl "sdpa"'):
        attention(*case("float32", 40, 4, 4)[0], impl="triton")


@needs_triton
def test_what_the_kernels_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match='runs on an NVIDIA GPU, and the tensors are on cpu. Take impl "sdpa"'):
        attention(*case("float32", 40, 4, 4)[0], impl="triton")
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # as if; each of these is refused before a kernel starts
    q, k, v = case("float32", 40, 4, 4)[0]
    for inputs, message in [
        (case("float64", 40, 4, 4)[0], "in one of fp16, bf16 and fp32, and these are torch.float64"),
        ([q, k, v.half()], "torch.float32, torch.float32 and torch.float16"),
        ([q, k, v[:, :, 1:]], r"these are \(1, 1, 4, 40\), \(1, 1, 4, 40\), \(1, 1, 3, 40\)"),
        ([q, k[:, :, :0], v[:, :, :0]], r"\(1, 1, 0, 40\)"),
        (case("float32", 512, 4, 4)[0], "heads up to 160 wide, and these are 512 wide"),
    ]:
        with pytest.raises(SettingsError, match=message):
            attention(*inputs, impl="triton")


if __name__ == "__main__":
    main()
