"""A prompt's chunks, and the vectors of weighted tokens."""

import random
import warnings

import pytest
import torch
from tiny_text import PLACEHOLDERS, encoder, tiny_tokenizer, with_mean
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from minidiff.core.errors import SettingsError
from minidiff.core.text import TextEncoders, encode, token_ids, tokenize
from minidiff.draw.prompting import Part, Prompt, chunked, encode_prompts, parse_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("words"))


def encode_prompt(
    tokenizer: CLIPTokenizer,
    tower: CLIPTextModel,
    prompts: list[str] | list[Prompt],
    placeholders: dict[str, list[int]] = {},  # noqa: B006
    **options: int,
) -> Tensor:
    """Captions (`str`) by core's way, prompts by draw's; captions with options as prompts of one part."""
    if not options and all(isinstance(prompt, str) for prompt in prompts):
        return encode(tower, tokenize(tokenizer, prompts, placeholders))
    whole = [Prompt(((Part(p, 1.0),),)) if isinstance(p, str) else p for p in prompts]
    return encode_prompts(tokenizer, TextEncoders([tower], 0, 0), whole, placeholders, **options)[0]


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("", [0]),
        ("dog " * 75, [75]),
        ("dog " * 76, [75, 1]),
        ("dog " * 151, [75, 75, 1]),
        ("red BREAK dog", [1, 1]),
        ("red BREAK BREAK dog BREAK", [1, 0, 1]),
        ("BREAK dog", [0, 1]),
        ("BREAK", [0]),
        ("red " * 75 + "BREAK dog", [75, 1]),
        ("red " * 72 + "<dog> beach", [75, 1]),
        ("red " * 73 + "<dog> beach", [73, 4]),  # a word of three vectors stays together
    ],
)
def test_where_chunks_end(tokenizer: CLIPTokenizer, prompt: str, lengths: list[int]) -> None:
    assert [len(chunk) for chunk in chunked(tokenizer, parse_prompt(prompt), PLACEHOLDERS)] == lengths


@pytest.mark.parametrize("seed", range(20))
def test_chunks_lose_nothing(tokenizer: CLIPTokenizer, seed: int) -> None:
    rng = random.Random(seed)
    prompt = " ".join(rng.choices(["red", "(dog:1.3)", ",", "[beach]", "<dog>"], [6, 1, 1, 1, 1], k=rng.randint(60, 400)))
    parsed = parse_prompt(prompt)
    chunks = chunked(tokenizer, parsed, PLACEHOLDERS)
    want = [(index, part.weight) for part in parsed.sections[0] for index in token_ids(tokenizer, part.text, PLACEHOLDERS)]
    assert [token for chunk in chunks for token in chunk] == want
    for chunk in chunks:
        ids = [index for index, _ in chunk]
        assert len(ids) <= 75 and ids.count(1001) == ids.count(1002) == ids.count(1003)
        assert all(ids[i + 1 : i + 3] == [1002, 1003] for i, index in enumerate(ids) if index == 1001)


def test_placeholders_work_inside_weights(tokenizer: CLIPTokenizer) -> None:
    (chunk,) = chunked(tokenizer, parse_prompt("a (<DOG>:1.3)'s [beach]"), PLACEHOLDERS)
    assert chunk[1:4] == [(1001, 1.3), (1002, 1.3), (1003, 1.3)]
    assert [weight for _, weight in chunk[4:]] == [1.0] * (len(chunk) - 5) + [1 / 1.1]


def test_a_hundred_chunks_are_the_limit(tokenizer: CLIPTokenizer) -> None:
    assert len(chunked(tokenizer, parse_prompt("dog BREAK " * 99 + "dog"))) == 100
    with pytest.raises(SettingsError, match="fills 101 chunks of 75 tokens; 100 is the limit"):
        chunked(tokenizer, parse_prompt("dog BREAK " * 100 + "dog"))


def parsed(*prompts: str) -> list[Prompt]:
    return [parse_prompt(prompt) for prompt in prompts]


PLAIN = ["", "a red dog on the beach", "dog " * 75, "a photo, of (nothing"]


def test_a_plain_prompt_has_the_bits_of_a_caption(tokenizer: CLIPTokenizer) -> None:
    """One path once: ids through the tower. Captions and plain prompts still give its bits, alone and together."""
    tower = encoder(tokenizer)
    plain = [Prompt(((Part(text, 1.0),),)) for text in PLAIN]
    together = tower(input_ids=tokenize(tokenizer, PLAIN)).last_hidden_state
    assert torch.equal(encode_prompt(tokenizer, tower, PLAIN), together)
    assert torch.equal(encode_prompt(tokenizer, tower, plain), together)
    assert torch.equal(encode_prompt(tokenizer, tower, [*PLAIN[:2], *plain[2:]]), together)
    for text, prompt in zip(PLAIN, plain):
        alone = tower(input_ids=tokenize(tokenizer, [text])).last_hidden_state
        assert torch.equal(encode_prompt(tokenizer, tower, [text]), alone)
        assert torch.equal(encode_prompt(tokenizer, tower, [prompt]), alone)


def test_captions_are_never_parsed(tokenizer: CLIPTokenizer) -> None:
    tower = encoder(tokenizer)
    caption = "a (red:1.3) dog BREAK [beach] <lora:x:1>"
    want = tower(input_ids=tokenize(tokenizer, [caption])).last_hidden_state
    assert torch.equal(encode_prompt(tokenizer, tower, [caption]), want)


