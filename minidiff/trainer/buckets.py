"""Aspect-ratio buckets: pictures are trained in their own shape, and each batch holds one shape alone.

A bucket is a size that the U-Net can take (sides are multiples of its stride) with about as many pixels as a square of
`resolution`, never more: so every batch needs about the same memory.

Shapes: sizes are (width, height) in pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from minidiff.core.rng import generator

Size = tuple[int, int]


def bucket_sizes(resolution: int, stride: int) -> list[Size]:
    """All buckets from a half to twice `resolution` on a side, a multiple of `stride`; the square is one of them."""
    shortest = math.ceil(resolution / 2 / stride) * stride
    sizes = set()
    for width in range(shortest, resolution + 1, stride):
        height = resolution**2 // width // stride * stride
        sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size | None:
    """Of the buckets that a picture of `size` fills without being enlarged, the nearest in shape; None if it fills none."""
    width, height = size
    filled = [b for b in buckets if b[0] <= width and b[1] <= height]
    return min(filled, key=lambda b: abs(math.log(b[0] / b[1]) - math.log(width / height)), default=None)


@lru_cache(maxsize=16)
def bucketed_order(sizes: tuple[Size, ...], batch_size: int, seed: int, epoch: int) -> list[int]:
    """In which order an epoch goes through pictures of these sizes: batch after batch, each of one size alone.

    Each picture comes once. What a bucket's last batch lacks is filled with pictures of that bucket, some a second time.
    """
    draws = generator(seed, "bucketed order", epoch)
    batches = []
    for bucket in sorted(set(sizes)):
        members = [i for i, size in enumerate(sizes) if size == bucket]
        shuffled = [members[k] for k in torch.randperm(len(members), generator=draws).tolist()]
        for first in range(0, len(shuffled), batch_size):
            batches.append([shuffled[k % len(shuffled)] for k in range(first, first + batch_size)])
    return [i for k in torch.randperm(len(batches), generator=draws).tolist() for i in batches[k]]
