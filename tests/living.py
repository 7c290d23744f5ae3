"""The most memory that some work has in tensors at one time, exactly. Tests may use PyTorch's private parts for it."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def fullest_bytes(work: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """The largest sum of bytes of the tensors that `work` makes and that live at one time; `own` are not counted."""
    living = Living(own)
    with living, FusedAttention():
        work()
    return living.most


class Living(TorchDispatchMode):
    """Watches storages come and go: each operation's outputs when it returns, each storage when it is freed."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.take_in(tensor.untyped_storage())
        return out

    def take_in(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


class FusedAttention(TorchFunctionMode):
    """On `meta`, PyTorch's attention would save the weights of all heads."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **(kwargs or {}))