def test_a_caption_is_cut_off_and_a_prompt_is_not(tokenizer: CLIPTokenizer) -> None:
    tower, text = encoder(tokenizer), "dog " * 75 + "red beach"
    with pytest.warns(UserWarning, match='CLIP reads 75; cut off: "red beach"'):
        assert encode_prompt(tokenizer, tower, [text]).shape == (1, 77, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long = encode_prompt(tokenizer, tower, parsed(text))
    both = encode_prompt(tokenizer, tower, ["dog " * 75, "red beach"])
    torch.testing.assert_close(long, both.reshape(1, 154, 16))


def test_chunks_are_encoded_alone_and_laid_side_by_side(tokenizer: CLIPTokenizer) -> None:
    tower = encoder(tokenizer)
    text = encode_prompt(tokenizer, tower, parsed("a red dog BREAK on the beach BREAK", "a photo"), chunks=3)
    alone = [encode_prompt(tokenizer, tower, [words])[0] for words in ("a red dog", "on the beach", "", "a photo", "", "")]
    assert text.shape == (2, 231, 16)
    torch.testing.assert_close(text, torch.stack([torch.cat(alone[:3]), torch.cat(alone[3:])]))
    assert encode_prompt(tokenizer, tower, parsed("a BREAK b", "c"), chunks=1).shape == (2, 154, 16)


def test_prompt_weights_of_a1111(tokenizer: CLIPTokenizer) -> None:
    """z' = z w, z'' = z' mean(z) / mean(z'); the marks and the filling weigh 1."""
    tower = with_mean(encoder(tokenizer))
    z = encode_prompt(tokenizer, tower, ["a red dog on the beach"])[0]
    weights = torch.ones(77)
    weights[1:4], weights[6] = 1.4, 0.5
    want = z * weights[:, None]
    want = want * (z.mean() / want.mean())
    got = encode_prompt(tokenizer, tower, parsed("(a red dog:1.4) on the (beach:0.5)"))[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.mean(), z.mean())
    assert not torch.allclose(got[2], z[2], rtol=0.05) and not torch.equal(got[0], z[0])


def test_the_mean_is_that_of_each_chunk(tokenizer: CLIPTokenizer) -> None:
    """A chunk's states depend on no other chunk and on no other prompt."""
    tower = with_mean(encoder(tokenizer))
    rows = encode_prompt(tokenizer, tower, parsed("a (red:1.5) dog BREAK on the (beach:0.7)", "a photo"))
    for chunk, prompt in zip(rows.reshape(4, 77, 16), ("a (red:1.5) dog", "on the (beach:0.7)", "a photo", "")):
        torch.testing.assert_close(chunk, encode_prompt(tokenizer, tower, parsed(prompt))[0])


@pytest.mark.parametrize(("mean", "weight"), [(0.0, 1.4), (1e-4, 1.4), (0.05, -20.0), (-0.3, -100.0)])
def test_a_mean_that_is_chance_is_not_restored(tokenizer: CLIPTokenizer, mean: float, weight: float) -> None:
    """The quotient of such means can be anything; all states would be blown up or turned around, the marks' too."""
    tower = with_mean(encoder(tokenizer), mean)
    z = encode_prompt(tokenizer, tower, ["a red dog"])[0]
    got = encode_prompt(tokenizer, tower, [Prompt(((Part("a ", 1.0), Part("red dog", weight)),))])[0]
    torch.testing.assert_close(got, torch.cat([z[:2], z[2:4] * weight, z[4:]]))


def test_gradients_flow_through_chunks_and_weights(tokenizer: CLIPTokenizer) -> None:
    from minidiff.core.textual_inversion import inject, placeholders

    tower = with_mean(encoder(tokenizer)).requires_grad_(False)
    row = inject(tower).add("<dog>", torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    prompts = parsed("a red BREAK a (<dog>:1.3) on the beach")
    encode_prompt(tokenizer, tower, prompts, placeholders(tower))[:, 77:].square().sum().backward()
    assert row.grad is not None and bool((row.grad != 0).all())


def test_the_dtype_is_the_encoders(tokenizer: CLIPTokenizer) -> None:
    tower = with_mean(encoder(tokenizer))
    fine = encode_prompt(tokenizer, tower, parsed("a (dog:1.3) BREAK b"))
    rough = encode_prompt(tokenizer, tower.bfloat16(), parsed("a (dog:1.3) BREAK b"))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), fine, rtol=0.1, atol=0.1)


def test_clip_skip_goes_with_weights_and_chunks(tokenizer: CLIPTokenizer) -> None:
    tower = with_mean(encoder(tokenizer))
    got = encode_prompt(tokenizer, tower, parsed("a (dog:1.5) BREAK b"), clip_skip=1)
    first, second = (encode_prompt(tokenizer, tower, [words], clip_skip=1)[0] for words in ("a dog", "b"))
    torch.testing.assert_close(got[0, 77:], second)
    torch.testing.assert_close(got[0, :77].mean(), first.mean())
    torch.testing.assert_close(got[0, 2] / got[0, 1], 1.5 * first[2] / first[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clip_skip", [-1, 2, 12, 1.0])
def test_a_clip_skip_out_of_range_names_both_numberings(tokenizer: CLIPTokenizer, clip_skip: int) -> None:
    with pytest.raises(SettingsError, match=r"has 2 layers: 0 to 1\..*one higher: 1 to 2"):
        encode_prompt(tokenizer, encoder(tokenizer), ["a"], clip_skip=clip_skip)
