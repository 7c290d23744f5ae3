"""The pocket tokenizer: CLIP's files, every world word one token, no text unknown."""

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from minidiff.pocket.tokenizer import END, START, alphabet, build_tokenizer, learn_merges

CAPTION = "a photo of a red dog on the beach drawing watercolor wearing sunglasses with hat and cat"
WORDS = CAPTION.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def test_merges_by_hand() -> None:
    # "at" counts 5, "ca" 3, "ha" 2: the pair (a, t</w>) first, then (c, at</w>), then (h, at</w>)
    assert learn_merges({"cat": 3, "hat": 2}) == [("a", "t</w>"), ("c", "at</w>"), ("h", "at</w>")]
    assert learn_merges({"cat": 3}, rare=["sks"])[-2:] == [("s", "k"), ("sk", "s</w>")]


def test_alphabet_is_that_of_clip() -> None:
    letters = alphabet()
    assert len(set(letters)) == 512 and letters[0] == "!" and letters[256] == "!</w>"
    assert {"Ġ", "Ċ", "ÿ"} <= set(letters)  # a space, a line break, the last byte


def test_ids_stand_in_the_order_of_clip(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert list(vocab.values()) == list(range(len(vocab)))
    assert (vocab["!"], vocab["!</w>"], vocab["a"], vocab["a</w>"]) == (0, 256, 64, 320)  # as in CLIP's own file
    assert (vocab[START], vocab[END]) == (len(vocab) - 2, len(vocab) - 1)
    assert merges[0] == "#version: 0.2" and len(vocab) == 512 + (len(merges) - 1) + 2 < 1000


def test_same_words_in_any_order_same_files(folder: Path, tmp_path: Path) -> None:
    build_tokenizer(tmp_path, [" ".join(reversed(WORDS))])  # a caption instead of words
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
    assert {f.name for f in folder.iterdir()} == {
        "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    }  # fmt: skip


@pytest.mark.parametrize("word", [*WORDS, "sks", "ohwx", "zwx", "Dog", "DOG"])
def test_world_words_and_rare_words_are_one_token(tokenizer: CLIPTokenizer, word: str) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids) == [START, word.lower() + "</w>", END]


@pytest.mark.parametrize("text", ["", "a red dog", "desk asks", "äöü ß é", "🐕 日本語 ﷽", "x" * 30, '{}\\"\t|~'])
def test_any_text_goes_round_without_unknowns(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.index(tokenizer.eos_token_id) == len(ids) - 1
    back = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(back.split()) == "".join(text.lower().split())


def test_pads_to_77_with_the_end_mark(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a red dog", padding="max_length", truncation=True).input_ids
    assert tokenizer.model_max_length == 77 == len(ids)
    assert ids[4:] == [tokenizer.eos_token_id] * 73
    assert len(tokenizer("dog " * 200, padding="max_length", truncation=True).input_ids) == 77


def test_rare_words_change_no_other_word(folder: Path, tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    build_tokenizer(tmp_path, WORDS, rare=())
    plain = CLIPTokenizer.from_pretrained(tmp_path)
    for word in WORDS:
        assert tokenizer.tokenize(word) == plain.tokenize(word)
    few, many = ((f / "merges.txt").read_text(encoding="utf-8") for f in (tmp_path, folder))
    assert many.startswith(few) and len(many) > len(few)


def test_transformers_own_save_gives_the_same_ids(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """transformers 5 saves `tokenizer.json` alone, 4 the two text files: either way the ids stay."""
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("a photo of a sks dog, wearing a hat!", "Straße 🐕 42"):
        assert again(text).input_ids == tokenizer(text).input_ids
