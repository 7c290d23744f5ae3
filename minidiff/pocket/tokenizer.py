"""A CLIP tokenizer of a few hundred tokens, in CLIP's own file format.

How CLIP turns text into ids (byte-pair encoding, Sennrich et al. 2016, arXiv:1508.07909, over bytes as in GPT-2):

1. Lower the case and split into words: runs of letters, single digits, runs of punctuation.
2. Spell each word in bytes. Each of the 256 bytes has a printable stand-in (a space is "Ġ"), so that the files are plain
   text; the last one carries `</w>`, the end of the word. "cat" is `c a t</w>`. No text is unknown: an emoji is four bytes.
3. Of all neighbours in the word, join the pair that stands highest in `merges.txt`; repeat until no pair is listed.
   `c a t</w>` -> `ca t</w>` -> `cat</w>`. A word of the merge list becomes one token, any other falls into pieces.
4. Look the pieces up in `vocab.json`, put `<|startoftext|>` in front and `<|endoftext|>` behind, and fill up to 77 ids.

The ids follow from the merges, in CLIP's order: 256 bytes, 256 bytes with `</w>`, one token for each merge, the two marks.
CLIP learned 48,894 merges from the text of the web; here some hundreds are learned from the captions of the pocket world.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
Word = tuple[str, ...]  # a word in pieces: ("ca", "t</w>")


def build_tokenizer(folder: Path, words: Iterable[str], rare: Sequence[str] = ("sks", "ohwx", "zwx")) -> None:
    """Write the `tokenizer` folder of an SD 1.5 checkpoint, learned from `words`: single words or whole captions.

    Every word of `words` becomes one token. So does each of `rare`, names for DreamBooth to fill with meaning; the same
    texts must not use them, or they would have a meaning already. The same words, in any order, give the same files.
    """
    counts = Counter(word for text in words for word in re.findall(r"[^\W\d_]+", text.lower()))
    if used := sorted(set(rare) & set(counts)):
        raise ValueError(f"rare tokens occur in the training texts: {', '.join(used)}")
    merges = learn_merges(counts | dict.fromkeys(rare, 0))
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    _write_json(folder / "special_tokens_map.json", marks)
    _write_json(folder / "tokenizer_config.json", settings | marks | {"tokenizer_class": "CLIPTokenizer"})


def learn_merges(counts: dict[str, int]) -> list[tuple[str, str]]:
    """Join the most frequent pair of neighbours, again and again, until every word of `counts` is one piece.

    Words that count 0 come last: they cannot change how any word of the training texts is cut.
    """
    words: dict[Word, int] = {_spell(word): count for word, count in counts.items()}
    merges: list[tuple[str, str]] = []
    while pairs := _count_pairs(words):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties: by the alphabet, not by the order of the words
        words = {_join(word, best): count for word, count in words.items()}
        merges.append(best)
    return merges


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, in CLIP's order of ids: "!" is 0.

    Printable Latin-1 bytes stand for themselves and come first; the other 68 borrow the letters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _spell(word: str) -> Word:
    """ "cat" -> ("c", "a", "t</w>")."""
    letters = byte_letters()
    *front, last = (letters[byte] for byte in word.encode())
    return (*front, last + "</w>")


def _count_pairs(words: dict[Word, int]) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def _join(word: Word, pair: tuple[str, str]) -> Word:
    """Join every occurrence of `pair`, from the left."""
    pieces: list[str] = []
    for piece in word:
        if pieces and (pieces[-1], piece) == pair:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return tuple(pieces)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
