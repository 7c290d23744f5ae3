"""Every way of computing attention against eq. 1 in fp64; and the tiled one, which never holds all the weights."""

import ast
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import minidiff
from minidiff.core.errors import SettingsError
from minidiff.fast import attention
from minidiff.fast.tiled_attention import backward_tiles, forward_tiles, tiled_attention

WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    **{impl: partial(attention, impl=impl) for impl in ("auto", "naive", "sdpa", "tiled")},
    "many tiles": partial(tiled_attention, block=48),  # of the tests' 1 to 256 tokens, and seldom a divisor of them
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """By tokens, (B, L, N, D), seen as (B, N, L, D): strided, as the layer hands them over."""
    b, n, tokens, d = shape
    return torch.randn(b, tokens, n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype).transpose(1, 2)


def qkv(queries: int, keys: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [drawn(2, 3, n, d, dtype=dtype, seed=seed).requires_grad_() for seed, n in enumerate((queries, keys, keys))]


def eq1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def with_gradients(way: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    out = way(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def largest_error(way: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], d_out: Tensor) -> float:
    """Of the output and every gradient, against fp64: |difference| / |right answer|, both Frobenius norms.

    Over a single key the weights are 1 whatever q and k are, and the right gradients 0: dv's norm stands in for theirs.
    """
    right = with_gradients(eq1, [x.detach().double().requires_grad_() for x in inputs], d_out.double())
    ours = with_gradients(way, inputs, d_out)
    for one, other, like in zip(ours, right, [inputs[0], *inputs]):
        assert one.shape == other.shape and one.dtype == like.dtype
    least = float(right[3].norm()) if inputs[1].shape[-2] == 1 else 0.0
    found = [(one.double() - other).norm() / max(float(other.norm()), least) for one, other in zip(ours, right)]
    return float(torch.stack(found).max())  # NaN if one of them is, which Python's max() would not be


# --- every way, at every size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keys", ["as many", 77])
@pytest.mark.parametrize("tokens", [1, 17, 64, 77, 200, 256])
@pytest.mark.parametrize("d", [40, 64, 80, 160])
def test_against_fp64(d: int, tokens: int, keys: int | str, way: str) -> None:
    inputs = qkv(tokens, keys if isinstance(keys, int) else tokens, d)
    assert largest_error(WAYS[way], inputs, drawn(2, 3, tokens, d, dtype=torch.float32, seed=3)) < 1e-5


@pytest.mark.parametrize("way", ["tiled", "many tiles"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype(dtype: torch.dtype, way: str) -> None:
    d_out = drawn(2, 3, 200, 40, dtype=dtype, seed=3)
    assert largest_error(WAYS[way], qkv(200, 77, 40, dtype), d_out) < TOLERANCE[dtype]


@pytest.mark.parametrize("way", WAYS)
def test_scores_beyond_the_range_of_exp(way: str) -> None:
    q, k, v = (x.detach() for x in qkv(77, 77, 40))
    out = WAYS[way](q * 100, k * 100, v)  # scores of some 10^5: exp overflows at 89
    assert out.isfinite().all()
    assert (out - eq1(*(x.double() for x in (q * 100, k * 100, v)))).norm() / out.norm() < 1e-2  # fp32 scores of that size


@pytest.mark.parametrize("way", WAYS)
def test_inputs_of_any_strides(way: str) -> None:
    """Packed q, k, v; every other token; one v for all heads; and a gradient laid out backwards."""
    packed = torch.randn(2, 64, 3, 3, 40, generator=torch.Generator().manual_seed(0)).transpose(1, 3)  # (B, 3, 3, L, D)
    q, k, v = packed[:, :, 0], packed[:, :, 1, ::2], packed[:, :1, 2, 1::2].expand(-1, 3, -1, -1)
    d_out = torch.randn(40, 64, 3, 2, generator=torch.Generator().manual_seed(1)).permute(3, 2, 1, 0)
    assert not any(x.is_contiguous() for x in (q, k, v, d_out))
    assert largest_error(WAYS[way], [x.detach().requires_grad_() for x in (q, k, v)], d_out) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_twice_the_same_bits(way: str) -> None:
    inputs, d_out = qkv(200, 77, 40), drawn(2, 3, 200, 40, dtype=torch.float32, seed=3)
    first, second = (with_gradients(WAYS[way], inputs, d_out) for _ in range(2))
    assert all(map(torch.equal, first, second))


# --- tiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys", "block"), [(7, 5, 3), (4, 4, 2), (3, 8, 100), (1, 1, 1)])
def test_tiled_gradcheck(queries: int, keys: int, block: int) -> None:
    inputs = [drawn(2, 2, n, 3, dtype=torch.float64, seed=n).requires_grad_() for n in (queries, keys, keys)]
    assert torch.autograd.gradcheck(partial(tiled_attention, block=block), inputs)


def test_flashattention2_algorithm1() -> None:
    """2307.08691, algorithm 1: the kept number of a row is m + log(total), whatever the tiles."""
    q, k, v = (x.detach() for x in qkv(20, 30, 8, torch.float64))
    right = (q @ k.mT / math.sqrt(8)).logsumexp(dim=-1, keepdim=True)
    for block in (1, 7, 30, 64):
        out, lse = forward_tiles(q, k, v, block)
        torch.testing.assert_close(lse, right)
        torch.testing.assert_close(out, eq1(q, k, v))


def test_flashattention2_algorithm2() -> None:
    """2307.08691, algorithm 2, and the line it rests on: the sum of dP ∘ P over a row is that of dO ∘ O."""
    q, k, v = (x.detach().requires_grad_() for x in qkv(20, 30, 8, torch.float64))
    d_out = drawn(2, 3, 20, 8, dtype=torch.float64, seed=3)
    p = (q @ k.mT / math.sqrt(8)).softmax(dim=-1)
    out, d_p = p @ v, d_out @ v.mT
    torch.testing.assert_close((d_p * p).sum(dim=-1), (d_out * out).sum(dim=-1))
    d_s = p * (d_p - (d_out * out).sum(dim=-1, keepdim=True)) / math.sqrt(8)
    right = [d_s @ k, d_s.mT @ q, p.mT @ d_out]
    lse = (q @ k.mT / math.sqrt(8)).logsumexp(dim=-1, keepdim=True)
    for ours, theirs in zip(backward_tiles(q, k, v, out, lse, d_out, 7, (True, True, True)), right):
        torch.testing.assert_close(ours, theirs)


class Sizes(TorchDispatchMode):
    """Notes the size of every tensor that is made, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.products += op is torch.ops.aten.bmm.default
        for x in result if isinstance(result, tuple | list) else [result]:
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        return result


def test_tiled_never_holds_the_weights() -> None:
    """What is saved grows with L, not with L · S; nor is any tensor made on the way larger than the inputs or one tile."""

    def kept(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[list[int], int]:
        saved: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
        with hooks, Sizes() as sizes:
            with_gradients(way, qkv(256, 256, 8), torch.ones(2, 3, 256, 8))
        return saved, sizes.largest

    weights, tokens, tile = 6 * 256 * 256, 6 * 256, 6 * 48 * 48  # of the 2 x 3 heads together
    saved, largest = kept(WAYS["many tiles"])
    assert sum(saved) == 4 * tokens * 8 + tokens  # q, k, v, the output, and one number a row
    assert largest == max(tokens * 8, tile)
    saved, largest = kept(WAYS["naive"])  # here the check finds them
    assert max(saved) == largest == weights


def test_frozen_keys_cost_no_products() -> None:
    """Of the five products a tile in the backward, those for dk and dv are left out where neither is wanted."""
    counts = []
    for frozen in (False, True):
        q, k, v = qkv(48, 48, 8)
        out = WAYS["many tiles"](q, *((k.detach(), v.detach()) if frozen else (k, v)))
        with Sizes() as sizes:
            out.sum().backward()
        counts.append(sizes.products)
        assert q.grad is not None and (k.grad is None) == (v.grad is None) == frozen
    assert counts == [5, 3]


@pytest.mark.parametrize("frozen", [(0, 1), (1,), (0, 2)])
def test_only_the_gradients_that_are_asked_for(frozen: tuple[int, ...]) -> None:
    d_out = drawn(2, 3, 60, 8, dtype=torch.float64, seed=3)
    results = []
    for way in (eq1, WAYS["many tiles"]):
        inputs = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(qkv(60, 77, 8, torch.float64))]
        way(*inputs).backward(d_out)
        results.append([x.grad for x in inputs if x.requires_grad])
    for right, ours in zip(*results):
        torch.testing.assert_close(ours, right)


def test_tiled_lies_by_tokens() -> None:
    """So that the layer's transpose and flatten, and those of its backward, copy nothing."""
    q, k, v = qkv(60, 77, 8)
    out = attention(q, k, v, impl="tiled")
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.transpose(1, 2).is_contiguous()


def test_tiled_under_autocast_sums_in_fp32() -> None:
    inputs = [x.detach() for x in qkv(200, 200, 40)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = tiled_attention(*inputs)
        assert (inputs[0] @ inputs[1].mT).dtype == torch.bfloat16  # what a product is otherwise
    assert (ours - eq1(*(x.double() for x in inputs))).norm() / ours.norm() < 1e-5


# --- who decides -----------------------------------------------------------------------------------------------------


def test_auto_is_sdpa() -> None:
    inputs = [x.detach() for x in qkv(17, 77, 40)]
    assert torch.equal(attention(*inputs), attention(*inputs, impl="sdpa"))


def test_the_public_attention() -> None:
    assert minidiff.attention is attention
    with pytest.raises(SettingsError, match='"no such thing" is unknown; it is one of auto, naive, tiled, sdpa, triton'):
        attention(*qkv(1, 1, 4), impl="no such thing")


def test_triton_is_imported_only_when_used() -> None:
    """flash.py needs Triton, so nobody may import it at the top of a file."""
    for path in Path(minidiff.__file__).parent.rglob("*.py"):
        top = [ast.unparse(node) for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert path.name.startswith("flash") or not [line for line in top if "fast.flash" in line]
