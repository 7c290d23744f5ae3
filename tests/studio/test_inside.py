"""Filmstrips, maps of attention: that they show what happened, and let go of the model behind them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minidiff.core import inject
from minidiff.core.attention import CrossAttention
from minidiff.core.errors import SettingsError
from minidiff.core.grids import SAMPLERS, Step
from minidiff.core.rng import normal
from minidiff.draw.images import to_pil, to_tensor
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.studio.inside import AttentionMaps, Film, attention_sheet, filmstrip, noise_share, over, words_of

DOG = "a photo of a red dog on the beach"
POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"


@pytest.fixture
def pipe(tiny_folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pocket() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(POCKET)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hooks(pipe: StableDiffusionPipeline) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


# --------------------------------------------------------------------------------------------------------- filmstrip


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_film_shows_what_the_network_saw(pipe: StableDiffusionPipeline, scale: float) -> None:
    """With DDIM each step starts where the one before ended, and the first at the noise of the seed."""
    steps: list[Step] = []
    with Film(pipe) as film:

        def callback(step: Step) -> None:
            steps.append(step)
            film(step)

        pipe(DOG, seed=3, num_inference_steps=4, guidance_scale=scale, sampler="ddim", callback=callback)
    noise = normal((4, 8, 8), 3, "latents")[None]
    for frame, step, before in zip(film.frames, steps, [noise, *(step.x for step in steps)], strict=False):
        assert frame.t == step.t and frame.x0.equal(step.x0) and frame.seen.equal(before)
    assert len(film.frames) == 4 and hooks(pipe) == 0


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_film_of_every_sampler_explains_x0(pipe: StableDiffusionPipeline, sampler: str) -> None:
    """Asked again at (seen, t), the U-Net's eps gives the step's x0 by DDIM eq. 9: what is shown belongs together."""
    with Film(pipe) as film:
        pipe(DOG, seed=3, num_inference_steps=3, guidance_scale=1.0, sampler=sampler, callback=film)
    frame, text = film.frames[0], pipe.encode_prompt([DOG])
    with torch.no_grad():
        eps = pipe.unet(frame.seen, frame.t, text)
    share = noise_share(pipe.schedule, frame.t)
    torch.testing.assert_close(frame.x0, (frame.seen - share * eps) / (1 - share**2) ** 0.5, atol=2e-2, rtol=2e-2)


def test_the_strip_has_a_pair_of_pictures_for_each_frame(pipe: StableDiffusionPipeline) -> None:
    with Film(pipe) as film:
        pipe([DOG, "a cat"], seed=3, num_inference_steps=6, callback=film)
    strip = filmstrip(film, DOG, count=3, tile=32)
    last = to_pil(pipe.decode(film.frames[-1].x0))[0]
    assert last.size == (16, 16) or last.resize((32, 32)).size == (32, 32)
    assert strip.width > 3 * 32 and strip.height > 2 * 32
    wider = filmstrip(film, DOG, count=100, tile=32)
    assert wider.width > strip.width + 2 * 32  # six frames: no more than there are


def test_noise_share_is_that_of_ddpm_eq4(pipe: StableDiffusionPipeline) -> None:
    a_bar = pipe.schedule.alphas_cumprod.double()
    assert noise_share(pipe.schedule, 500) == pytest.approx(float((1 - a_bar[500]).sqrt()))
    assert noise_share(pipe.schedule, 500.5) == pytest.approx(float((1 - (a_bar[500] + a_bar[501]) / 2).sqrt()))
    assert 0 < noise_share(pipe.schedule, 0) < noise_share(pipe.schedule, 999) <= 1


def test_a_film_without_pictures_is_told(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(SettingsError, match="a strip of 8 out of 0 steps"):
        filmstrip(Film(pipe))
    with Film(pipe) as film:
        pipe(DOG, seed=0, num_inference_steps=1, callback=film)
    with pytest.raises(SettingsError, match="strip of 0 out of 1"):
        filmstrip(film, count=0)


# --------------------------------------------------------------------------------------------------------- attention


def maps_of(pipe: StableDiffusionPipeline, steps: int = 1, scale: float = 1.0) -> AttentionMaps:
    with AttentionMaps(pipe) as maps:
        pipe(DOG, seed=0, num_inference_steps=steps, guidance_scale=scale, sampler="ddim")
    assert hooks(pipe) == 0
    return maps


def test_every_place_gives_all_of_its_attention(pipe: StableDiffusionPipeline) -> None:
    maps = maps_of(pipe, steps=3, scale=5.0)
    assert sorted(maps.sums) == [(4, 4), (8, 8)]
    mean = maps.mean()
    assert mean.shape == (77, 8, 8) and mean.min() >= 0
    torch.testing.assert_close(mean.sum(dim=0), torch.ones(8, 8), atol=1e-5, rtol=0)


def test_what_is_held_does_not_grow_with_the_steps(pipe: StableDiffusionPipeline) -> None:
    few, many = maps_of(pipe, 1), maps_of(pipe, 7)
    assert {k: v.shape for k, v in few.sums.items()} == {k: v.shape for k, v in many.sums.items()}
    assert many.count == 7 * few.count


def test_attention_eq1_is_what_the_layer_did(pipe: StableDiffusionPipeline) -> None:
    """With one head, the weights that the hook finds, times v, are the layer's own answer."""
    torch.manual_seed(0)
    layer = CrossAttention(16, 24, heads=1)
    maps = AttentionMaps(pipe)
    maps._size = (2, 3)
    x, text = torch.randn(1, 6, 16), torch.randn(1, 77, 24)
    with torch.no_grad():
        output = layer(x, text)
        maps._look(layer, (x, text), output)
        weights = maps.sums[2, 3].flatten(1).T[None]  # (1, L, S)
        torch.testing.assert_close(layer.to_out[0](weights @ layer.to_v(text)), output, atol=1e-5, rtol=1e-5)


