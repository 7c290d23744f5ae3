"""Pictures and captions -> batches: what is drawn, from what, and that nothing else decides it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_sizes import TINY_VAE
from torch import Tensor

from minidiff.core.errors import DataError
from minidiff.core.vae import AutoencoderKL
from minidiff.trainer.dataset import Example, read_folder
from minidiff.trainer.latents import LatentData, crop, order
from minidiff.trainer.pictures import bucket_sizes, check_pictures
from minidiff.trainer.settings import FineTuneSettings


def picture(path: Path, size: tuple[int, int] = (40, 32), colour: tuple[int, int, int] = (255, 0, 0)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.PNG", "a.jpg"):
        picture(tmp_path / name)
    return tmp_path


def test_all_bad_pictures_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.png").write_bytes((folder / "b.PNG").read_bytes()[:60])
    picture(folder / "d.png", (20, 90))
    examples = read_folder(folder, "p")
    with pytest.raises(DataError) as error:
        check_pictures(examples, [(32, 32)], skip_bad=False)
    message = str(error.value)
    assert "2 of 4" in message and "c.png" in message and "d.png: 20 x 90 pixels are too few for --resolution 32" in message
    assert "--skip_bad" in message
    left = check_pictures(examples, [(32, 32)], skip_bad=True)
    assert [e.path.name for e in left] == ["a.jpg", "b.PNG"] and "c.png" in capsys.readouterr().err
    with pytest.raises(DataError, match="4 of 4"):
        check_pictures(examples, [(64, 64)], skip_bad=True)


def test_crop() -> None:
    wide = Image.new("RGB", (80, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (40, 0, 80, 40))  # left half red, right half blue
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    x = crop(wide, (20, 20))  # 40 x 20, its middle: half and half
    assert x.shape == (3, 20, 20) and torch.equal(x[:, 5, 2], red) and torch.equal(x[:, 5, 17], blue)
    assert torch.equal(crop(wide, (20, 20), flip=True), x.flip(-1))
    for place, colour in ((0.0, red), (1.0, blue)):
        assert torch.equal(crop(wide, (20, 20), (place, 0.3))[:, :, 3:17], colour[:, None, None].expand(3, 20, 14))
    for size in ((33, 77), (77, 33), (32, 32), (3, 200)):  # no rounding leaves it a pixel short
        assert crop(Image.new("RGB", size), (32, 32)).shape == (3, 32, 32)


def test_exif_rotation(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), (255, 0, 0))
    image.paste((0, 0, 255), (0, 16, 32, 32))  # red above blue, on its side in the file
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.rotate(180).save(tmp_path / "a.png", exif=exif)
    x = latents([Example(tmp_path / "a.png", "p")]).cache
    picture_upright = tmp_path / "b.png"
    image.save(picture_upright)
    y = latents([Example(picture_upright, "p")]).cache
    assert torch.equal(x[0, False]["mean"], y[0, False]["mean"])


def encode(prompts: list[str]) -> dict[str, Tensor]:
    """(B, 77, D) that tells which prompt it was."""
    return {"text": torch.tensor([float(len(p)) for p in prompts])[:, None, None].expand(-1, 77, 24)}


def latents(examples: list[Example], **changes: object) -> LatentData:
    torch.manual_seed(0)
    settings = replace(FineTuneSettings(train_batch_size=2, seed=3), **changes)  # type: ignore[arg-type]
    return LatentData(examples, settings, 32, AutoencoderKL(TINY_VAE).eval(), encode, 1000)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    return [Example(picture(tmp_path / f"{i}.png", colour=c), "p" * (i + 1)) for i, c in enumerate(colours)]


def test_sdxls_sizes_are_kept_with_each_latent(tmp_path: Path) -> None:
    """40 x 32 pixels become 20 x 16, of which 16 x 16 are seen. In a flipped picture, the left of the crop is its right."""
    data = latents([Example(picture(tmp_path / "a.png"), "a", size=(16, 16))], cache_latents=False)
    for place, flip, left in (((0.0, 0.0), False, 0), ((0.0, 0.0), True, 4), ((0.25, 1.0), False, 1), ((0.25, 1.0), True, 3)):
        assert data._encoded(0, place, flip)["sizes"].tolist() == [32, 40, 0, left, 16, 16]
    assert "sizes" not in data.batch(0, 0)  # without `size_width`


def test_batches_are_pure_and_cover_each_epoch(examples: list[Example]) -> None:
    data = latents(examples)
    batch = data.batch(4, 0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "latents": ((2, 4, 16, 16), torch.float32),
        "noise": ((2, 4, 16, 16), torch.float32),
        "t": ((2,), torch.int64),
        "text": ((2, 77, 24), torch.float32),
    }
    again = latents(examples).batch(4, 0)  # out of order, in another process: the same
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    lengths = [int(data.batch(step, 0)["text"][j, 0, 0]) for step in range(3) for j in range(2)]
    assert sorted(lengths[:3]) == sorted(lengths[3:]) == [1, 2, 3]
    assert len({tuple(order(3, 3, epoch)) for epoch in range(20)}) == 6


def test_micro_batches_are_the_big_batch(examples: list[Example]) -> None:
    big = latents(examples, train_batch_size=4).batch(2, 0)
    small = latents(examples, train_batch_size=2, gradient_accumulation_steps=2)
    parts = [small.batch(2, micro) for micro in (0, 1)]
    for key in big:
        assert torch.equal(big[key], torch.cat([part[key] for part in parts]))


def test_latents_are_drawn_from_the_posterior(examples: list[Example]) -> None:
    """z = mean + sigma eps, times the scaling factor; eps differs from sample to sample."""
    data = latents(examples[:1])
    z = torch.stack([data.sample(n)["latents"] for n in range(200)]) / TINY_VAE.scaling_factor
    mean, logvar = data.cache[0, False]["mean"], data.cache[0, False]["logvar"]
    noise = (z - mean) / (0.5 * logvar).exp()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    t = torch.stack([data.sample(n)["t"] for n in range(2000)])
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean() - 499.5) < 25


def test_caption_dropout_and_flips(examples: list[Example]) -> None:
    data = latents(examples, proportion_empty_prompts=0.25, random_flip=True)
    empty = [float(data.sample(n)["text"][0, 0]) == 0 for n in range(400)]
    assert 0.18 < sum(empty) / 400 < 0.32
    assert set(data.cache) == {(i, flip) for i in range(3) for flip in (False, True)}
    assert set(latents(examples).cache) == {(i, False) for i in range(3)}


def test_cached_or_not(examples: list[Example]) -> None:
    cached, fresh = latents(examples), latents(examples, cache_latents=False)
    assert torch.equal(cached.batch(1, 0)["latents"], fresh.batch(1, 0)["latents"])
    random = latents(examples, cache_latents=False, center_crop=False)
    assert torch.equal(random.batch(1, 0)["latents"], random.batch(1, 0)["latents"])


def test_facts_follow_content_not_place(examples: list[Example], tmp_path: Path) -> None:
    facts = latents(examples).facts
    assert facts["pictures"] == 3 and facts["side"] == 32
    moved = [Example(e.path.rename(tmp_path / f"moved{i}.png"), e.caption) for i, e in enumerate(examples)]
    assert latents(moved).facts == facts
    assert latents([*moved[:2], replace(moved[2], caption="other")]).facts != facts


def noisy(path: Path, size: tuple[int, int]) -> Path:
    """A picture in which every place differs."""
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(sum(size)), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_picture_that_breaks_meanwhile_is_named(tmp_path: Path) -> None:
    data = latents([Example(picture(tmp_path / "a.png"), "p")], cache_latents=False)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="a.png: not a picture"):
        data.batch(0, 0)


def test_repeats(examples: list[Example]) -> None:
    data = latents([replace(examples[0], repeats=3), *examples[1:]])
    assert data.samples_per_epoch == 5 and len(data.cache) == 3
    for epoch in range(2):
        assert sorted(data.draw(5 * epoch + turn).picture for turn in range(5)) == [0, 0, 0, 1, 2]


def test_buckets_make_batches_of_one_shape(tmp_path: Path) -> None:
    sides = [(64, 40), (70, 40), (40, 64), (40, 40), (41, 40)]
    examples = [Example(noisy(tmp_path / f"{i}.png", size), f"{i}") for i, size in enumerate(sides)]
    checked = check_pictures(examples, bucket_sizes(32, 4), False)
    assert [e.size for e in checked] == [(40, 24), (40, 24), (24, 40), (32, 32), (32, 32)]
    data = latents(checked, aspect_ratio_buckets=True)
    assert data.samples_per_epoch == 6
    shapes = [tuple(data.batch(step, 0)["latents"].shape) for step in range(3)]
    assert sorted(shapes) == [(2, 4, 12, 20), (2, 4, 16, 16), (2, 4, 20, 12)]
    assert {data.draw(number).picture for number in range(6)} == {0, 1, 2, 3, 4}
    with pytest.raises(DataError, match="4.png: 41 x 40 pixels are too few for --resolution 64"):
        check_pictures(examples[4:], bucket_sizes(64, 4), False)


def masked(folder: Path, mask: Image.Image) -> Example:
    noisy(folder / "a.png", (40, 32))
    mask.save(folder / "a.mask.png")
    return read_folder(folder, "p", masks=True)[0]


def test_masks_are_averaged_over_each_cell(tmp_path: Path) -> None:
    left = Image.new("L", (40, 32))
    left.paste(255, (0, 0, 19, 32))  # the crop begins at 4: 15 columns are white, 7 and a half cells
    example = masked(tmp_path, left)
    assert check_pictures([example], [(32, 32)], False) == [replace(example, size=(32, 32))]
    batch = latents([example], masked_loss=True).batch(0, 0)
    assert batch["mask"].shape == (2, 1, 16, 16)
    row = torch.tensor([1.0] * 7 + [0.5] + [0.0] * 8)
    assert torch.equal(batch["mask"], row.expand(2, 1, 16, 16))
    flipped = latents([example], masked_loss=True, random_flip=True)
    assert torch.equal(flipped.cache[0, True]["mask"], row.flip(0).expand(1, 16, 16))
    assert "mask" not in latents([example]).batch(0, 0)
    assert latents([replace(example, mask=None)], masked_loss=True).batch(0, 0)["mask"].min() == 1


def test_bad_masks(tmp_path: Path) -> None:
    black = masked(tmp_path, Image.new("L", (40, 32)))
    with pytest.raises(DataError, match="a.mask.png is black all over: there is nothing to learn"):
        check_pictures([black], [(32, 32)], False)
    small = masked(tmp_path, Image.new("L", (20, 16), 255))
    with pytest.raises(DataError, match=r"a.mask.png has another size than a.png: \(20, 16\), not \(40, 32\)"):
        check_pictures([small], [(32, 32)], False)


def test_noise_offset_guttenberg_2023(examples: list[Example]) -> None:
    """noise + offset * randn for each sample's channels: the shift is the same all over a channel."""
    plain, shifted = (latents(examples, noise_offset=offset).batch(0, 0)["noise"] for offset in (0.0, 0.1))
    shift = shifted - plain
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift))
    many = latents(examples, noise_offset=0.5, train_batch_size=100)
    means = many.batch(0, 0)["noise"].mean((2, 3))  # variance 1/256 of the noise itself, and that of the offset
    assert means.var().sqrt().item() == pytest.approx((1 / 256 + 0.25) ** 0.5, rel=0.1)


