r"""A1111's prompt language: weights, BREAK, LoRAs by name; then its chunks, and the vectors of weighted tokens.

    (x)    x 1.1                      nested brackets multiply
    [x]    / 1.1                      \( \) \[ \] \\     the letters themselves
    (x:1.3)  x 1.3                    BREAK              the text after it begins a new chunk of 75 tokens
    <lora:name:0.8>                   switches an adapter on; it is no part of the text

    "a [red] (dog:1.3) BREAK on a beach <lora:chalk:0.8>"
        sections  ("a " x 1, "red" x 0.909, " " x 1, "dog" x 1.3), ("on a beach " x 1)
        loras     chalk at 0.8

Malformed brackets are read as plain letters, as in A1111, and a warning names their column. A malformed LoRA tag is refused.
Parsing takes linear time.

A prompt becomes k chunks of 75 tokens. Each is encoded alone, between its own marks, and the states are concatenated: the
U-Net's cross-attention takes any number of them. SDXL's pooled vector is that of the first chunk, and has no weights.

Shapes: B prompts, D width of the text, P width of the pooled vector.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minidiff.core.errors import SettingsError
from minidiff.core.guidance import Text
from minidiff.core.text import TextEncoders, pieces, with_marks

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

FACTORS = {"(": 1.1, "[": 1 / 1.1}
CHUNK, MOST_CHUNKS = 75, 100  # tokens, without the two marks
STANDS_OUT = 0.01  # times the standard deviation: a mean below it is chance

Token = tuple[int, float]  # id, weight
Encoded = Sequence[Tensor | None]  # prompt_embeds (B, 77 k, D) and pooled_prompt_embeds (B, P), from the caller
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")

NUMBER = r"[+-]? (?: \d{1,9} (?: \. \d* )? | \. \d+ )"
LEXEMES = re.compile(
    rf"""
    (?P<tag> < (?: lora | lyco ) : (?P<name> [^<>:]* [^<>:\s] ) \s* (?: : \s* (?P<strength> {NUMBER} ) \s* )? > )
  | (?P<bad_tag> < (?: lora | lyco ) : )
  | \\ (?P<escaped> [()\[\]\\] )
  | : \s* (?P<weight> {NUMBER} ) \s* (?= \) )
  | (?P<open>  [(\[] )
  | (?P<close> [)\]] )
  | (?P<text>  [^<\\:()\[\]]+ | . )
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
BREAK = re.compile(r"\bBREAK\b")
NOT_HERE = re.compile(r"\bAND\b | (?<!\\) \[ [^\[\]|]* (?: \| | : \s* [.\d]+ \s* \] )", re.VERBOSE)

UNCLOSED = r"an opening bracket without its closing one; it weighs all the rest. Close it, or write \( or \[."
UNOPENED = r"a closing bracket without its opening one, which is read as text. Take it out, or write \) or \]."
MISSING = (
    "prompt editing [from:to:when], alternation [a|b] and AND are A1111's; minidiff does not have them, and reads the words as "
    "plain text. A weight is written (word:0.5)."
)


class Part(NamedTuple):
    """A piece of text without its markup, and its weight."""

    text: str
    weight: float


class Prompt(NamedTuple):
    """A parsed prompt: parts in the sections between BREAKs (at least one, perhaps empty); adapters in order, with weights."""

    sections: tuple[tuple[Part, ...], ...]
    loras: tuple[tuple[str, float], ...] = ()


def literal(caption: str) -> str:
    """The prompt that means the letters of a caption: training reads captions without the prompt language."""
    text = re.sub(r"[()\[\]\\]", r"\\\g<0>", caption)
    text = re.sub(r"<(?=(lora|lyco):)", "< ", text, flags=re.IGNORECASE)  # the tokenizer takes no notice of this space,
    return re.sub(r"\b(BREAK|AND)\b", lambda word: word[0].lower(), text)  # nor of capitals


@dataclass
class Bracket:
    """A pair of brackets in the prompt."""

    factor: float
    outer: "Bracket | None" = None  # the next pair of the same kind around it
    start: int = 0
    product: float = 1.0  # of its factor, and those of the brackets around it


