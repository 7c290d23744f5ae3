r"""A1111's prompt language: weights, BREAK, LoRAs by name; then its chunks, and the vectors of weighted tokens.

    (x)    x 1.1                      nested brackets multiply
    [x]    / 1.1                      \( \) \[ \] \\     the letters themselves
    (x:1.3)  x 1.3                    BREAK              what follows begins a new chunk of 75 tokens
    <lora:name:0.8>                   switches an adapter on; it is no part of the text

    "a [red] (dog:1.3) BREAK on a beach <lora:chalk:0.8>"
        sections  ("a " x 1, "red" x 0.909, " " x 1, "dog" x 1.3), ("on a beach " x 1)
        loras     chalk at 0.8

Malformed markup is read as plain letters, as in A1111, and a warning names its column. So are three features that minidiff
does not have: prompt editing [from:to:when], alternation [a|b], and AND. minidiff keeps a backslash before any other letter;
A1111 drops it. Parsing takes linear time.

A prompt becomes k chunks of 75 tokens. Each is encoded alone, between its own marks, and the states are concatenated: the
U-Net's cross-attention takes any number of them. Shapes: B prompts, D width of the text.
"""

import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from minidiff.core.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

ROUND, SQUARE = 1.1, 1 / 1.1
HEAVIEST = 2.0  # a larger weight gets a warning
CHUNK = 75  # tokens, without the two marks
COMMA_REACH = 20  # tokens; A1111's setting "Increase coherency by padding from the last comma within n tokens"
MAX_CHUNKS = 100  # A1111 has no limit, but memory has
STANDS_OUT = 0.01  # times the standard deviation: a mean below it is chance

Token = tuple[int, float]  # id, weight

