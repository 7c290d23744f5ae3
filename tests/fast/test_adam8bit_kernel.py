"""The 8-bit AdamW's kernel beside its PyTorch twin: in Triton's interpreter, on a GPU where there is one, and compiled.

The interpreter has to be asked for before anything imports Triton, so it runs in a process of its own: this file, as a script.
"""

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton_tools import SHARED_MEMORY, assembly, compiled, launches_of, needs_gpu, needs_triton, spills

from minidiff.fast import adam8bit
from minidiff.fast.adam8bit import BLOCK, LeanAdamW

RATES = {"lr": 0.01, "weight_decay": 0.1}
USUAL, EARLY = (0.9, 0.999), (0.0, 0.4)  # betas; of the second, the new gradient counts for more than what is remembered
SIZES = (BLOCK * 17, BLOCK * 16 + 1, 5003)  # the last block is full, has a single number, and some; 5003 is odd, too
CASES = [
    *((dtype, n, "usual", USUAL) for dtype in ("float32", "bfloat16") for n in SIZES),
    ("float32", 5003, "usual", EARLY),
    ("float32", 5003, "extreme", USUAL),
    ("bfloat16", 5003, "extreme", USUAL),
]


# --- what runs in the interpreter, and on a GPU -----------------------------------------------------------------------


def gradient(kind: str, n: int, step: int) -> Tensor:
    """Numbers over many powers of ten; or also, in blocks of their own, what breaks or nearly so."""
    random = torch.Generator().manual_seed(step)
    g = torch.randn(n, generator=random) * 10 ** torch.randn(n, generator=random)
    g[-1] = (-1) ** step  # so that the last moment, which may be alone in its block, becomes small
    if kind == "extreme":
        blocks = g[: len(g) - len(g) % BLOCK].view(-1, BLOCK)
        blocks[0], blocks[1], blocks[2, 1:] = 0.0, -0.0, 0.0
        blocks[3] *= 1e-43  # denormals, whose squares are 0
        blocks[4] *= 1e-20  # squares are denormals
        blocks[5] *= 1e30  # squares are infinite
        blocks[6, 3], blocks[7, 4], blocks[8, 5] = math.nan, math.inf, -math.inf
        blocks[9, :2] = torch.tensor([math.nan, math.inf])
        g[-1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN that a GPU gives
    return g


def against_twin(dtype: str, n: int, kind: str, betas: tuple[float, float], device: str = "cpu") -> list[dict[str, float]]:
    """For each of three updates: how far apart kernel and twin are. From the first, they start alike each time.

    codes: the share of all codes that differ, and by how much at most. absmax, weights: the largest relative difference
    (of a weight that is smaller than its step, relative to that); what is not finite has to be the same in both.
    """
    start = torch.randn(n, generator=torch.Generator().manual_seed(99)).to(device, getattr(torch, dtype))
    found = []
    kernel, twin = (LeanAdamW([nn.Parameter(start.clone())], betas=betas, **RATES, seed=3, kernel=k) for k in (True, False))
    for step in range(3):
        before = next(iter(twin.places)).detach().clone()
        for optimizer in (kernel, twin):
            (p,) = optimizer.places
            g = gradient(kind, n, step).to(device)
            optimizer.update(p, g if kind == "extreme" else g.to(p))  # fp32: the interpreter reads bf16's denormals wrongly
        (ours, theirs), (mine, other) = (next(iter(x.places)) for x in (kernel, twin)), (x.state for x in (kernel, twin))
        found.append(differences(ours.detach(), theirs.detach(), before, mine[ours], other[theirs]))
        for name, tensor in other[theirs].items():
            mine[ours][name].copy_(tensor)
        ours.data.copy_(theirs.data)
    return found


def differences(w: Tensor, w2: Tensor, before: Tensor, state: dict[str, Tensor], state2: dict[str, Tensor]) -> dict[str, float]:
    names = ("exp_avg", "exp_avg_sq")
    codes = torch.stack([(state[name].int() - state2[name].int()).abs() for name in names])
    absmax = max(relative(state[f"{name}_absmax"], state2[f"{name}_absmax"]) for name in names)
    return {
        "codes": (codes > 0).double().mean().item(),
        "furthest": codes.max().item(),
        "absmax": absmax,
        "weights": relative(w, w2, (w2 - before).abs()),
        "weights apart": (w != w2).logical_and(~w2.isnan()).double().mean().item(),
    }


def relative(x: Tensor, y: Tensor, least: Tensor | float = 1e-40) -> float:
    """The largest |x - y| / max(|y|, least); infinite where one is not finite and the other is, or another such number."""
    x, y = x.double(), y.double()
    same = (x == y) | (x.isnan() & y.isnan())
    return torch.where(same, 0.0, (x - y).abs() / y.abs().clamp(min=least)).nan_to_num(math.inf, math.inf).max().item()


def untouched(device: str = "cpu") -> bool:
    """Is what lies before and behind in memory as it was? Three tensors lie in one, and the middle one is updated."""
    memory = torch.ones(3 * 5003, device=device)
    before, p, after = memory.split(5003)
    optimizer = LeanAdamW([nn.Parameter(p)], **RATES, kernel=True)
    next(iter(optimizer.places)).grad = gradient("usual", 5003, 0).to(device)
    optimizer.step()
    return bool((before == 1).all() and (after == 1).all() and (p != 1).all())


def pieces_agree(device: str = "cpu") -> bool:
    """Two pieces, from a tensor that does not lie in row-major order, give the bits of the twin's codes."""
    adam8bit.PIECE = 12 * BLOCK
    both = []
    for kernel in (True, False):
        p = nn.Parameter(torch.ones(10, 8, 8, 8, device=device).to(memory_format=torch.channels_last))
        optimizer = LeanAdamW([p], **RATES, kernel=kernel)
        p.grad = gradient("usual", p.numel(), 0).view(p.shape).to(device)
        optimizer.step()
        both.append((p.detach(), optimizer.state[p]["exp_avg"]))
    (p, codes), (p2, codes2) = both
    return torch.equal(codes, codes2) and torch.allclose(p, p2, rtol=1e-6)


def main() -> None:
    torch.set_num_threads(1)
    found = [against_twin(*case) for case in CASES]
    print(json.dumps({"found": found, "untouched": untouched(), "pieces": pieces_agree()}))


# --- in the interpreter ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(dtype: str, found: list[dict[str, float]]) -> None:
    """The first update's codes are the twin's, to the bit: there, nothing depends on how multiply-adds are rounded.

    Later ones may be the neighbours, if seldom: with a Triton before 3.9, the interpreter's fused multiply-add rounds twice.
    """
    assert found[0]["codes"] == found[0]["furthest"] == 0
    for one in found:
        assert one["codes"] < 1e-3 and one["furthest"] <= 1 and one["absmax"] < 1e-6
        assert one["weights"] < (1e-6 if dtype == "float32" else 2**-7)  # the neighbour, where the sums are …
        assert one["weights apart"] < 2e-3 or dtype == "float32"  # … just at what the noise carries over: seldom


@needs_triton
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_kernel_is_its_twin(interpreted: dict[str, Any], number: int) -> None:
    check(CASES[number][0], interpreted["found"][number])


@needs_triton
def test_kernel_stays_in_its_tensor(interpreted: dict[str, Any]) -> None:
    assert interpreted["untouched"]


@needs_triton
def test_kernel_in_pieces(interpreted: dict[str, Any]) -> None:
    assert interpreted["pieces"]


# --- on a GPU --------------------------------------------------------------------------------------------------------


@needs_triton
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gpu_kernel_is_its_twin(case: tuple[str, int, str, tuple[float, float]]) -> None:
    check(case[0], against_twin(*case, device="cuda"))


@needs_triton
@needs_gpu
def test_gpu_kernel_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam8bit, "PIECE", adam8bit.PIECE)  # pieces_agree changes it
    assert untouched("cuda") and pieces_agree("cuda")


