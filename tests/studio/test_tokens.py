"""How CLIP splits a prompt, as text for a terminal."""

import json
import random
import warnings
from pathlib import Path

import pytest
from tiny_text import ids_of, tiny_tokenizer
from transformers import CLIPTokenizer

from minidiff.files.text_files import load_tokenizer
from minidiff.pocket.world import random_caption, random_picture, word_list
from minidiff.studio.tokens import plain_text, token_view, warn_of_unknown_words

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("words"))


def test_the_token_view_of_a_short_prompt(tokenizer: CLIPTokenizer) -> None:
    view = token_view(tokenizer, "a (red:1.3) Dog <lora:chalk:0.8>", trigger="dog")
    lines = [" ".join(line.split()) for line in view.splitlines()]
    a, red, dog = ids_of(tokenizer, "a red dog")
    assert "Chunk 1 of 1: 3 of 75 tokens" in lines
    assert {f"1 a {a}", f"2 red {red} x1.30", f"3 dog {dog}"} <= set(lines)
    assert "Adapter: chalk x 0.8." in lines
    assert 'Trigger: "dog" is one token: dog; 1 x in the prompt.' in lines


def test_the_token_view_of_a_long_prompt(tokenizer: CLIPTokenizer) -> None:
    view = token_view(tokenizer, "dog " * 75 + "red beach BREAK BREAK a photo", trigger="zebra")
    lines = view.splitlines()
    assert max(map(len, lines)) <= 100 and not view.endswith("\n")
    for heading in ("1 of 4: 75 of", "2 of 4: 2 of", "3 of 4: 0 of 75 tokens", "4 of 4: 2 of"):
        assert sum(line.startswith(f"Chunk {heading}") for line in lines) == 1
    assert "cuts off: red beach" in view
    assert all(f"{i:>4}  dog" in view for i in range(1, 76))
    assert f'"zebra" is {len(ids_of(tokenizer, "zebra"))} tokens' in view and "0 x in the prompt" in view


def test_the_token_view_marks_words_that_go_on(tokenizer: CLIPTokenizer) -> None:
    pieces = ids_of(tokenizer, "zebra")
    cells = token_view(tokenizer, "zebra").splitlines()[3 : 3 + len(pieces)]
    shown = [cell.split()[1] for cell in cells]
    assert len(pieces) > 1 and all(word.endswith("+") for word in shown[:-1])
    assert "".join(word.rstrip("+") for word in shown) == "zebra" and not shown[-1].endswith("+")


@pytest.mark.parametrize("prompt", ["", "🐕 ünï", "x" * 200, "<" + "long" * 20 + ">", "<|endoftext|> \x00 a"])
def test_the_token_view_takes_anything(tokenizer: CLIPTokenizer, prompt: str) -> None:
    for trigger in (None, "", "dog", prompt):
        view = token_view(tokenizer, prompt, trigger)
        assert max(map(len, view.splitlines())) <= 100


# --- words that a small model does not know --------------------------------------------------------------------------------


def told(model: str, tokenizer: CLIPTokenizer, *texts: str, **placeholders: list[int]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_unknown_words(model, tokenizer, texts, placeholders)
    return [str(one.message) for one in seen]


def test_words_that_no_caption_had_are_named_once() -> None:
    light = load_tokenizer(POCKET / "tokenizer")
    (said,) = told(str(POCKET), light, "a photo of a green mug on the Table", "a mug, 3 dogs")
    assert said.startswith('"mug", "table", "dogs" are not words of this model; its things are dog, cat, ')
    assert told(str(POCKET), light, "A watercolor of a small red Dog in the city", "an ohwx of a sks dog") == []
    assert told(str(POCKET), light, "a <my-Mug> on the moon", **{"<my-mug>": [670]}) == []
    assert plain_text("a (mug:1.3) <lora:table:1> [red]").split() == ["a", "mug", "red"]


def test_without_a_list_words_in_pieces_are_unknown(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    assert len(ids_of(tokenizer, "zebra")) > 2
    (said,) = told(str(tmp_path), tokenizer, "a photo of a red zebra")
    assert said == '"zebra" is not a word of this model.'


def test_a_whole_vocabulary_is_silent(tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.studio.tokens.SMALL", len(tokenizer) - 1)
    assert told("nowhere", tokenizer, "a zebra") == []


def test_the_list_of_the_checkpoint_is_that_of_the_world() -> None:
    listed = json.loads((POCKET / "words.json").read_text())
    assert listed == word_list()
    rng = random.Random(0)
    said = {word for _ in range(3000) for word in random_caption(random_picture(rng), rng).split()}
    assert said <= set(listed["words"]) and set(listed["words"]) - said == {"sks", "ohwx", "zwx"}
