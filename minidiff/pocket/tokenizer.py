"""A CLIP tokenizer of a few hundred tokens, in CLIP's own file format.

How CLIP turns text into ids (byte-pair encoding, Sennrich et al. 2016, arXiv:1508.07909, over bytes as in GPT-2):

1. Lower the case and split into words: runs of letters, single digits, runs of punctuation.
2. Spell each word in bytes. Each of the 256 bytes has a printable stand-in (a space is "Ġ"), so that the files are plain
   text; the last one carries `</w>`, the end of the word. "cat" is `c a t</w>`. No text is unknown: an emoji is four bytes.
3. Of all neighbours in the word, join the pair that stands highest in `merges.txt`; repeat until no pair is listed.
   `c a t</w>` -> `ca t</w>` -> `cat</w>`. A word of the merge list becomes one token, any other falls into pieces.
4. Look the pieces up in `vocab.json`, put `<|startoftext|>` in front and `<|endoftext|>` behind, and fill up to 77 ids.

The ids follow from the merges, in CLIP's order: 256 bytes, 256 bytes with `</w>`, one token for each merge, the two marks.
CLIP learned 48,894 merges from the text of the web. Here the `tokenizers` library learns some hundreds from the captions of the
pocket world.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minidiff.files.folder import write_json

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path, words: Iterable[str], rare: Sequence[str] = ("sks", "ohwx", "zwx")) -> None:
    """Write the `tokenizer` folder of an SD 1.5 checkpoint, learned from `words`: single words or whole captions.

    Every word of `words` becomes one token. So does each of `rare`, names that DreamBooth fills with meaning. The texts must
    not use these names: they would have a meaning already. The same words, in any order, give the same files.
    """
    counts = Counter(word for text in words for word in re.findall(r"[^\W\d_]+", text.lower()))
    merges = learn_merges(counts, rare)
    tokens = [*alphabet(), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    write_json(folder / "special_tokens_map.json", marks)
    write_json(folder / "tokenizer_config.json", settings | marks | {"tokenizer_class": "CLIPTokenizer"})


def alphabet() -> list[str]:
    """A printable letter for each byte, in CLIP's order ("!" is 0); then the same letters with the end of a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(letter + "</w>" for letter in letters)]


def learn_merges(counts: dict[str, int], rare: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The merges that make every word of `counts` one piece. Those of the `rare` words come last and change no other word."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=10**6,
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=alphabet(),  # type: ignore[arg-type]  # gives each letter a fixed id, and ids decide between equal counts
    )
    tokenizer.train_from_iterator((word for word, count in sorted(counts.items()) for _ in range(count)), trainer)
    merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
    for word in rare:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # from the left: "s k s</w>" -> "sk s</w>" -> "sks</w>"
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    return merges