# --- who picks it ----------------------------------------------------------------------------------------------------


def test_a_cpu_does_without() -> None:
    assert not adam8bit.triton_runs(torch.device("cpu"))


@pytest.mark.parametrize("missing", ["nothing", "triton", "compiler"])
def test_a_gpu_takes_it_where_triton_runs(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam8bit, "find_spec", lambda name: None if missing == "triton" else "somewhere")
    monkeypatch.setattr(adam8bit.shutil, "which", lambda name: None if missing == "compiler" else f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    adam8bit.triton_runs.cache_clear()
    assert adam8bit.triton_runs(torch.device("cuda")) == (missing == "nothing")
    adam8bit.triton_runs.cache_clear()


# --- compiled ahead of time ------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_kernel_spills_nothing(architecture: int, dtype: str) -> None:
    """And reads and writes weights and gradients 16 bytes at once where they are fp32; 8 for bf16, 4 for codes."""
    from minidiff.fast import adam8bit_kernel

    p = nn.Parameter(torch.zeros(64 * BLOCK, dtype=getattr(torch, dtype)))
    p.grad = torch.zeros_like(p)
    with launches_of(adam8bit_kernel, ["adamw_kernel"], run=False) as calls:
        LeanAdamW([p], **RATES, kernel=True).step()
    ((kernel, args, options),) = calls
    code = assembly(compiled(kernel, dict(zip(kernel.arg_names, args)) | options, architecture))
    assert not spills(code)
    wide = "128" if dtype == "float32" else "64"
    assert f"LDG.E.{wide}" in code and f"STG.E.{wide}" in code
    assert "STG.E.U8" not in code and "STG.E.U16" not in code


if __name__ == "__main__":
    main()