def test_ids_for_a_text_encoder_that_is_trained(examples: list[Example]) -> None:
    def ids(prompts: list[str]) -> dict[str, Tensor]:
        return {"ids": torch.tensor([[len(p)] * 77 for p in prompts])}

    settings = FineTuneSettings(train_batch_size=3, seed=3)
    batch = LatentData(examples, settings, 32, AutoencoderKL(TINY_VAE), ids, 1000).batch(0, 0)
    assert "text" not in batch and batch["ids"].shape == (3, 77) and batch["ids"].dtype == torch.int64
    assert sorted(batch["ids"][:, 0].tolist()) == [1, 2, 3]


def test_templates(examples: list[Example]) -> None:
    settings = FineTuneSettings(train_batch_size=2, seed=3)
    templates = [f"a {'very ' * k}good photo of {{}}" for k in range(20)]
    example = replace(examples[0], caption="<toy>", templates=tuple(templates))
    data = LatentData([example], settings, 32, AutoencoderKL(TINY_VAE), encode, 1000)
    prompts = [data.draw(number).prompt for number in range(400)]
    assert set(prompts) == {template.replace("{}", "<toy>") for template in templates}
    assert prompts[:50] == [data.draw(number).prompt for number in range(50)]
    assert data.fixed(0)["text"][0, 0] == len("a good photo of <toy>")


def test_facts_follow_masks_and_repeats(examples: list[Example]) -> None:
    facts = latents(examples).facts
    assert latents([replace(examples[0], repeats=2), *examples[1:]]).facts != facts
    assert latents([replace(examples[0], mask=examples[1].path), *examples[1:]]).facts != facts
