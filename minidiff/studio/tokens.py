"""How CLIP splits a prompt, as text for a terminal.

    print(token_view(tokenizer, "a (dalmatian:1.3) on the beach", trigger="sks"))

A token is shown as its letters; "dal+" goes on in the next one. What stands behind an x is its weight.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from minidiff.core.text import LENGTH, spelled, token_ids
from minidiff.draw.prompting import Token, chunked, parse_prompt

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WIDTH = 100  # columns of the terminal
ROOM = LENGTH - 2  # tokens between the marks
LEGEND = "Number, token, id, weight; a word with + goes on in the next token."


def token_view(
    tokenizer: "CLIPTokenizer", prompt: str, placeholders: Mapping[str, Sequence[int]] = {}, trigger: str | None = None
) -> str:
    """The chunks of a prompt, token by token: number, letters, id, weight. Then what training would cut off of it as a
    caption, and what CLIP makes of the word `trigger`. Lines of at most 100 columns, without a newline at the end.

    Warns of and refuses what `parse_prompt` does.
    """
    parsed = parse_prompt(prompt)
    chunks = chunked(tokenizer, parsed, placeholders)
    said = [index for chunk in chunks for index, _ in chunk]
    names = _names(tokenizer, said, placeholders)
    blocks = [_block(i, chunks, names) for i in range(len(chunks))]
    if parsed.loras:
        blocks.append("Adapters  " + ", ".join(f"{name} x {weight:g}" for name, weight in parsed.loras))
    blocks.append(_as_caption(tokenizer, prompt, placeholders))
    if trigger is not None:
        blocks.append(_about_trigger(tokenizer, said, placeholders, trigger))
    return "\n\n".join([LEGEND, *blocks])


# --- the table of a chunk ----------------------------------------------------------------------------------------------


def _block(number: int, chunks: list[list[Token]], names: Mapping[int, str]) -> str:
    """Heading and table of one chunk."""
    chunk = chunks[number]
    which = f"Chunk {number + 1} of {len(chunks)}" if len(chunks) > 1 else "One chunk"
    heading = f"{which}: {len(chunk)} of {ROOM} tokens" + ("" if chunk else ", nothing but filling")
    return "\n".join([heading, *_table(chunk, names)])


def _table(chunk: list[Token], names: Mapping[int, str]) -> list[str]:
    """Cells of one width, in as many columns as fit, to be read downwards."""
    words = [_fitted(names[index]) for index, _ in chunk]
    ids = [str(index) for index, _ in chunk]
    weights = ["" if weight == 1 else f"x{weight:.2f}" for _, weight in chunk]
    word, index, weight = (max(map(len, column), default=0) for column in (words, ids, weights))
    cells = [f"{i:>4}  {w:<{word}} {n:>{index}} {x:<{weight}}" for i, (w, n, x) in enumerate(zip(words, ids, weights), start=1)]
    columns = max(WIDTH // (max(map(len, cells), default=0) + 2), 1)
    rows = max(-(-len(cells) // columns), min(len(cells), 10))  # a short prompt stands in one column
    return ["  ".join(cells[row::rows]).rstrip() for row in range(rows)]


def _fitted(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:10]}…{name[-13:]}"  # the vector's number stands at the end


def _names(tokenizer: "CLIPTokenizer", ids: list[int], placeholders: Mapping[str, Sequence[int]]) -> dict[int, str]:
    """Ids as they are shown: letters, with + where the word goes on; a vector of a new word as `<dog> 2/3`."""
    shown = {}
    for index in dict.fromkeys(ids):
        token = str(tokenizer.convert_ids_to_tokens(index))
        letters = str(tokenizer.decode([index])).strip()
        whole = token.endswith("</w>") or token in tokenizer.all_special_tokens
        if "\N{REPLACEMENT CHARACTER}" in letters or not letters.isprintable():  # part of a letter, such as an emoji's
            letters = token.removesuffix("</w>")
        shown[index] = letters if whole else f"{letters}+"
    for word, own in placeholders.items():
        shown |= {index: f"{word} {i}/{len(own)}" if len(own) > 1 else word for i, index in enumerate(own, start=1)}
    return shown


# --- what else there is to know ----------------------------------------------------------------------------------------


def _as_caption(tokenizer: "CLIPTokenizer", prompt: str, placeholders: Mapping[str, Sequence[int]]) -> str:
    """How training reads the same letters."""
    ids = token_ids(tokenizer, prompt, placeholders)
    if len(ids) <= ROOM:
        return _wrapped("As a caption", f"{len(ids)} of {ROOM} tokens, markup counted as letters; nothing is cut off.")
    lost = textwrap.shorten(spelled(tokenizer, ids[ROOM:], placeholders), 300, placeholder=" …")
    cut = len(ids) - ROOM
    what = f"{len(ids)} tokens, markup counted as letters. Training reads {ROOM} and cuts {cut} off: {lost}"
    return _wrapped("As a caption", what)


def _about_trigger(tokenizer: "CLIPTokenizer", said: list[int], placeholders: Mapping[str, Sequence[int]], word: str) -> str:
    """Whether a word is one token, several, or a new word; and how often a prompt's ids, `said`, hold it."""
    ids = token_ids(tokenizer, word, placeholders)
    known = next((new for new in placeholders if new.lower() == word.strip().lower()), None)
    if not ids:
        return _wrapped("Trigger", f'"{word}" has no letter that CLIP sees.')
    if known:
        many = len(placeholders[known])
        what = f'"{known}" is a word of textual inversion, {many} vector{"s" if many > 1 else ""}.'
    elif len(ids) == 1:
        what = f'"{word}" is one token, {ids[0]}.'
    else:
        names = _names(tokenizer, ids, placeholders)
        what = f'"{word}" is {len(ids)} tokens, each of which has a meaning of its own: {" ".join(names[i] for i in ids)}.'
    times = sum(said[i : i + len(ids)] == ids for i in range(len(said)))
    return _wrapped("Trigger", f"{what} It stands in the prompt {_times(times)}.")


def _times(count: int) -> str:
    return {0: "nowhere", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _wrapped(title: str, text: str) -> str:
    indent = f"{title}  "
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))
