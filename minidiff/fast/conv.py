"""Convolutions and linear layers on a CPU, computed faster than PyTorch does. Other devices use PyTorch's own kernels.

    B batch   C channels in   O channels out   H W height and width   L = H·W cells   k side of the kernel   T tiles

oneDNN, which computes PyTorch's convolutions, needs the weights in its own order, and rearranges them at every call. For a
small picture that takes longer than the convolution: at the 8 x 8 cells of SD 1.5's deepest level three times as long. And for
a large picture, there are methods with fewer than 9 multiplications for each weight and cell:

    direct     oneDNN; the weights are rearranged once, if they may be cached
    product    W (O, C·k²) times the patches under the kernel (C·k², L): for kernels of 1 x 1, whose patches are the cells,
               and for many weights and few cells
    winograd   4 x 4 cells at a time with 36 multiplications instead of 144: for kernels of 3 x 3 over 32 x 32 cells and more;
               2 x 2 cells with 16 instead of 36 over 16 x 16, if the transformed weights may be cached

The method depends only on the shapes and on whether copies may be cached (frozen.py), never on a clock. So the same run gives
the same numbers every time. All three give F.conv2d's numbers up to rounding: 5e-6 of the largest number.
"""

import platform
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.core.lora import without_autocast

HALF = (torch.float16, torch.bfloat16)
Cache = dict[str, tuple[object, Tensor]]  # purpose -> the state of the weight, and the copy that was made from it

MANY = 2**20  # weights: fewer are put in order in no time, and a copy of them costs little memory
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # and infinity: six that round little (Barabasz et al., arXiv 1803.10986)
AT_ONCE = 3 * 2**20  # numbers that winograd transforms together: 12 MB, which stay in a processor's cache


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Like F.linear, but the weight may have a smaller dtype than x. No gradients. (In fp32, PyTorch is fastest.)"""
    if not slow_half(x := as_autocast(x)):
        return F.linear(x, weight.to(x.dtype), bias)
    with without_autocast(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, cache: Cache | None = None) -> Tensor:
    """F.conv2d for square kernels: x (B, C, H, W), weight (O, C, k, k), bias (O,) -> (B, O, H', W'). No gradients."""
    x = as_autocast(x)
    if x.device.type != "cpu":
        return F.conv2d(x, weight.to(x.dtype), bias, stride, padding)
    dtype = torch.float32 if slow_half(x) else x.dtype
    method = direct if dtype in HALF else METHODS[method_of(x.shape, weight, stride, padding, cache is not None)]
    with without_autocast(x):
        bias = None if bias is None else bias.to(dtype)
        return method(x.to(dtype), weight, bias, stride, padding, cache).to(x.dtype)


def conv2d_backward(d: Tensor, shape: torch.Size, weight: Tensor, stride: int, padding: int, cache: Cache | None) -> Tensor:
    """The gradient of `conv2d`'s x, whose shape (B, C, H, W) is given, from the gradient d (B, O, H', W') of its output."""
    kernel, method = weight.shape[-1], method_of(shape, weight, stride, padding, cache is not None)
    turns = stride == 1 and 2 * padding == kernel - 1  # then this is a convolution, too, with each kernel turned by 180°
    unfolds = method == "product" and kernel > 1
    if d.device.type != "cpu" or not (unfolds or (turns and (method != "direct" or cache is not None))):
        x, rest = d.new_empty(shape), ((stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), 1, (True, False, False))
        return torch.ops.aten.convolution_backward(d, x, weight.to(d.dtype), None, *rest)[0]
    if unfolds:
        wide = torch.float32 if slow_half(d) else d.dtype
        patches = weight.to(wide).flatten(1).mT @ d.to(wide).flatten(2)  # (B, C·k², L)
        return F.fold(patches, shape[-2:], kernel, padding=padding, stride=stride).to(d.dtype)
    across = weight.transpose(0, 1)
    turned = across if kernel == 1 else cached(cache, "turned", weight, lambda: across.flip(-1, -2))
    return conv2d(d, turned, None, stride, padding, cache)


def method_of(shape: torch.Size, weight: Tensor, stride: int, padding: int, may_cache: bool) -> str:
    """direct, product or winograd, for x of `shape` (B, C, H, W) and weight (O, C, k, k), whose copies may be cached or not."""
    out_channels, in_channels, kernel, _ = weight.shape
    cells = shape[-2] * shape[-1]
    if (kernel, stride, padding) == (1, 1, 0):
        return "product"
    many = weight.numel() > MANY
    tiles_pay = cells >= 1024 or (cells >= 256 and many and may_cache)
    if (kernel, stride, padding) == (3, 1, 1) and tiles_pay and min(in_channels, out_channels) >= 64:
        return "winograd"
    few = shape[0] * cells <= out_channels * stride**2
    return "product" if kernel > 1 and many and few else "direct"