LEXEMES = re.compile(
    r"""
    (?P<tag>      < (?: lora | lyco | hypernet ) : [^<>]* > )  # with what is in it, brackets too
  | (?P<cut_tag>  < lora : )
  | \\ (?P<escaped> [()\[\]\\] )
  | : \s* (?P<weight> [+-]? [.\d]+ ) \s* \)
  | : \s* (?P<odd>    [+-]? (?: inf | infinity | nan | [.,\d]+ (?: e [+-]? \d+ )? %? ) ) \s* \)  # no weight in A1111 either
  | (?P<when>     : \s* [+-]? [.\d]+ \s* (?=\]) )
  | (?P<bracket>  [()\[\]] )
  | (?P<bar>      \| )
  | (?P<text>     [^<\\:()\[\]|]+ | . )
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
BREAK, AND = re.compile(r"\bBREAK\b"), re.compile(r"\bAND\b")

NOTES = {
    "cut_tag": "a LoRA tag without its >, which is read as text. Write <lora:name:0.8>.",
    "heavy": f"a weight above {HEAVIEST:g}, which tears pictures apart. 0.5 to 1.5 is usual.",
    "hypernet": "minidiff has no hypernetworks; the tag is left out.",
    "missing": "prompt editing [from:to:when], alternation [a|b] and AND are A1111's; minidiff does not have them, and reads "
    "them as plain text. A weight is written (word:0.5).",
    "negative": "a weight below 0, which CLIP never learnt. Put the word into the negative prompt instead.",
    "no_number": "what stands behind this colon is no number, and is read as text. A weight is written (word:1.3).",
    "unclosed": r"an opening bracket without its closing one; it weighs all the rest. Close it, or write \( or \[.",
    "unopened": r"a closing bracket without its opening one, which is read as text. Take it out, or write \) or \].",
}


class Part(NamedTuple):
    """A piece of text without its markup, and its weight."""

    text: str
    weight: float


class Prompt(NamedTuple):
    """A parsed prompt: parts in the sections between BREAKs (at least one, perhaps empty); adapters in order, with weights."""

    sections: tuple[tuple[Part, ...], ...]
    loras: tuple[tuple[str, float], ...] = ()


def parse_prompt(prompt: str) -> Prompt:
    """Parse a prompt. Without brackets and BREAK it is one part of weight 1, with its text unchanged.

    Warns of probable mistakes; columns count from 1. SettingsError for weights that are not finite, and for bad LoRA tags.
    """
    reading = _Reading()
    for found in LEXEMES.finditer(prompt):
        reading.take(found)
    sections: list[list[Part]] = [[]]
    for item, weight in reading.weighed():
        first, *others = BREAK.split(item.text) if item.words else [item.text]
        sections[-1].append(Part(first.rstrip() if others else first, weight))  # BREAK takes the spaces around it along
        for i, piece in enumerate(others):
            sections.append([Part(piece.lstrip() if i == len(others) - 1 else piece.strip(), weight)])
    for kind, columns in sorted(reading.notes.items()):
        warnings.warn(f"{_place(prompt, sorted(columns))}: {NOTES[kind]}", stacklevel=1)  # Python shows it once per line
    # as in A1111, neighbours of the same weight are joined: a word that markup has cut becomes one word again
    runs = [[(w, "".join(part.text for part in run)) for w, run in groupby(s, lambda part: part.weight)] for s in sections]
    return Prompt(tuple(tuple(Part(text, w) for w, text in own if text) for own in runs), tuple(reading.loras))


def clip_skip_from_a1111(number: int) -> int:
    """A1111's "Clip skip", which counts the last layer as 1, in diffusers' numbering, which counts it as 0."""
    if number < 1:
        raise SettingsError(f"A1111's Clip skip {number}: it counts from 1, which skips nothing.")
    return number - 1


class _Letters(NamedTuple):
    at: int  # column
    text: str
    words: bool = False  # BREAK and AND mean something here


@dataclass
class _Opening:
    at: int
    letter: str
    weight: float
    literal: bool = False  # [from:to:when] or [a|b]: both brackets are read as letters, if it is closed
    closed: bool = False


class _Closing(NamedTuple):
    at: int
    letter: str
    opening: _Opening


@dataclass
class _Reading:
    """The lexemes so far. Round and square brackets are matched separately, as in A1111: "(a [b) c]" is well formed."""

    items: list[_Letters | _Opening | _Closing] = field(default_factory=list)
    open: dict[str, list[_Opening]] = field(default_factory=lambda: {"(": [], "[": []})
    loras: list[tuple[str, float]] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)  # kind -> columns

    def take(self, found: re.Match[str]) -> None:
        at, text, kind = found.start() + 1, found.group(), found.lastgroup
        if kind == "tag":
            self.take_tag(at, text)
        elif kind == "escaped":
            self.items.append(_Letters(at, text[1:]))
        elif kind in ("weight", "odd"):
            self.take_weight(at, text, found[kind], kind == "odd")
        elif kind == "bracket":
            self.take_bracket(at, text)
        else:
            self.items.append(_Letters(at, text, words=True))
            if kind == "cut_tag":
                self.note(kind, at)
            elif kind in ("when", "bar") and (innermost := self.innermost()) and innermost.letter == "[":
                innermost.literal = True

    def take_bracket(self, at: int, letter: str) -> None:
        if letter in "([":
            opening = _Opening(at, letter, ROUND if letter == "(" else SQUARE)
            self.open[letter].append(opening)
            self.items.append(opening)
        elif waiting := self.open["(" if letter == ")" else "["]:
            opening = waiting.pop()
            opening.closed = True
            self.items.append(_Closing(at, letter, opening))
            if opening.literal:
                opening.weight = 1.0
                self.note("missing", opening.at)
        else:
            self.items.append(_Letters(at, letter))
            self.note("unopened", at)

    def take_weight(self, at: int, text: str, number: str, odd: bool) -> None:
        """`:1.3)`: a weight, if a round bracket is open; otherwise text and a bracket."""
        weight = _number(number)
        if self.open["("]:
            if weight is not None and not math.isfinite(weight):
                raise SettingsError(f'prompt, column {at}: "{number:.20}" is no finite number; write one, as in (word:1.3).')
            if weight is not None and not odd:
                self.open["("][-1].weight = weight
                self.take_bracket(at + len(text) - 1, ")")
                return
            self.note("no_number", at)
        self.items.append(_Letters(at, text[:-1]))
        self.take_bracket(at + len(text) - 1, ")")

    def take_tag(self, at: int, tag: str) -> None:
        kind, name, *given = (word.strip() for word in tag[1:-1].split(":"))
        where = f'prompt, column {at}: "{textwrap.shorten(tag, 80, placeholder="…")}"'
        if kind.lower() == "hypernet":
            return self.note("hypernet", at)
        if not name:
            raise SettingsError(f"{where} names no adapter; write <lora:name:0.8>.")
        if len(given) > 1:
            raise SettingsError(f"{where} has more than one weight; minidiff weighs an adapter as a whole. Write one.")
        weight = _number(given[0]) if given else 1.0
        if weight is None or not math.isfinite(weight):
            raise SettingsError(f"{where}: its weight is no finite number; write one, as in <lora:name:0.8>.")
        self.loras.append((name, weight))

    def innermost(self) -> _Opening | None:
        """The last opened bracket that is still open."""
        return max((waiting[-1] for waiting in self.open.values() if waiting), key=lambda opening: opening.at, default=None)

    def note(self, kind: str, at: int) -> None:
        self.notes.setdefault(kind, []).append(at)

    def weighed(self) -> Iterator[tuple[_Letters, float]]:
        """The text in order, each piece with the product of the brackets around it. Adds the last notes."""
        scales = {"(": [1.0], "[": [1.0]}  # products of the open brackets, outermost first
        for opening in self.open["("] + self.open["["]:
            self.note("unclosed", opening.at)
        for item in self.items:
            if isinstance(item, _Letters):
                weight = scales["("][-1] * scales["["][-1]
                if weight != 1 or AND.search(item.text):
                    self.check(item, weight)
                yield item, weight
                continue
            opening = item.opening if isinstance(item, _Closing) else item
            scale = scales[opening.letter]
            if isinstance(item, _Closing):
                scale.pop()
            else:
                scale.append(scale[-1] * item.weight)
            if opening.literal and opening.closed:
                yield _Letters(item.at, item.letter), scales["("][-1] * scales["["][-1]

    def check(self, item: _Letters, weight: float) -> None:
        if not math.isfinite(weight):
            words = textwrap.shorten(item.text, 30, placeholder="…")
            raise SettingsError(f'prompt, column {item.at}: the weights around "{words}" multiply to {weight}; use fewer.')
        if not 0 <= weight <= HEAVIEST and item.text.strip():
            self.note("heavy" if weight > 0 else "negative", item.at)
        for found in AND.finditer(item.text) if item.words else ():
            self.note("missing", item.at + found.start())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _place(prompt: str, columns: list[int]) -> str:
    """Such as `prompt, column 3 ("(dog on a beac…"), 17`."""
    begin = columns[0] - 1
    first = " ".join(prompt[begin : begin + 16].split()) + ("…" if len(prompt) > begin + 16 else "")
    others = "".join(f", {column}" for column in columns[1:4]) + (f" and {len(columns) - 4} more" if len(columns) > 4 else "")
    return f'prompt, column {columns[0]} ("{first}"){others}'


# --- chunks ------------------------------------------------------------------------------------------------------------


def chunked(tokenizer: "CLIPTokenizer", prompt: Prompt, placeholders: Mapping[str, Sequence[int]] = {}) -> list[list[Token]]:
    """The chunks of a prompt, at least one: ids and weights, at most 75 in each, without the marks.

    As in A1111: if a full chunk has a comma among its last 20 tokens, the tokens after the comma move to the next chunk. The
    vectors of a placeholder stay together. BREAK ends a chunk, full or not. SettingsError for more than 100 chunks.
    """
    from minidiff.core.text import pieces  # only now: it imports torch, and parsing needs none

    comma = list(tokenizer(",", add_special_tokens=False, verbose=False).input_ids)
    chunks: list[list[Token]] = []
    for section in prompt.sections:
        chunks.append([])
        for part in section:
            for ids in pieces(tokenizer, part.text, placeholders):
                while chunks[-1] and len(chunks[-1]) + len(ids) > CHUNK:
                    chunks.append([] if list(ids) == comma else _after_comma(chunks[-1], comma))
                chunks[-1] += [(index, part.weight) for index in ids]
    if len(chunks) > 1 and not chunks[-1]:  # nothing after the last BREAK
        chunks.pop()
    if len(chunks) > MAX_CHUNKS:
        raise SettingsError(f"the prompt fills {len(chunks)} chunks of {CHUNK} tokens; {MAX_CHUNKS} is the limit.")
    return chunks


def _after_comma(full: list[Token], comma: list[int]) -> list[Token]:
    """Take the tokens after the last comma out of a full chunk, if the comma is near its end."""
    near = [i for i, (index, _) in enumerate(full) if [index] == comma and len(full) - i <= COMMA_REACH]
    moved = full[near[-1] + 1 :] if near and len(full) == CHUNK else []
    del full[len(full) - len(moved) :]
    return moved


def count_chunks(tokenizer: "CLIPTokenizer", prompts: Sequence[Prompt], placeholders: Mapping[str, Sequence[int]] = {}) -> int:
    """How many chunks the longest of these prompts needs."""
    return max((len(chunked(tokenizer, prompt, placeholders)) for prompt in prompts), default=1)


def encode_prompts(
    tokenizer: "CLIPTokenizer",
    text_encoder: "CLIPTextModel",
    prompts: Sequence[Prompt],
    placeholders: Mapping[str, Sequence[int]] = {},
    clip_skip: int = 0,
    chunks: int = 1,
) -> "Tensor":
    """Prompts -> (B, 77 k, D): states after the final LayerNorm, on the encoder's device, in its dtype.

    k is the number of chunks of the longest prompt, at least `chunks`; empty chunks are added to the others. `clip_skip` = n
    takes the states n layers before the last (diffusers' numbering; A1111's is one higher). Gradients flow if they are on.
    """
    import torch

    from minidiff.core.text import encode, with_marks

    layers = text_encoder.config.num_hidden_layers
    if not isinstance(clip_skip, int) or clip_skip not in range(layers):
        raise SettingsError(
            f"clip_skip is {clip_skip}; this text encoder has {layers} layers, so it is 0 (none skipped) to {layers - 1}. "
            f"A1111's Clip skip counts one higher: 1 to {layers}."
        )
    split = [chunked(tokenizer, prompt, placeholders) for prompt in prompts]
    k = max(chunks, *map(len, split))
    flat = [chunk for own in split for chunk in own + [[]] * (k - len(own))]  # B k chunks, those of a prompt side by side
    ids = torch.tensor([with_marks(tokenizer, [index for index, _ in chunk]) for chunk in flat])
    hidden = encode(text_encoder, ids, clip_skip)  # (B k, 77, D)
    weights = [[weight for _, weight in chunk] for chunk in flat]
    weighted = [_weighted(z, own) if any(w != 1 for w in own) else z for z, own in zip(hidden, weights)]
    return torch.stack(weighted).reshape(len(prompts), -1, hidden.shape[-1])


def _weighted(z: "Tensor", weights: list[float]) -> "Tensor":
    """States (77, D) times the weights of their tokens, with the mean that they had before. Marks and padding weigh 1.

    A1111's rule (sd_emphasis.py, "Original"):  z' = z w,  z'' = z' mean(z) / mean(z'). The mean is taken over the chunk, not
    over the batch, so a prompt's states do not depend on other prompts. Where a mean is small beside the standard deviation
    (0.001 beside 1 in the pocket checkpoint), the quotient is chance: it can enlarge all states (A1111's issue 14867) or
    change their sign. Then z' is the result, as with A1111's "No norm".
    """
    before = z.float()
    after = before * before.new_tensor([1.0, *weights] + [1.0] * (len(z) - 1 - len(weights)))[:, None]
    old, new = before.mean(), after.mean()
    chance = (old.abs() < STANDS_OUT * before.std()) | (new.abs() < STANDS_OUT * after.std()) | (old * new < 0)
    return (after if chance else after * (old / new)).to(z.dtype)
