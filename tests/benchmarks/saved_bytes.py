"""How many bytes a forward pass keeps for its backward pass, counted exactly, without a GPU and without computing anything.

    with torch.device("meta"):
        ...build a model and its inputs...
    found = saved_bytes(lambda: model(x).sum(), parameters=model.parameters())
    found["mib"], found["by_shape"]

On the meta device tensors have shapes and no numbers. Autograd tells of each tensor that it saves
(`torch.autograd.graph.saved_tensors_hooks`); views share a storage, and a storage is counted once. Parameters are not
counted: they are there anyway. Two things are as on a GPU and not as on meta:

- `scaled_dot_product_attention` falls apart there into a softmax that keeps all L·S weights. It is counted as the flash
  kernel saves it: q, k, v, the output, and the log-sum-exp, fp32 for each query (FlashAttention-2, arXiv 2307.08691, 3.1).
- autocast does not know the device: `autocast="float16"` casts as CUDA's does (linear, conv and matmul to half; norms,
  softmax and losses to fp32), but for its cache of cast weights.

Not seen: what a custom autograd Function keeps in attributes of `ctx` instead of `save_for_backward`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TO_HALF = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.addmm, Tensor.matmul, Tensor.__matmul__}
TO_FLOAT = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss, torch.linalg.vector_norm}


def saved_bytes(
    call: Callable[[], object], parameters: Iterable[Tensor] = (), autocast: torch.dtype | None = None
) -> dict[str, Any]:
    """Run `call`, a forward pass; what autograd keeps until its result is gone.

    `bytes`, `mib`, `tensors` (distinct storages), `by_shape` ("(1, 320, 64, 64) float16" -> MiB, the largest first).
    """
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, Tensor] = {}  # storage -> a tensor on it: while it lives, its storage's address is not used again

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in own:
            kept.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), FlashOnMeta(), Autocast(autocast):
        result = call()
    sizes = [(tensor.untyped_storage().nbytes(), tensor) for tensor in kept.values()]
    by_shape: Counter[str] = Counter()
    for size, tensor in sizes:
        by_shape[f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"] += size
    total = sum(size for size, _ in sizes)
    del result
    largest = {name: round(size / 2**20, 2) for name, size in by_shape.most_common()}
    return {"bytes": total, "mib": total / 2**20, "tensors": len(sizes), "by_shape": largest}


class FlashOnMeta(TorchFunctionMode):
    """On meta, attention by a Function that saves what the flash kernel saves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args and args[0].is_meta:
            return _Flash.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Flash(torch.autograd.Function):
    """Shapes only: q (…, L, D), k and v (…, S, D) -> (…, L, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, queries, _ = q.shape  # the kernel writes (B, L, N, D), so that joining the heads copies nothing
        out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class Autocast(TorchFunctionMode):
    """What `torch.autocast("cuda", half)` casts; None casts nothing. (`kwargs` are torch's own, handed through.)"""

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = self.half if func in TO_HALF or func is F.scaled_dot_product_attention else torch.float32
        if self.half is not None and (dtype is self.half or func in TO_FLOAT):
            args = [cast(x, dtype) for x in args]
            kwargs = {name: cast(x, dtype) for name, x in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def flash_bytes(batch: int, heads: int, queries: int, keys: int, width: int, itemsize: int = 2) -> int:
    """By hand, for one attention: q and the output, k and v, and the log-sum-exp."""
    return math.prod((batch, heads)) * ((2 * queries + 2 * keys) * width * itemsize + 4 * queries)
