r"""The prompt language that A1111 made common: weights, BREAK, and LoRAs by name. Pure parsing: no torch, no vocabulary.

    (x)    x 1.1                      nested brackets multiply
    [x]    / 1.1                      \( \) \[ \] \\     the letters themselves
    (x:1.3)  x 1.3                    BREAK              what follows begins a new chunk of 75 tokens
    <lora:name:0.8>                   switches an adapter on; it is no part of the text

    "a [red] (dog:1.3) BREAK on a beach <lora:chalk:0.8>"
        sections  ("a " x 1, "red" x 0.909, " " x 1, "dog" x 1.3), ("on a beach " x 1)
        loras     chalk at 0.8

What is malformed is read as in A1111, as plain letters, and a warning names its column. Three things of A1111 are not
here, and are read as plain letters too: prompt editing [from:to:when], alternation [a|b], and AND. In one place minidiff
differs on purpose: a backslash before any other letter stays in the text, and A1111 drops it.

Parsing takes time in proportion to the length of the prompt, however deep its brackets are.
"""

import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from minidiff.core.errors import SettingsError

ROUND, SQUARE = 1.1, 1 / 1.1
HEAVIEST = 2.0  # a warning above it

LEXEMES = re.compile(
    r"""
    (?P<tag>      < (?: lora | lyco | hypernet ) : [^<>]* > )  # with what is in it, brackets too
  | (?P<cut_tag>  < lora : )
  | \\ (?P<escaped> [()\[\]\\] )
  | : \s* (?P<weight> [+-]? [.\d]+ ) \s* \)
  | : \s* (?P<odd>    [+-]? (?: inf | infinity | nan | [.,\d]+ (?: e [+-]? \d+ )? %? ) ) \s* \)  # as A1111, not a weight
  | (?P<when>     : \s* [+-]? [.\d]+ \s* (?=\]) )
  | (?P<bracket>  [()\[\]] )
  | (?P<bar>      \| )
  | (?P<text>     [^<\\:()\[\]|]+ | . )
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
BREAK = re.compile(r"\bBREAK\b")  # a whole word in capitals, as AND
AND = re.compile(r"\bAND\b")

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


@dataclass(frozen=True)
class Part:
    """A piece of text without its markup, and its weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Prompt:
    """What a prompt says: its parts, in the sections that BREAK separates, and the adapters that it names, in order.

    There is one section at least, and a section may be empty.
    """

    sections: tuple[tuple[Part, ...], ...]
    loras: tuple[tuple[str, float], ...] = ()


def parse_prompt(prompt: str) -> Prompt:
    """A prompt of the language above; without brackets and BREAK it is one part of weight 1, its text untouched.

    Warns of what is probably not meant; columns count from 1. SettingsError for weights that are no finite numbers, and
    for a LoRA tag that cannot be followed.
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
        where = _place(prompt, sorted(columns))
        warnings.warn(f"{where}: {NOTES[kind]}", stacklevel=1)  # from here, whoever asks: so Python says it once
    return Prompt(tuple(map(_merged, sections)), tuple(reading.loras))


def escape(text: str) -> str:
    r"""A text as `parse_prompt` must get it to see no brackets in it. BREAK and <lora:…> cannot be escaped."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def clip_skip_from_a1111(number: int) -> int:
    """A1111's "Clip skip", where 1 is the last layer, as `clip_skip`, where 0 is (diffusers' numbering)."""
    if number < 1:
        raise SettingsError(f"A1111's Clip skip {number}: it counts from 1, which skips nothing.")
    return number - 1


# --- how it is read ----------------------------------------------------------------------------------------------------


class _Letters(NamedTuple):
    at: int  # column
    text: str
    words: bool = False  # BREAK and AND mean something here


@dataclass
class _Opening:
    at: int
    letter: str
    weight: float
    literal: bool = False  # of [from:to:when] or [a|b]: both its brackets are letters, if it is closed
    closed: bool = False


class _Closing(NamedTuple):
    at: int
    letter: str
    opening: _Opening


@dataclass
class _Reading:
    """The lexemes so far. Round and square brackets are matched apart, as in A1111: "(a [b) c]" is well formed."""

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
        """`:1.3)`, which is text and a bracket where no round bracket is open."""
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
            self.note("hypernet", at)
            return
        if not name:
            raise SettingsError(f"{where} names no adapter; write <lora:name:0.8>.")
        if len(given) > 1:
            raise SettingsError(f"{where} has more than one weight; minidiff weighs an adapter as a whole. Write one.")
        weight = _number(given[0]) if given else 1.0
        if weight is None or not math.isfinite(weight):
            raise SettingsError(f"{where}: its weight is no finite number; write one, as in <lora:name:0.8>.")
        self.loras.append((name, weight))

    def innermost(self) -> _Opening | None:
        """The bracket that was opened last and is still open."""
        return max((waiting[-1] for waiting in self.open.values() if waiting), key=lambda opening: opening.at, default=None)

    def note(self, kind: str, at: int) -> None:
        self.notes.setdefault(kind, []).append(at)

    def weighed(self) -> Iterator[tuple[_Letters, float]]:
        """The text in order, each piece with the product of the brackets around it; and the last notes."""
        scales = {"(": [1.0], "[": [1.0]}  # products of the open brackets, outermost first
        for waiting in self.open.values():
            for opening in waiting:
                self.note("unclosed", opening.at)
        for item in self.items:
            if isinstance(item, _Letters):
                weight = scales["("][-1] * scales["["][-1]
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
        if item.words:
            for found in AND.finditer(item.text):
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


def _merged(section: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbours of the same weight become one part: the words that markup cut are whole again, as in A1111."""
    runs = [(weight, "".join(part.text for part in run)) for weight, run in groupby(section, lambda part: part.weight)]
    return tuple(Part(text, weight) for weight, text in runs if text)
