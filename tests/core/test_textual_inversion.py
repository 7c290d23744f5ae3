"""A new word in a frozen text encoder: what it changes, what it leaves alone, and what may be a word."""

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from minidiff.core.errors import AdapterError
from minidiff.core.text import encode, tokenize
from minidiff.core.textual_inversion import (
    ExtendedEmbedding,
    eject,
    initial_vectors,
    inject,
    placeholders,
)
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.text_files import load_tokenizer
from minidiff.files.word_file import check_word
from minidiff.trainer.recipes import TEMPLATES

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> StableDiffusionPipeline:
    """For reading only."""
    return StableDiffusionPipeline.from_pretrained(tiny_folder)


@pytest.fixture
def tokenizer(base: StableDiffusionPipeline) -> CLIPTokenizer:
    return base.tokenizer


@pytest.fixture
def encoder(base: StableDiffusionPipeline) -> CLIPTextModel:
    """For changing."""
    return deepcopy(base.text_encoder)


def hidden(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, *prompts: str) -> Tensor:
    return encode(encoder, tokenize(tokenizer, list(prompts), placeholders(encoder)))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["dog", "red dog", "red dog on the beach"])
@pytest.mark.parametrize("sentence", ["a photo of a {}", "{}", "a {} in the snow, {}!"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_known_words_are_these_words_to_the_bit(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, words: str, sentence: str, dtype: torch.dtype
) -> None:
    encoder.to(dtype)
    want = hidden(tokenizer, encoder, sentence.format(*[words] * 2))
    count = len(tokenizer(words, add_special_tokens=False).input_ids)
    row = inject(encoder).add("<it>", initial_vectors(tokenizer, encoder, words, count))
    got = hidden(tokenizer, encoder, sentence.format(*["<IT>"] * 2))
    assert row.dtype == torch.float32 and got.dtype == dtype
    assert torch.equal(got, want)


def test_prompts_without_the_word_are_what_they_were(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    prompts = ["a photo of a red dog", "", "asks sks"]
    want = hidden(tokenizer, encoder, *prompts)
    inject(encoder)
    assert torch.equal(hidden(tokenizer, encoder, *prompts), want)
    inject(encoder).add("sksx", random(2, 24))
    assert torch.equal(hidden(tokenizer, encoder, *prompts), want)


def test_several_words_keep_apart(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    first = initial_vectors(tokenizer, encoder, "red dog", 2)
    second = initial_vectors(tokenizer, encoder, "beach", 1)
    want = hidden(tokenizer, encoder, "a red dog on the beach")
    V = encoder.config.vocab_size
    inject(encoder).add("<v1.5>", first)
    inject(encoder).add("keys", second)  # either name would be refused as that of a Parameter
    assert placeholders(encoder) == {"<v1.5>": [V, V + 1], "keys": [V + 2]}
    assert torch.equal(hidden(tokenizer, encoder, "a <v1.5> on the keys"), want)
    rows = dict(zip(placeholders(encoder), inject(encoder).vectors))
    assert list(rows) == ["<v1.5>", "keys"] and torch.equal(rows["keys"], second)


def test_eject_gives_the_same_layer_back(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    table, names = encoder.get_input_embeddings(), list(encoder.state_dict())
    bits = table.weight.clone()
    extended = inject(encoder)
    assert inject(encoder) is extended and encoder.get_input_embeddings() is extended
    inject(encoder).add("<it>", random(3, 24))
    eject(encoder)
    assert encoder.get_input_embeddings() is table and torch.equal(table.weight, bits)
    assert list(encoder.state_dict()) == names and placeholders(encoder) == {}
    eject(encoder)
    assert encoder.get_input_embeddings() is table


# --- learning ----------------------------------------------------------------------------------------------------------


def test_the_old_rows_are_bit_identical_after_ten_adamw_steps(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    """Also with weight decay, and although the optimizer gets all that asks for gradients."""
    encoder.requires_grad_(False)
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    row = inject(encoder).add("<it>", initial_vectors(tokenizer, encoder, "dog", 2))
    learned = [p for p in encoder.parameters() if p.requires_grad]
    assert len(learned) == 1 and learned[0] is row
    start, target = row.detach().clone(), random(1, 77, 24)
    optimizer = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        (hidden(tokenizer, encoder, "a photo of <it>") - target).square().mean().backward()
        optimizer.step()
    assert (row != start).all() and not torch.equal(row[0], row[1])  # copies at other places of the prompt part
    eject(encoder)
    after = dict(encoder.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())


def test_eq2(base: StableDiffusionPipeline, encoder: CLIPTextModel) -> None:
    """v* = arg min of the denoising loss over v alone: gradient steps on v bring it down, and v gets all of the gradient."""
    latents, noise, t = random(4, 4, 8, 8), random(4, 4, 8, 8), torch.tensor([50, 300, 600, 900])
    start = initial_vectors(base.tokenizer, encoder, "dog", 1)
    v = inject(encoder).add("<it>", start)
    optimizer = torch.optim.AdamW([v], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        text = hidden(base.tokenizer, encoder, *["a photo of <it>"] * 4)
        loss = (noise - base.unet(0.8 * latents + 0.6 * noise, t, text)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for model in (base.unet, encoder) for p in model.parameters() if p is not v)


def test_gradient_is_that_of_an_enlarged_table(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    base = encoder.get_input_embeddings()
    assert isinstance(base, nn.Embedding)
    extended = ExtendedEmbedding(base)
    row = extended.add("<it>", random(2, 24))
    table = torch.cat([base.weight.detach(), row.detach()]).requires_grad_()
    V = base.num_embeddings
    ids, weight = torch.tensor([[0, V, V + 1, 5, V, 0]]), random(1, 6, 24)
    (extended(ids) * weight).sum().backward()
    (table[ids] * weight).sum().backward()
    assert torch.equal(row.grad, table.grad[V:])


# --- where it begins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "count", "want"),
    [("dog", 1, "dog"), ("dog", 3, "dog dog dog"), ("red dog", 2, "red dog"), ("red dog", 5, "red dog red dog red")],
)
def test_initial_vectors_are_copied_in_turn(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, words: str, count: int, want: str
) -> None:
    vectors = initial_vectors(tokenizer, encoder.half(), words, count)
    table = encoder.get_input_embeddings().weight
    assert torch.equal(vectors, table[tokenizer(want, add_special_tokens=False).input_ids].float())
    assert vectors.dtype == torch.float32 and not vectors.requires_grad
    inject(encoder).add("<it>", vectors)
    assert torch.equal(initial_vectors(tokenizer, encoder, words, count), vectors)


def test_too_many_initial_words_are_named(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    with pytest.raises(AdapterError, match='"red dog beach" has 3 tokens for 1 vectors; take a word .* or more vectors'):
        initial_vectors(tokenizer, encoder, "red dog beach", 1)
    with pytest.raises(AdapterError, match='"  " has 0 tokens for 1 vectors; take a word such as "dog"'):
        initial_vectors(tokenizer, encoder, "  ", 1)


# --- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["<dog>", "<my-dog>", "midjourney-style", "zzyzx", "sks2", "<V1.5>", "狗狗"])
def test_any_word_of_ones_own_will_do(tokenizer: CLIPTokenizer, word: str) -> None:
    check_word(tokenizer, word, {"<cat>": [1]})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", '"" is empty. Take a word of your own'),
        ("<my dog>", '"<my dog>" has a space in it; a new word is one word'),
        ("two\nlines", "has a space in it"),
        ("dog", '"dog" is in the model\'s vocabulary already, and its meaning would be overwritten. Take a word'),
        ("DOG", '"DOG" is in the model\'s vocabulary already'),
        ("sks", "vocabulary already"),
        ("x", "vocabulary already"),
        ("<|endoftext|>", "vocabulary already"),
        ("<Cat>", '"<Cat>": there is a new word "<cat>" already, and a prompt could not tell them apart. Take'),
        ("<\u200bdog>", "'<\\u200bdog>' has a character that nobody can see. Take a word of your own"),
        ("<\x1b[2Jdog>", "'<\\x1b[2Jdog>' has a character that nobody can see"),
        ("__metadata__", '"__metadata__" means something else in files, so that the word could not be read again'),
        ("emb_params", '"emb_params" means something else in files'),
        ("clip_l", '"clip_l" means something else in files'),
        ("clip_g", '"clip_g" means something else in files'),
        ("my.weight", '"my.weight" means something else in files'),
        ("my.bias", '"my.bias" means something else in files'),
        ("lora_unet_dog", '"lora_unet_dog" means something else in files'),
    ],
)
def test_not_every_word_will_do(tokenizer: CLIPTokenizer, word: str, message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)):
        check_word(tokenizer, word, {"<cat>": [1]})


def test_a_piece_of_a_word_will_not_do(tokenizer: CLIPTokenizer) -> None:
    """FORMATS 3.5: "fluffy" is a piece in CLIP's vocabulary; diffusers could not add it, and would train the piece."""
    pieces = [t for t in tokenizer.get_vocab() if t.isascii() and t.isalpha() and len(tokenizer.tokenize(t)) > 1]
    assert pieces
    with pytest.raises(AdapterError, match="vocabulary already"):
        check_word(tokenizer, pieces[0], {})


def test_a_word_of_which_nothing_is_left(tokenizer: CLIPTokenizer) -> None:
    class Blind:  # as transformers 4 may be to control characters
        def __call__(self, text: str, **options: object) -> object:
            return tokenizer("", **options)

    with pytest.raises(AdapterError, match=r"<x> has no character that the tokenizer sees"):
        check_word(Blind(), "<x>", {})


def test_new_words_are_not_saved_into_a_checkpoint(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, base: StableDiffusionPipeline, tmp_path: Path
) -> None:
    inject(encoder).add("<it>", random(1, 24))
    pipe = StableDiffusionPipeline(base.unet, base.vae, encoder, tokenizer, base.noise_config)
    with pytest.raises(AdapterError, match=r"new words \(<it>\); unload_textual_inversion first"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- templates ---------------------------------------------------------------------------------------------------------


def words_of(templates: tuple[str, ...]) -> Iterator[str]:
    return (word for template in templates for word in template.replace("{}", "").split())


@pytest.mark.parametrize("templates", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_say_the_word_once_and_differ(templates: tuple[str, ...]) -> None:
    assert len(templates) == len(set(templates)) == 20 and all(t.count("{}") == 1 for t in templates)


def test_the_pocket_checkpoint_knows_the_words_of_the_templates() -> None:
    tokenizer = load_tokenizer(POCKET / "tokenizer")
    strange = {word for word in words_of(TEMPLATES["object"] + TEMPLATES["style"]) if len(tokenizer.tokenize(word)) > 1}
    assert strange == {"style"}
