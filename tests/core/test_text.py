"""The text tower: ids, new words, encoding, clip skip."""

import warnings

import pytest
import torch
from tiny_text import config, encoder, final_norm, ids_of, tiny_tokenizer, with_mean
from torch import Tensor
from transformers import CLIPTokenizer

from minidiff.core.text import encode, tokenize
from minidiff.files.text_files import build_text_encoder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("words"))


def test_tokenize_is_what_the_library_gives(tokenizer: CLIPTokenizer) -> None:
    prompts = ["", "a photo of a sks dog", "Ünïcode 🐕 (dog:1.2), \\ 42"]
    ids = tokenize(tokenizer, prompts)
    theirs = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert ids.dtype == torch.int64 and torch.equal(ids, theirs)
    assert tokenize(tokenizer, []).shape == (0, 77)


def test_75_tokens_pass_and_the_76th_is_quoted(tokenizer: CLIPTokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(tokenizer, ["dog " * 75])
    with pytest.warns(UserWarning, match='77 tokens and CLIP reads 75; cut off: "red beach"'):
        ids = tokenize(tokenizer, ["dog " * 75 + "red beach"])
    assert torch.equal(ids, tokenize(tokenizer, ["dog " * 75]))


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a photo of <dog>", ["a photo of", "<dog>"]),
        ("<DOG> on the beach", ["<dog>", "on the beach"]),
        ("a photo of<dog>, red", ["a photo of", "<dog>", ", red"]),
        ("<dog><dog>'s", ["<dog>", "<dog>", "'s"]),
        ("<dog>s on the beach", ["<dog>s", "on the beach"]),
        ("it asks a sks2 dog", ["it asks a sks2 dog"]),
        ("sks-dog (SKS)", ["sks", "-dog (", "sks", ")"]),
        ("my old-style dog", ["my", "old-style", "dog"]),
        ("", []),
    ],
)
def test_placeholders_are_whole_words_the_longest_first(tokenizer: CLIPTokenizer, prompt: str, pieces: list[str]) -> None:
    placeholders = {"<dog>": [1001, 1002, 1003], "<dog>s": [1004], "Sks": [1005], "old-style": [1006, 1007]}
    folded = {word.lower(): ids for word, ids in placeholders.items()}
    want = [i for piece in pieces for i in folded.get(piece) or ids_of(tokenizer, piece)]
    (row,) = tokenize(tokenizer, [prompt], placeholders).tolist()
    assert row[1 : len(want) + 1] == want
    assert row[0] == tokenizer.bos_token_id and set(row[len(want) + 1 :]) == {tokenizer.eos_token_id}


def test_a_placeholder_leaves_the_words_beside_it_alone(tokenizer: CLIPTokenizer) -> None:
    """An added token would: with "sks" in the tokenizer, "asks" falls into "a" and "sks" (diffusers)."""
    prompts = ["asks a red dog on the beach, (dog)!", "", "sksx"]
    assert torch.equal(tokenize(tokenizer, prompts, {"sks": [1000]}), tokenize(tokenizer, prompts))


def test_text_lost_behind_placeholders_is_quoted_with_their_names(tokenizer: CLIPTokenizer) -> None:
    with pytest.warns(UserWarning, match='79 tokens and CLIP reads 75; cut off: "<dog> red beach"'):
        ids = tokenize(tokenizer, ["dog " * 74 + "<Dog> red beach"], {"<dog>": [1000, 1001, 1002]})
    assert ids.shape == (1, 77) and ids[0, 75] == 1000


def test_a_caption_is_the_last_state_after_the_norm(tokenizer: CLIPTokenizer) -> None:
    tower = encoder(tokenizer)
    hidden = encode(tower, tokenize(tokenizer, ["a red dog", ""]))
    output = tower(tokenize(tokenizer, ["a red dog", ""]), output_hidden_states=True)
    norm = next(module for name, module in tower.named_modules() if name.endswith("final_layer_norm"))
    assert hidden.shape == (2, 77, 16) and hidden.requires_grad
    assert torch.equal(hidden, norm(output.hidden_states[-1]))


def test_a_caption_is_the_same_alone_and_in_a_batch(tokenizer: CLIPTokenizer) -> None:
    tower = encoder(tokenizer)
    pair = encode(tower, tokenize(tokenizer, ["a photo", "a red dog on the beach"]))
    torch.testing.assert_close(pair[1:], encode(tower, tokenize(tokenizer, ["a red dog on the beach"])))


def test_clip_skip_takes_an_earlier_state_through_the_norm(tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    tower = with_mean(build_text_encoder(config(tokenizer) | {"num_hidden_layers": 4}, "config.json"))
    ids = tokenize(tokenizer, ["a red dog", ""])
    states = tower(input_ids=ids, output_hidden_states=True).hidden_states
    seen: list[Tensor] = []
    for skip in range(4):
        got = encode(tower, ids, skip)
        assert torch.equal(got, final_norm(tower)(states[-1 - skip]))
        assert not any(torch.allclose(got, other, atol=1e-3) for other in seen)
        seen.append(got)
    assert torch.equal(seen[0], encode(tower, tokenize(tokenizer, ["a red dog", ""])))