def parse_prompt(prompt: str) -> Prompt:
    """Parse a prompt. Without brackets and BREAK it is one part of weight 1, with its text unchanged.

    Warns of probable mistakes; columns count from 1. SettingsError for weights that are not finite, and malformed LoRA tags.
    """
    opened = {"(": [Bracket(1.0)], "[": [Bracket(1.0)]}  # innermost last; the two kinds are matched separately, as in A1111
    brackets, texts = list[Bracket](), list[tuple[str, int, Bracket, Bracket]]()
    loras, notes = list[tuple[str, float]](), dict[str, int]()
    for lexeme in LEXEMES.finditer(prompt):
        kind, text, start = lexeme.lastgroup, lexeme.group(), lexeme.start()
        own = opened["[" if text in "[]" else "("]
        if kind == "tag":
            loras.append((lexeme["name"].strip(), float(lexeme["strength"] or 1)))
        elif kind == "bad_tag":
            raise SettingsError(f"prompt, column {start + 1}: a LoRA tag has a name and one weight, <lora:name:0.8>.")
        elif kind == "open":
            own.append(Bracket(FACTORS[text], own[-1], start))
            brackets.append(own[-1])
        elif kind == "weight" and len(own) > 1:
            own[-1].factor = float(lexeme["weight"])  # its closing bracket is the next lexeme
        elif kind == "close" and len(own) > 1:
            own.pop()
        else:
            if kind == "close":
                notes.setdefault(UNOPENED, start)
            texts.append((text[1:] if kind == "escaped" else text, start, opened["("][-1], opened["["][-1]))
    for bracket in brackets:  # outer ones come first
        bracket.product = bracket.factor * (bracket.outer.product if bracket.outer else 1)
    sections = [list[Part]()]
    for text, start, round_, square in texts:
        weight, (first, *others) = round_.product * square.product, BREAK.split(text)
        if not math.isfinite(weight):
            raise SettingsError(f"prompt, column {start + 1}: the weights around this multiply to {weight}; use fewer.")
        sections[-1].append(Part(first.rstrip() if others else first, weight))  # BREAK takes the spaces around it along
        for number, piece in enumerate(others, start=1):
            sections.append([Part(piece.strip() if number < len(others) else piece.lstrip(), weight)])
    if unclosed := opened["("][1:] + opened["["][1:]:
        notes[UNCLOSED] = min(bracket.start for bracket in unclosed)
    if found := NOT_HERE.search(prompt):
        notes[MISSING] = found.start()
    for note, start in notes.items():
        place = " ".join(prompt[start : start + 16].split())
        warnings.warn(f'prompt, column {start + 1} ("{place}"): {note}', stacklevel=1)  # Python shows it once per line
    # as in A1111, neighbours of the same weight are joined: a word that markup has cut becomes one word again
    runs = [[(w, "".join(part.text for part in run)) for w, run in groupby(s, lambda part: part.weight)] for s in sections]
    return Prompt(tuple(tuple(Part(text, w) for w, text in own if text) for own in runs), tuple(loras))


# --- chunks ------------------------------------------------------------------------------------------------------------


def chunked(tokenizer: "CLIPTokenizer", prompt: Prompt, placeholders: Mapping[str, Sequence[int]] = {}) -> list[list[Token]]:
    """The chunks of a prompt, at least one: ids and weights, at most 75 in each, without the marks.

    The vectors of a placeholder stay together. BREAK ends a chunk, full or not.
    """
    chunks: list[list[Token]] = []
    for section in prompt.sections:
        chunks.append([])
        for part in section:
            for ids in pieces(tokenizer, part.text, placeholders):
                if len(chunks[-1]) + len(ids) > CHUNK:
                    chunks.append([])
                chunks[-1] += [(index, part.weight) for index in ids]
    if len(chunks) > 1 and not chunks[-1]:  # nothing after the last BREAK
        chunks.pop()
    if len(chunks) > MOST_CHUNKS:
        raise SettingsError(f"the prompt fills {len(chunks)} chunks of {CHUNK} tokens; {MOST_CHUNKS} is the limit.")
    return chunks


