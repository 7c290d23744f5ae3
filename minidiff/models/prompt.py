"""The prompt language that A1111 made common: weights, BREAK, and LoRAs by name. Pure parsing: no torch, no vocabulary.

    (x)  x 1.1        [x]  / 1.1        (x:1.3)  x 1.3        nested ones multiply        \\\\( \\\\) \\\\[ \\\\] \\\\\\\\  the plain letters
    BREAK             what follows begins a new chunk of 75 tokens
    <lora:name:0.8>   switches an adapter on; it is no part of the text

    "a [red] (dog:1.3) BREAK a beach <lora:chalk:0.8>"
        -> sections: (a | red x 0.909 | dog x 1.3), (a beach)        loras: chalk 0.8

What is malformed is read as in A1111, as plain letters, and a warning names its column. Three things of A1111 are not
here, and are read as plain letters too: prompt editing [from:to:when], alternation [a|b], and AND. In one place minidiff
differs on purpose: a backslash before any other letter stays in the text, and A1111 drops it.

Everything takes time in proportion to the length of the prompt, however deep its brackets.
"""

import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from minidiff.errors import SettingsError

ROUND, SQUARE = 1.1, 1 / 1.1
HEAVIEST = 2.0  # beyond, pictures fall apart; a warning says so

LEXEMES = re.compile(
    r"""
    (?P<tag> < (?:lora|lyco|hypernet) : [^<>]* > )
  | \\ (?P<escaped> [()\[\]\\] )
  | : \s* (?P<weight> [+-]? [.\d]+ ) \s* \)
  | : \s* [+-]? (?P<odd> inf | infinity | nan ) \s* \)
  | (?P<when> : \s* [+-]? [.\d]+ \s* (?=\]) )
  | (?P<bracket> [()\[\]] )
  | (?P<bar> \| )
  | (?P<text> [^<\\:()\[\]|]+ | . )
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
BREAK = re.compile(r"\bBREAK\b")  # upper case, a whole word
AND = re.compile(r"\bAND\b")


class Part(NamedTuple):
    """A piece of text without any markup, and its weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Prompt:
    """What a prompt says: its parts, in sections that BREAK parts, and the adapters it names, in order.

    There is always a section, and it may be empty.
    """

    sections: tuple[tuple[Part, ...], ...]
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def text(self) -> str:
        """The words alone, as a caption would have them."""
        return " ".join("".join(part.text for part in section) for section in self.sections)


def plain(text: str) -> Prompt:
    """A text as it stands: nothing in it is markup. For captions."""
    return Prompt(((Part(text, 1.0),),))


def escape(text: str) -> str:
    """A text in which `parse_prompt` finds no bracket and no escape. BREAK and <lora:…> have no escape."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def parse_prompt(prompt: str) -> Prompt:
    """A prompt of the language above.

    Warns, with columns counted from 1, of what is probably not meant. SettingsError for a weight that is no finite
    number, and for a LoRA tag that cannot be followed.
    """
    reading = _Reading(prompt)
    for found in LEXEMES.finditer(prompt):
        reading.take(found)
    return reading.finished()


def clip_skip_from_a1111(number: int) -> int:
    """A1111's "Clip skip" 1, 2, … -> `clip_skip` 0, 1, …, which is diffusers' numbering."""
    if number < 1:
        raise SettingsError(f"Clip skip {number}: A1111 counts from 1, which skips nothing.")
    return number - 1


# --- first walk: which bracket belongs to which -------------------------------------------------------------------------


@dataclass
class _Letters:
    """Plain text, from column `at`; `breaks` tells whether BREAK may stand in it."""

    at: int
    text: str
    breaks: bool = False


@dataclass
class _Bracket:
    """An opening bracket, and what it multiplies with; `partner` closes it."""

    at: int
    letter: str
    weight: float
    bar: bool = False  # a "|" stands in it, and in no bracket inside
    partner: "_Close | None" = None


@dataclass
class _Close:
    at: int
    letter: str
    opening: _Bracket


@dataclass
class _Reading:
    """The lexemes so far, and what there is to say about them: kind -> columns.

    Round and square brackets are matched apart from each other, as in A1111: "(a [b) c]" is well formed.
    """

    prompt: str
    items: list[_Letters | _Bracket | _Close] = field(default_factory=list)
    round: list[_Bracket] = field(default_factory=list)
    square: list[_Bracket] = field(default_factory=list)
    loras: list[tuple[str, float]] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)

    def take(self, found: re.Match[str]) -> None:
        """One lexeme."""
        at, text = found.start() + 1, found.group()
        if found["tag"]:
            self.take_tag(at, text)
        elif found["escaped"]:
            self.items.append(_Letters(at, found["escaped"]))
        elif found["weight"]:
            self.take_weight(at, text, found["weight"])
        elif found["odd"] and self.round:
            raise SettingsError(f'prompt, column {at}: "{text}" is no weight; write a finite number, such as (word:1.3).')
        elif found["when"]:
            self.take_when(at, text)
        elif found["bracket"]:
            self.take_bracket(at, text)
        else:
            if found["bar"] and self.square and (not self.round or self.square[-1].at > self.round[-1].at):
                self.square[-1].bar = True
            self.items.append(_Letters(at, text, breaks=True))

    def take_bracket(self, at: int, letter: str) -> None:
        if letter in "([":
            bracket = _Bracket(at, letter, ROUND if letter == "(" else SQUARE)
            (self.round if letter == "(" else self.square).append(bracket)
            self.items.append(bracket)
        elif waiting := self.round if letter == ")" else self.square:
            self.close(at, letter, waiting.pop())
        else:
            self.items.append(_Letters(at, letter))
            self.note("unopened", at)

    def close(self, at: int, letter: str, opening: _Bracket) -> None:
        if opening.bar and letter == "]":  # [a|b]
            self.note("missing", opening.at)
            opening.weight = 1.0
        opening.partner = _Close(at, letter, opening)
        self.items.append(opening.partner)

    def take_weight(self, at: int, text: str, number: str) -> None:
        """`:1.3)`"""
        weight = _number(number)
        if self.round and weight is not None:
            if not math.isfinite(weight):
                raise SettingsError(f'prompt, column {at}: the weight "{number:.20}" is beyond all numbers; write less.')
            self.round[-1].weight = weight
            self.take_bracket(at + len(text) - 1, ")")
            return
        if self.round:
            self.note("no number", at)
        self.items.append(_Letters(at, text[:-1]))
        self.take_bracket(at + len(text) - 1, ")")

    def take_when(self, at: int, text: str) -> None:
        """`:0.5`, with "]" behind it: the end of [from:to:when]."""
        if self.square:
            self.square[-1].bar = True
        self.items.append(_Letters(at, text))

    def take_tag(self, at: int, tag: str) -> None:
        kind, name, *rest = tag[1:-1].split(":")
        where = f'prompt, column {at}: "{textwrap.shorten(tag, 80)}"'
        if kind.lower() == "hypernet":
            self.note("hypernet", at)
            return
        weight = _number(rest[0]) if rest else 1.0
        if not name.strip():
            raise SettingsError(f"{where} names no adapter; write <lora:name:0.8>.")
        if len(rest) > 1:
            raise SettingsError(f"{where} has several weights; minidiff weighs an adapter as a whole: <lora:{name:.40}:0.8>.")
        if weight is None or not math.isfinite(weight):
            raise SettingsError(f"{where}: its weight is no finite number; write <lora:{name:.40}:0.8>.")
        self.loras.append((name.strip(), weight))

    def note(self, kind: str, at: int) -> None:
        self.notes.setdefault(kind, []).append(at)

    # --- second walk: the weight of every letter -----------------------------------------------------------------------

    def finished(self) -> Prompt:
        """The prompt, once every lexeme is taken; warns."""
        for bracket in self.round + self.square:
            self.note("unclosed", bracket.at)
        sections: list[list[Part]] = [[]]
        for at, text, weight, breaks in self.weighed():
            self.check_words(at, text, breaks)
            pieces = BREAK.split(text) if breaks else [text]
            for i, piece in enumerate(pieces):
                if len(pieces) > 1:  # BREAK takes the spaces beside it along
                    piece = piece.lstrip() if i == len(pieces) - 1 else piece.rstrip() if i == 0 else piece.strip()
                if i:
                    sections.append([])
                sections[-1].append(Part(piece, weight))
        for kind in sorted(self.notes):
            columns = sorted(self.notes[kind])
            warnings.warn(f"prompt, {_columns(columns)}: {MESSAGES[kind]}", stacklevel=3)
        return Prompt(tuple(map(_merged, sections)), tuple(self.loras))

    def weighed(self) -> list[tuple[int, str, float, bool]]:
        """(column, text, weight, may BREAK stand in it): weights of open brackets multiply, the two kinds apart."""
        scale = {"(": [1.0], "[": [1.0]}
        found: list[tuple[int, str, float, bool]] = []
        for item in self.items:
            weight = scale["("][-1] * scale["["][-1]
            if isinstance(item, _Letters):
                self.check_weight(item, weight)
                found.append((item.at, item.text, weight, item.breaks))
            else:
                opening = item.opening if isinstance(item, _Close) else item
                own = scale[opening.letter]
                if isinstance(item, _Close):
                    own.pop()
                else:
                    own.append(own[-1] * item.weight)
                if opening.bar and opening.partner:  # its brackets are letters
                    found.append((item.at, item.letter, weight, False))
        return found

    def check_weight(self, item: _Letters, weight: float) -> None:
        if not math.isfinite(weight):
            what = textwrap.shorten(item.text, 30)
            raise SettingsError(f'prompt, column {item.at}: the weights around "{what}" multiply to {weight}; use fewer.')
        if not 0 <= weight <= HEAVIEST and item.text.strip():
            self.note("heavy" if weight > 0 else "negative", item.at)

    def check_words(self, at: int, text: str, breaks: bool) -> None:
        """What is written as A1111 writes it, and is something else here."""
        if not breaks:
            return
        for found in AND.finditer(text):
            self.note("missing", at + found.start())


MESSAGES = {
    "heavy": f"weights above {HEAVIEST:g} tear pictures apart; 0.5 to 1.5 is usual.",
    "hypernet": "minidiff has no hypernetworks; the tag is left out.",
    "missing": "prompt editing [from:to:when], alternation [a|b] and AND are A1111's; minidiff does not have them and reads "
    "them as plain text. For a weight write (word:0.5).",
    "negative": "a weight below 0 turns a word around, which CLIP never learnt; put the word into the negative prompt.",
    "no number": "no number stands behind this colon, so it is text and the bracket weighs 1.1; write it as in (word:1.3).",
    "unclosed": "this bracket is never closed, and weighs all the rest; close it, or write \\( or \\[ for the letter.",
    "unopened": "this bracket was never opened, and is a letter; take it out, or write \\) or \\] for the letter.",
}


def _columns(columns: Sequence[int]) -> str:
    """Such as `columns 3, 17 and 12 more`."""
    named = ", ".join(map(str, columns[:5])) + (f" and {len(columns) - 5} more" if len(columns) > 5 else "")
    return f"column{'s' if len(columns) > 1 else ''} {named}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _merged(section: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbours of one weight are one part, so that a word broken up by markup alone is whole again."""
    runs = [("".join(part.text for part in run), weight) for weight, run in groupby(section, lambda part: part.weight)]
    return tuple(Part(text, weight) for text, weight in runs if text)
