"""How CLIP splits a prompt, as text for a terminal.

    print(token_view(tokenizer, "a (dalmatian:1.3) on the beach", trigger="sks"))

A token is shown as its letters; "dal+" goes on in the next one.
"""

import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from minidiff.core.errors import MinidiffError
from minidiff.core.text import LENGTH, token_ids
from minidiff.draw.prompting import chunked, parse_prompt
from minidiff.files.folder import WORDS, local_folder, read_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

ROOM = LENGTH - 2  # tokens between the marks
SMALL = 5000  # tokens: CLIP's own vocabulary of 49,408 spells everything


def token_view(tokenizer: "CLIPTokenizer", prompt: str, trigger: str | None = None) -> str:
    """The chunks of a prompt, token by token: number, letters, id, weight. Then the part of it that training would cut off from
    a caption, and the tokens of the word `trigger`. Lines of at most 100 columns, without a newline at the end."""
    parsed = parse_prompt(prompt)
    chunks = chunked(tokenizer, parsed)
    lines = ["Number, token, id, weight; a word with + goes on in the next token."]
    for number, chunk in enumerate(chunks, start=1):
        lines.append(f"\nChunk {number} of {len(chunks)}: {len(chunk)} of {ROOM} tokens")
        for i, (index, weight) in enumerate(chunk, start=1):
            letters = textwrap.shorten(letters_of(tokenizer, index), 60, placeholder="…")
            lines.append(f"{i:>4}  {letters:<20} {index:>6}{'' if weight == 1 else f'  x{weight:.2f}'}")
    about = [f"Adapter: {name} x {weight:g}." for name, weight in parsed.loras]
    ids = token_ids(tokenizer, prompt)
    lost = textwrap.shorten(str(tokenizer.decode(ids[ROOM:])), 300, placeholder=" …")
    cut = f"training reads {ROOM} and cuts off: {lost}" if lost else "nothing is cut off."
    about.append(f"As a caption: {len(ids)} tokens, markup counted as letters; {cut}")
    if trigger is not None:
        own, said = token_ids(tokenizer, trigger), [index for chunk in chunks for index, _ in chunk]
        times = sum(said[i : i + len(own)] == own for i in range(len(said))) if own else 0
        split = " ".join(letters_of(tokenizer, index) for index in own)
        count = "one token" if len(own) == 1 else f"{len(own)} tokens"
        about.append(f'Trigger: "{trigger}" is {count}: {split}; {times} x in the prompt.')
    return "\n".join([*lines, "", *(textwrap.fill(text, 100, subsequent_indent="    ") for text in about)])


def warn_of_unknown_words(
    model: str, tokenizer: "CLIPTokenizer", texts: Iterable[str], placeholders: Mapping[str, Sequence[int]] = {}
) -> None:
    """One warning for the words that a model with a small vocabulary never saw.

    The model's folder lists those of its captions. Without a list a word is unknown if most of its tokens are pieces.
    """
    if len(tokenizer) > SMALL:
        return
    try:
        about = read_json(local_folder(model) / WORDS, "it lists the words of the captions")
    except MinidiffError:
        about = {}

    def unknown(word: str) -> bool:
        tokens = [str(tokenizer.convert_ids_to_tokens(index)) for index in token_ids(tokenizer, word)]
        return word not in about["words"] if "words" in about else 2 * sum(t.endswith("</w>") for t in tokens) < len(tokens)

    whole = "\n".join(texts).lower()
    for known in placeholders:
        whole = whole.replace(known.lower(), " ")
    if strange := [word for word in dict.fromkeys(re.findall(r"[^\W\d_]+", whole)) if unknown(word)]:
        are = "is not a word" if len(strange) == 1 else "are not words"
        things = f"; its things are {', '.join(about['things'])}" if about.get("things") else ""
        names = ", ".join(f'"{word}"' for word in strange[:8])
        warnings.warn(f"{names} {are} of this model{things}.", stacklevel=2)


def plain_text(prompt: str) -> str:
    """A prompt without its markup."""
    return " ".join(part.text for section in parse_prompt(prompt).sections for part in section)


def letters_of(tokenizer: "CLIPTokenizer", index: int) -> str:
    """A token as its letters, with + where the word goes on."""
    token, letters = str(tokenizer.convert_ids_to_tokens(index)), str(tokenizer.decode([index])).strip()
    if "\N{REPLACEMENT CHARACTER}" in letters or not letters.isprintable():  # part of a letter, such as an emoji's
        letters = token.removesuffix("</w>")
    return letters if token.endswith("</w>") or token in tokenizer.all_special_tokens else f"{letters}+"