def test_only_the_half_with_the_prompt_counts(pipe: StableDiffusionPipeline) -> None:
    """In the first step guidance has changed nothing yet but the batch."""
    torch.testing.assert_close(maps_of(pipe, 1, 5.0).mean(), maps_of(pipe, 1, 1.0).mean(), atol=1e-5, rtol=1e-4)


def test_adapters_are_seen(pipe: StableDiffusionPipeline) -> None:
    before = maps_of(pipe).mean()
    for layer in inject.inject(pipe.unet, rank=2, targets=("attn2.to_k",)).values():
        torch.nn.init.normal_(layer.lora_B["default"], std=0.3)
    beside = maps_of(pipe).mean()
    assert (beside - before).abs().max() > 1e-3
    pipe.fuse_lora()
    torch.testing.assert_close(maps_of(pipe).mean(), beside, atol=1e-5, rtol=1e-3)


def test_pictures_are_the_same_while_watched(pipe: StableDiffusionPipeline) -> None:
    plain = pipe(DOG, seed=0, num_inference_steps=2).images[0]
    with AttentionMaps(pipe), Film(pipe):
        assert pipe(DOG, seed=0, num_inference_steps=2).images[0].tobytes() == plain.tobytes()


def test_words_have_all_of_their_tokens(pipe: StableDiffusionPipeline) -> None:
    prompt = "a red dog, xyz!"
    words = words_of(pipe.tokenizer, prompt)
    assert [text for text, _ in words] == ["a", "red", "dog", "xyz"]
    positions = [i for _, positions in words for i in positions]
    ids = pipe.tokenizer(prompt).input_ids
    assert positions == list(range(1, len(ids) - 1))  # between the start mark and the end mark
    assert len(words[3][1]) > 1 and len(words[1][1]) == 1  # "xyz" is not in the vocabulary, "red" is


def test_new_words_have_the_tokens_of_their_vectors(pipe: StableDiffusionPipeline) -> None:
    words = words_of(pipe.tokenizer, "a <new> dog", {"<new>": [7, 8, 9]})
    assert words == [("a", [1]), ("<new>", [2, 3, 4]), ("dog", [5])]


def test_words_of_the_prompt_language(pipe: StableDiffusionPipeline) -> None:
    """Weights are no words; BREAK and a full chunk go on behind the marks of the next one, at 77 and 154."""
    words = words_of(pipe.tokenizer, "a (red:1.3) dog BREAK beach " + "red " * 80)
    assert [text for text, _ in words[:5]] == ["a", "red", "dog", "beach", "red"]
    assert [positions for _, positions in words[:5]] == [[1], [2], [3], [78], [79]]
    assert [positions for _, positions in words[77:80]] == [[77 + 75], [154 + 1], [154 + 2]]


def test_odd_sides_are_seen(pipe: StableDiffusionPipeline) -> None:
    """The U-Net's steps down have stride 2 and padding all around: an odd side is rounded up."""
    with AttentionMaps(pipe) as maps:
        pipe(DOG, seed=0, num_inference_steps=1, width=18, height=10)
    assert sorted(maps.sums) == [(3, 5), (5, 9)]


def test_heat_lies_where_the_map_is_high() -> None:
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0
    bright = np.asarray(over(Image.new("RGB", (32, 32), "gray"), heat).convert("L"), dtype=int)
    assert np.unravel_index(bright.argmax(), bright.shape)[0] // 8 == 1 and bright.argmax() % 32 // 8 == 2
    flat = np.asarray(over(Image.new("RGB", (8, 8), "gray"), torch.ones(4, 4)))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1  # the same everywhere: no pattern out of nothing


def test_tokens_of_a_word_are_added(pipe: StableDiffusionPipeline) -> None:
    maps = torch.rand(77, 4, 4, generator=torch.Generator().manual_seed(0))
    together = maps.clone()
    together[1] = maps[1] + maps[2]
    picture = Image.new("RGB", (16, 16), "gray")
    sheets = [attention_sheet(picture, *args) for args in ((maps, [("dog", [1, 2])]), (together, [("dog", [1])]))]
    assert sheets[0].tobytes() == sheets[1].tobytes()


def test_maps_that_cannot_be_made_are_told(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(SettingsError, match="has no words"):
        attention_sheet(Image.new("RGB", (8, 8)), torch.ones(77, 4, 4), [])
    tiled = SimpleNamespace(unet=pipe.unet, tile_size=64)
    compiled = SimpleNamespace(unet=SimpleNamespace(_compiled_call_impl=print), tile_size=None)
    for watch in (AttentionMaps, Film):
        with pytest.raises(SettingsError, match="tile_size shows the U-Net only parts"), watch(tiled):  # type: ignore[arg-type]
            pass
        with pytest.raises(SettingsError, match="leave --compile out"), watch(compiled):  # type: ignore[arg-type]
            pass


def test_the_word_dog_lies_on_the_dog(pocket: StableDiffusionPipeline) -> None:
    with AttentionMaps(pocket) as maps:
        (picture,) = pocket(DOG, seed=0, num_inference_steps=6, guidance_scale=5.0, sampler="dpm++_2m").images
    dog = dict(words_of(pocket.tokenizer, DOG))["dog"]
    mean = maps.mean()
    heat = F.interpolate(mean[dog].sum(0)[None, None], size=(128, 128), mode="bilinear")[0, 0]
    red, green, blue = to_tensor(picture)
    is_red = (red - torch.maximum(green, blue)) > 0.6
    assert is_red.float().mean() > 0.05 and heat[is_red].mean() > 2 * heat[~is_red].mean()
