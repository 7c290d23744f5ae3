"""Aspect-ratio buckets: their sizes, which a picture goes to, and the order of an epoch."""

import pytest

from minidiff.trainer.latents import bucketed_order
from minidiff.trainer.pictures import bucket_sizes, nearest_bucket

SD15 = bucket_sizes(512, 64)


def test_sizes_of_sd15():
    assert (512, 512) in SD15 and (640, 384) in SD15 and (384, 640) in SD15
    assert set(SD15) == {(high, wide) for wide, high in SD15}
    assert all(wide % 64 == high % 64 == 0 and 256 <= wide <= 1024 for wide, high in SD15)


@pytest.mark.parametrize("resolution, stride", [(512, 64), (768, 64), (128, 32), (32, 4)])
def test_area_is_about_that_of_the_square(resolution, stride):
    areas = [wide * high / resolution**2 for wide, high in bucket_sizes(resolution, stride)]
    assert max(areas) == 1.0 and min(areas) > 0.7


@pytest.mark.parametrize(
    "size, bucket",
    [
        ((3000, 3000), (512, 512)),
        ((3000, 2000), (640, 384)),  # 3:2 lies between 9:7 and 5:3, nearer to 5:3
        ((4000, 1000), (1024, 256)),
        ((512, 512), (512, 512)),
        ((600, 500), (576, 448)),  # 512 x 512 is nearer, but would enlarge it
        ((600, 400), None),
    ],
)
def test_nearest_that_enlarges_nothing(size, bucket):
    assert nearest_bucket(size, SD15) == bucket


SIZES = ((8, 8),) * 5 + ((4, 16),) * 3 + ((16, 4),)


def test_an_epoch_has_every_picture_in_batches_of_one_size():
    order = bucketed_order(SIZES, 2, 0, 0)
    assert len(order) == 2 * (3 + 2 + 1)
    batches = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert all(len({SIZES[i] for i in batch}) == 1 for batch in batches)
    assert set(order) == set(range(9))
    assert all(order.count(i) == 1 for i in order if SIZES.count(SIZES[i]) % 2 == 0)
    assert sum(order.count(i) - 1 for i in set(order)) == 3  # one filled up in each bucket


def test_order_is_a_pure_function_of_seed_and_epoch():
    orders = {epoch: bucketed_order(SIZES, 2, 0, epoch) for epoch in range(8)}
    bucketed_order.cache_clear()
    assert all(bucketed_order(SIZES, 2, 0, epoch) == orders[epoch] for epoch in reversed(range(8)))
    assert len({tuple(order) for order in orders.values()}) == 8
    assert bucketed_order(SIZES, 2, 1, 0) != orders[0]