def cached(cache: Cache | None, purpose: str, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """make(), or its result for the same weight before. A weight that was changed in place or replaced is noticed."""
    if cache is None:
        return make()
    state = weight.data_ptr(), weight._version
    found = cache.get(purpose)
    if found is None or found[0] != state:
        found = cache[purpose] = state, make()
    return found[1]


# --- the three methods, for x (B, C, H, W), weight (O, C, k, k) of any dtype, and bias (O,) of that of x ----------------------


def direct(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, cache: Cache | None) -> Tensor:
    """oneDNN's convolution; with a cache, the weights are rearranged once."""
    if cache is None or x.dtype != torch.float32 or not can_pack():
        return F.conv2d(x, weight.to(x.dtype), bias, stride, padding)
    sizes = ((padding,) * 2, (stride,) * 2, (1, 1), 1)
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    packed = cached(cache, "packed", weight, lambda: reorder(weight.to(x.dtype), *sizes, x.shape))
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *sizes, "none", [], "")


@cache
def can_pack() -> bool:
    """Does this PyTorch have the undocumented functions that torch.compile uses for convolutions on a CPU?"""
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, cache: Cache | None) -> Tensor:
    """A convolution is a matrix product once the patches that the kernel sees are columns (Chellapilla et al. 2006)."""
    weight, kernel = weight.to(x.dtype), weight.shape[-1]
    if kernel == 1 and x.stride(1) == 1:  # a patch is a cell, and its channels are neighbours in memory
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    sides = [(side + 2 * padding - kernel) // stride + 1 for side in x.shape[-2:]]
    patches = x.flatten(2) if kernel == 1 else F.unfold(x, kernel, padding=padding, stride=stride)  # (B, C·k², L)
    matrix = weight.flatten(1).expand(len(x), -1, -1)
    y = torch.bmm(matrix, patches) if bias is None else torch.baddbmm(bias[:, None], matrix, patches)  # (B, O, L)
    return y.unflatten(-1, sides)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, cache: Cache | None) -> Tensor:
    """F(m x m, 3 x 3) of Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), eq. 8.

        Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A        Y: a tile of m x m, d: the n x n cells it is made from, g: the kernel

    n = m + 2. The sum over channels goes inside the brackets, and ⊙ becomes n² products of matrices, (T, C) times (C, O).
    """
    (batch, channels, height, width), out_channels = x.shape, len(weight)
    m = 4 if height * width >= 1024 else 2
    n, down, across = m + 2, -(-height // m), -(-width // m)  # the last tiles may be larger than what is left
    AA, BB, GG = transforms(m, x.dtype)

    def transformed() -> Tensor:
        """G g Gᵀ for every kernel: (n², C, O)."""
        kernels = weight.to(x.dtype).permute(2, 3, 1, 0).reshape(9, -1)
        return (GG @ kernels).view(-1, channels, out_channels)

    U = cached(cache, f"winograd {m}", weight, transformed)
    padded = x.new_zeros(batch, down * m + 2, across * m + 2, channels)
    padded[:, 1 : height + 1, 1 : width + 1] = x.movedim(1, -1)
    windows = padded.unfold(1, n, m).unfold(2, n, m).permute(4, 5, 0, 1, 2, 3)  # (n, n, B, down, across, C)
    y = x.new_empty(batch, down, m, across, m, out_channels)
    tiles = y.permute(2, 4, 0, 1, 3, 5)  # (m, m, B, down, across, O)

    rows = max(1, AT_ONCE // (n * n * batch * across * max(channels, out_channels)))
    for i in range(0, down, rows):
        V = (BB @ windows[:, :, :, i : i + rows].reshape(n * n, -1)).view(n * n, -1, channels)
        Y = (AA @ torch.bmm(V, U).view(n * n, -1)).view(tiles[:, :, :, i : i + rows].shape)
        tiles[:, :, :, i : i + rows] = Y if bias is None else Y.add_(bias)
    return y.view(batch, down * m, across * m, out_channels)[:, :height, :width].movedim(-1, 1)


@cache
def transforms(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Aᵀ ⊗ Aᵀ (m², n²), Bᵀ ⊗ Bᵀ (n², n²) and G ⊗ G (n², 9): each does both axes of eq. 8 at once.

    A product of polynomials is a product of their values at enough points (Toom and Cook), and a convolution is the same, read
    the other way. G and Aᵀ evaluate polynomials with 3 and with m coefficients, and Bᵀ interpolates one with n.
    """

    def values(coefficients: int) -> Tensor:
        """At n - 1 points and infinity, (n, coefficients); at infinity the value is the last coefficient."""
        powers = [[point**i for i in range(coefficients)] for point in POINTS[: m + 1]]
        return torch.tensor([*powers, [0.0] * (coefficients - 1) + [1.0]], dtype=torch.float64)

    matrices = values(m).mT, torch.linalg.inv(values(m + 2)).mT, values(3)
    AA, BB, GG = (torch.kron(matrix, matrix).to(dtype) for matrix in matrices)
    return AA, BB, GG


METHODS = {"direct": direct, "product": product, "winograd": winograd}

# --- dtypes --------------------------------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """fp16 and bf16 as fp32, in which norms are computed, as under autocast."""
    return x.float() if x.dtype in HALF else x


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast, if it is on, gives the inputs of a product. Autocast does not reach into a Function."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if on else x


def slow_half(x: Tensor) -> bool:
    """Is x in half precision on an x86 without vector instructions for it? There bf16 convolutions take 100 times as long."""
    if x.dtype not in HALF or x.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