def encode_prompts(
    tokenizer: "CLIPTokenizer", encoders: TextEncoders, prompts: Sequence[Prompt],
    placeholders: Mapping[str, Sequence[int]] = {}, clip_skip: int = 0, chunks: int = 1,
) -> Text:  # fmt: skip
    """Prompts -> states (B, 77 k, D), in SDXL also pooled vectors (B, P), on the encoders' device, in their dtype.

    k is the number of chunks of the longest prompt, at least `chunks`; empty chunks are added to the others. `clip_skip` = n
    takes the states n layers before the last (diffusers' numbering; A1111's is one higher). Gradients flow if they are on.
    """
    configs: list[Any] = [tower.config for tower in encoders.towers]
    layers = configs[0].num_hidden_layers
    if not isinstance(clip_skip, int) or clip_skip not in range(layers):
        a1111 = f"A1111's Clip skip counts one higher: 1 to {layers}"
        raise SettingsError(f"clip_skip is {clip_skip}; this text encoder has {layers} layers: 0 to {layers - 1}. {a1111}.")
    split = [chunked(tokenizer, prompt, placeholders) for prompt in prompts]
    k = max(chunks, *map(len, split))
    flat = [chunk for own in split for chunk in own + [[]] * (k - len(own))]  # B k chunks, those of a prompt side by side
    ids = torch.tensor([with_marks(tokenizer, [index for index, _ in chunk]) for chunk in flat])
    hidden, *pooled = encoders(ids, clip_skip)  # (B k, 77, D); (B k, P)
    states = []
    for z, chunk in zip(hidden, flat):
        weights = [weight for _, weight in chunk]
        towers = z.split([config.hidden_size for config in configs], dim=-1)  # in A1111, each has a mean of its own
        states.append(torch.cat([_weighted(own, weights) for own in towers], dim=-1) if any(w != 1 for w in weights) else z)
    return torch.stack(states).reshape(len(prompts), -1, hidden.shape[-1]), *(vectors[::k] for vectors in pooled)


def _weighted(z: Tensor, weights: list[float]) -> Tensor:
    """States (77, D) times the weights of their tokens, with the mean that they had before. Marks and padding weigh 1.

    A1111's rule (sd_emphasis.py, "Original"):  z' = z w,  z'' = z' mean(z) / mean(z'). Where a mean is small beside the
    standard deviation (0.001 beside 1 in the pocket checkpoint), the quotient is chance: it can enlarge all states (A1111's
    issue 14867) or change their sign. Then z' is the result, as with A1111's "No norm".
    """
    before = z.float()
    after = before * before.new_tensor([1.0, *weights] + [1.0] * (len(z) - 1 - len(weights)))[:, None]
    old, new = before.mean(), after.mean()
    chance = (old.abs() < STANDS_OUT * before.std()) | (new.abs() < STANDS_OUT * after.std()) | (old * new < 0)
    return (after if chance else after * (old / new)).to(z.dtype)


# --- the two sides of a call -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """The prompts of a call, or its negative prompts."""

    count: int
    prompts: list[Prompt]
    encoded: Text = ()  # in place of the prompts
    zeros: bool = False  # in place of the prompts
    sizes: tuple[int, ...] = ()  # SDXL: original height and width, top and left of the crop, target height and width


def both_sides(given: tuple[Any, Encoded], negative: tuple[Any, Encoded], per_prompt: int) -> tuple[Side, Side]:
    """Prompts and negative prompts from (text or texts, or encoded prompts instead): each prompt `per_prompt` times, and a
    negative prompt for each."""
    if per_prompt < 1:
        raise SettingsError(f"num_images_per_prompt is {per_prompt}; it must be at least 1.")
    if (given[0] is None) == (given[1][0] is None):
        raise SettingsError("give either a prompt or prompt_embeds.")
    read: list[tuple[int, list[Prompt], Text]] = []
    for texts, embeds in (given, negative):
        encoded = tuple(finite_floats(name, one) for name, one in zip(EMBEDS, embeds) if one is not None)
        row = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if not encoded and not all(isinstance(text, str) for text in row):
            raise SettingsError("prompt and negative_prompt must be a text, or a list of texts.")
        prompts = [] if encoded else [parse_prompt(text) for text in row]
        read.append((len(encoded[0] if encoded else prompts), prompts, encoded))
    (count, *_), (negatives, *_) = read
    if not count or negatives not in (1, count):
        raise SettingsError(f"{negatives} negative prompts for {count} prompts; give one, or one for each.")
    sides = []
    for own, prompts, encoded in read:
        times = count * per_prompt // own
        repeated = tuple(part.repeat_interleave(times, dim=0) for part in encoded)
        sides.append(Side(own * times, [one for one in prompts for _ in range(times)], repeated))
    return sides[0], sides[1]


def finite_floats(name: str, given: Tensor) -> Tensor:
    """The tensor itself; SettingsError if it is not a tensor of finite floats."""
    if not isinstance(given, Tensor) or not given.is_floating_point() or not given.ndim or not given.isfinite().all():
        raise SettingsError(f"{name} must be a tensor of floats, without NaN and infinity.")
    return given
