"""A large picture in overlapping tiles: the network sees one at a time, and memory stays that of a tile.

    tile     ▁▂▄▆████████▆▄▂▁
    the next            ▁▂▄▆████████▆▄▂▁      where two overlap, a tile's weight falls towards its own edge

For the U-Net, the tiles are combined at every step, so they agree on one picture: MultiDiffusion, arXiv 2302.08113, eq. 5. In
the autoencoder, the norms of a tile see only that tile; the overlap hides the difference.

Shapes: B pictures, C channels, H W the sides of the whole picture.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.core.guidance import UNetCall


def tiled(call: Callable[[Tensor], Tensor], tile: int, overlap: int, unit: int = 1) -> Callable[[Tensor], Tensor]:
    """`call`, (B, C, h, w) -> (B, C', s h, s w) for some scale s, applied to tiles of at most `tile` x `tile` cells.

    Neighbours share at least `overlap` cells and begin at multiples of `unit` (8 pixels for an encoder, whose s is 1/8). If
    the input is not larger than a tile, the result is that of `call`, to the bit.
    """

    def over_tiles(x: Tensor) -> Tensor:
        rows, columns = ([unit * i for i in starts(side // unit, tile // unit, overlap // unit)] for side in x.shape[-2:])
        if len(rows) == len(columns) == 1:
            return call(x)
        total, weight = torch.empty(0), torch.empty(0)
        for top in rows:
            for left in columns:
                part = call(x[..., top : top + tile, left : left + tile])
                h, w = part.shape[-2:]
                scale = w / min(tile, x.shape[-1])
                if not total.numel():
                    whole = [round(side * scale) for side in x.shape[-2:]]
                    total, weight = part.new_zeros(*part.shape[:-2], *whole), part.new_zeros(whole)
                ramp = tent(h, overlap * scale).outer(tent(w, overlap * scale)).to(part)
                y0, x0 = round(top * scale), round(left * scale)
                total[..., y0 : y0 + h, x0 : x0 + w] += part * ramp
                weight[y0 : y0 + h, x0 : x0 + w] += ramp
        return total / weight  # 2302.08113 eq. 5: the weighted mean of the tiles

    return over_tiles


def in_tiles(unet: UNetCall, tile: int) -> UNetCall:
    """The U-Net, made to see at most `tile` x `tile` latent cells at once; neighbours share a quarter of them."""
    return lambda x, t, *text: tiled(lambda part: unet(part, t, *text), tile, tile // 4)(x)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles begin along one side: as few as possible, evenly spaced, the last one at the end."""
    if length <= tile:
        return [0]
    gaps = -(-(length - tile) // (tile - overlap))
    return [round(i * (length - tile) / gaps) for i in range(gaps + 1)]


def tent(length: int, overlap: float) -> Tensor:
    """(length,): 1 in the middle, falling towards both edges over `overlap` cells; never 0, for the edges of the picture."""
    from_edge = torch.minimum(torch.arange(length), torch.arange(length).flip(0)) + 0.5
    return (from_edge / max(overlap, 1)).clamp(max=1)
