"""Prompt -> (B, 77, D): CLIP's text tower, the one network that minidiff takes from a library.

    prompt -> tokenizer -> ids (B, L) -> token + position embeddings -> causal transformer -> final LayerNorm -> (B, L, D)

L is 77 for every prompt: the start mark, at most 75 tokens, the end mark, and filling. Stable Diffusion reads all 77
positions, the filling too (there is no padding mask), and not the pooled vector that CLIP itself was trained on.

transformers 4 keeps the tower one level down, `text_model.encoder…`; transformers 5 has `encoder…`. Files of SD 1.5 have
the first form, and minidiff writes no other; weights.py reads both.

Shapes: B prompts, L = 77 tokens, D width (768 in SD 1.5, 128 in the pocket checkpoint).
"""

import json
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.errors import WeightsError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

LENGTH = 77  # positions that CLIP was trained with
PREFIX = "text_model."


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
    """The tokenizer of an SD folder (`<checkpoint>/tokenizer`): `vocab.json` and `merges.txt`, or `tokenizer.json`."""
    from transformers import CLIPTokenizer

    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        _check_vocabulary(folder)
    elif not (folder / "tokenizer.json").is_file():
        raise WeightsError(f"{folder}: no CLIP tokenizer here; vocab.json or merges.txt is missing. Copy the folder again.")
    try:  # the length is said outright: without tokenizer_config.json the library takes it for 10^30
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=LENGTH, local_files_only=True)
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise WeightsError(f"{folder}: the tokenizer cannot be read: {error}. Copy the folder again.") from error
    if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise WeightsError(f"{folder}: the start, end or padding token is not in the vocabulary; not a CLIP tokenizer.")
    return tokenizer


def _check_vocabulary(folder: Path) -> None:
    """Refuse files that do not belong together: the library reads a cut merges.txt in silence, and gets other ids."""
    try:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8")).keys()
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (ValueError, AttributeError, RecursionError) as error:  # not JSON, not UTF-8, not a table
        raise WeightsError(f"{folder}: vocab.json or merges.txt is damaged ({error}). Copy both again.") from error
    joined = {line.replace(" ", "") for line in lines if line and not line.startswith("#version")}
    longer = {token for token in vocabulary if len(token.removesuffix("</w>")) > 1}
    if odd := {token for token in joined ^ longer if not token.startswith("<|")}:  # the two marks are in no merge
        some = ", ".join(sorted(odd)[:3])
        raise WeightsError(f"{folder}: vocab.json and merges.txt disagree on {len(odd)} tokens ({some} …). Copy both again.")


def build_text_encoder(values: Mapping[str, Any], where: str) -> "CLIPTextModel":
    """The tower that `text_encoder/config.json` describes, with random weights; `where` names the file in errors.

    Under `torch.device("meta")` it takes no memory and no time; `weights.load_into` then brings the weights.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    if missing := [key for key in needed if key not in values]:
        raise WeightsError(f"{where}: not the configuration of a CLIP text model; {', '.join(missing)} missing.")
    if (positions := values.get("max_position_embeddings", LENGTH)) != LENGTH:
        raise WeightsError(f"{where}: max_position_embeddings is {positions}; the text tower of SD 1.x has {LENGTH}.")
    if (layers := values["num_hidden_layers"]) not in range(1, 101):
        raise WeightsError(f"{where}: num_hidden_layers is {layers!r}; CLIP's text towers have 12 to 32.")
    try:
        return CLIPTextModel(CLIPTextConfig(**values)).eval()
    except Exception as error:  # each version of the library checks in its own way and raises its own classes
        raise WeightsError(f"{where}: not a usable configuration: {error}.") from error


def to_file_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of either layout -> the keys of SD 1.5's files, with `text_model.` in front.

    `position_ids`, the numbers 0 … 76 that old files carry as if they were weights, are left out.
    """
    named = {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}
    return {key: value for key, value in named.items() if not key.endswith("embeddings.position_ids")}


def tokenize(tokenizer: "CLIPTokenizer", prompts: list[str], placeholders: Mapping[str, Sequence[int]] = {}) -> Tensor:
    """Prompts -> ids (B, 77), int64. Text beyond 75 tokens is lost; a warning quotes it.

    `placeholders` are the words of textual inversion and the ids of their vectors: {"<dog>": [49408, 49409]}. The word
    alone, in any case, stands for all of its vectors; the names that diffusers gives to the single vectors ("<dog>_1")
    mean nothing here.
    """
    rows = []
    for prompt in prompts:
        ids = token_ids(tokenizer, prompt, placeholders)
        kept, lost = ids[: LENGTH - 2], ids[LENGTH - 2 :]
        if lost:
            unread = textwrap.shorten(_spelled(tokenizer, lost, placeholders), 300, placeholder=" …")
            warnings.warn(
                f"the prompt is {len(ids)} tokens long and CLIP reads {LENGTH - 2}; cut off: "
                f'"{unread}". Say the important things first, or say less.',
                stacklevel=2,
            )
        marked = [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id]
        rows.append(marked + [tokenizer.pad_token_id] * (LENGTH - len(marked)))
    return torch.tensor(rows, dtype=torch.long).reshape(-1, LENGTH)


def token_ids(tokenizer: "CLIPTokenizer", text: str, placeholders: Mapping[str, Sequence[int]] = {}) -> list[int]:
    """Every id of a text, as many as it has and without the marks.

    The text between placeholders goes through the tokenizer piece by piece. CLIP never joins letters across the end of a
    word, so the pieces get the ids that they have in the whole.
    """
    words = sorted(placeholders, key=len, reverse=True)  # the first that fits wins: "<dog>s" before "<dog>"
    ids: list[int] = []
    end = 0
    for found in re.finditer("|".join(map(_whole_word, words)), text, re.IGNORECASE) if words else ():
        ids += tokenizer(text[end : found.start()], add_special_tokens=False, verbose=False).input_ids
        ids += placeholders[words[(found.lastindex or 0) - 1]]
        end = found.end()
    return ids + list(tokenizer(text[end:], add_special_tokens=False, verbose=False).input_ids)


def _whole_word(word: str) -> str:
    """A pattern, one group. A letter must not go on before or behind it: "sks" is not in "asks". After ">" anything may."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    behind = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}({re.escape(word)}){behind}"


def _spelled(tokenizer: "CLIPTokenizer", ids: list[int], placeholders: Mapping[str, Sequence[int]]) -> str:
    """Ids as text again, the vectors of a placeholder as its word."""
    word_of = {index: word for word, own in placeholders.items() for index in own}
    return " ".join(word or str(tokenizer.decode(list(run))) for word, run in groupby(ids, word_of.get))


def encode_prompt(
    tokenizer: "CLIPTokenizer",
    text_encoder: "CLIPTextModel",
    prompts: list[str],
    placeholders: Mapping[str, Sequence[int]] = {},
) -> Tensor:
    """Prompts -> (B, 77, D): the last hidden state after the final LayerNorm, on the encoder's device, in its dtype.

    Gradients flow if they are on (textual inversion wants them); callers who only read use `torch.no_grad()`.
    """
    ids = tokenize(tokenizer, prompts, placeholders).to(text_encoder.device)
    hidden: Tensor = text_encoder(input_ids=ids).last_hidden_state
    return hidden
