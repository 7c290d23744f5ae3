"""Prompt -> (B, 77 k, D): CLIP's text tower, the one network that minidiff takes from a library.

    prompt -> tokenizer -> ids (B, L) -> token + position embeddings -> causal transformer -> final LayerNorm -> (B, L, D)

L is 77 for every text: the start mark, at most 75 tokens, the end mark, and filling. Stable Diffusion reads all 77
positions, the filling too (there is no padding mask), and not the pooled vector that CLIP itself was trained on.

A caption has just these 77 positions. A longer prompt becomes k chunks of 75 tokens, each encoded alone between marks of
its own, and their states are laid side by side: the U-Net's cross-attention takes any number of them.

transformers 4 keeps the tower one level down, `text_model.encoder…`; transformers 5 has `encoder…`. Files of SD 1.5 have
the first form, and minidiff writes no other; weights.py reads both.

Shapes: B prompts, k chunks, L = 77 positions, D width (768 in SD 1.5, 128 in the pocket checkpoint).
"""

import json
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff.core.errors import SettingsError, WeightsError
from minidiff.draw.prompting import Prompt

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

LENGTH = 77  # positions that CLIP was trained with
PREFIX = "text_model."
COMMA_REACH = 20  # tokens; A1111's setting "Increase coherency by padding from the last comma within n tokens"
MAX_CHUNKS = 100  # A1111 has no limit, but memory has
STANDS_OUT = 0.01  # times the spread: a mean below it is chance

Token = tuple[int, float]  # id, weight


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


# --- tokens ------------------------------------------------------------------------------------------------------------


def tokenize(tokenizer: "CLIPTokenizer", prompts: list[str], placeholders: Mapping[str, Sequence[int]] = {}) -> Tensor:
    """Prompts -> ids (B, 77), int64. Text beyond 75 tokens is lost; a warning quotes it.

    `placeholders` are the words of textual inversion and the ids of their vectors: {"<dog>": [49408, 49409]}. The word
    alone, in any case, stands for all of its vectors; the names that diffusers gives to the single vectors ("<dog>_1")
    mean nothing here.
    """
    rows = [_marked(tokenizer, _read_by_clip(tokenizer, prompt, placeholders)) for prompt in prompts]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, LENGTH)


def _read_by_clip(tokenizer: "CLIPTokenizer", text: str, placeholders: Mapping[str, Sequence[int]]) -> list[int]:
    """The first 75 ids of a text; a warning quotes the rest."""
    ids = token_ids(tokenizer, text, placeholders)
    kept, lost = ids[: LENGTH - 2], ids[LENGTH - 2 :]
    if lost:
        unread = textwrap.shorten(spelled(tokenizer, lost, placeholders), 300, placeholder=" …")
        warnings.warn(
            f"the prompt is {len(ids)} tokens long and CLIP reads {LENGTH - 2}; cut off: "
            f'"{unread}". Say the important things first, or say less.',
            stacklevel=3,
        )
    return kept


def _marked(tokenizer: "CLIPTokenizer", ids: Sequence[int]) -> list[int]:
    """At most 75 ids between the marks, filled up to 77."""
    marked = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return marked + [tokenizer.pad_token_id] * (LENGTH - len(marked))


def token_ids(tokenizer: "CLIPTokenizer", text: str, placeholders: Mapping[str, Sequence[int]] = {}) -> list[int]:
    """Every id of a text, as many as it has and without the marks."""
    return [index for ids in _units(tokenizer, text, placeholders) for index in ids]


def _units(tokenizer: "CLIPTokenizer", text: str, placeholders: Mapping[str, Sequence[int]]) -> Iterator[Sequence[int]]:
    """The ids of a text; those of a placeholder's vectors together, every other alone.

    The text between placeholders goes through the tokenizer piece by piece. CLIP never joins letters across the end of a
    word, so the pieces get the ids that they have in the whole.
    """
    words = sorted(placeholders, key=len, reverse=True)  # the first that fits wins: "<dog>s" before "<dog>"
    end = 0
    for found in re.finditer("|".join(map(_whole_word, words)), text, re.IGNORECASE) if words else ():
        yield from ([index] for index in plain_ids(tokenizer, text[end : found.start()]))
        yield placeholders[words[(found.lastindex or 0) - 1]]
        end = found.end()
    yield from ([index] for index in plain_ids(tokenizer, text[end:]))


def plain_ids(tokenizer: "CLIPTokenizer", text: str) -> list[int]:
    """The ids of a text in which no placeholder stands."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _whole_word(word: str) -> str:
    """A pattern, one group. A letter must not go on before or behind it: "sks" is not in "asks". After ">" anything may."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    behind = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}({re.escape(word)}){behind}"


def spelled(tokenizer: "CLIPTokenizer", ids: list[int], placeholders: Mapping[str, Sequence[int]]) -> str:
    """Ids as text again, the vectors of a placeholder as its word."""
    word_of = {index: word for word, own in placeholders.items() for index in own}
    return " ".join(word or str(tokenizer.decode(list(run))) for word, run in groupby(ids, word_of.get))


# --- chunks ------------------------------------------------------------------------------------------------------------


def chunked(tokenizer: "CLIPTokenizer", prompt: Prompt, placeholders: Mapping[str, Sequence[int]] = {}) -> list[list[Token]]:
    """The chunks of a prompt: ids and weights, at most 75 in each, without the marks. One at least.

    As A1111 cuts: where a full chunk has a comma among its last 20 tokens, what stands behind it moves on to the next.
    The vectors of a placeholder stay together. BREAK ends a chunk, full or not. SettingsError beyond 100 chunks.
    """
    comma = plain_ids(tokenizer, ",")
    chunks: list[list[Token]] = []
    for section in prompt.sections:
        chunks.append([])
        for part in section:
            for ids in _units(tokenizer, part.text, placeholders):
                while chunks[-1] and len(chunks[-1]) + len(ids) > LENGTH - 2:
                    chunks.append([] if list(ids) == comma else _moved_on(chunks[-1], comma))
                chunks[-1] += [(index, part.weight) for index in ids]
    if len(chunks) > 1 and not chunks[-1]:  # nothing after the last BREAK
        chunks.pop()
    if len(chunks) > MAX_CHUNKS:
        raise SettingsError(f"the prompt fills {len(chunks)} chunks of {LENGTH - 2} tokens; {MAX_CHUNKS} is the limit.")
    return chunks


def _moved_on(full: list[Token], comma: list[int]) -> list[Token]:
    """Take what stands behind the last comma out of a full chunk, if that is near its end."""
    near = [i for i, (index, _) in enumerate(full) if [index] == comma and len(full) - i <= COMMA_REACH]
    moved = full[near[-1] + 1 :] if near and len(full) == LENGTH - 2 else []
    del full[len(full) - len(moved) :]
    return moved


def count_chunks(
    tokenizer: "CLIPTokenizer", prompts: Sequence[str | Prompt], placeholders: Mapping[str, Sequence[int]] = {}
) -> int:
    """How many chunks the longest of some prompts needs; captions need one."""
    return max((len(chunked(tokenizer, p, placeholders)) for p in prompts if isinstance(p, Prompt)), default=1)


# --- encoding ----------------------------------------------------------------------------------------------------------


def encode_prompt(
    tokenizer: "CLIPTokenizer",
    text_encoder: "CLIPTextModel",
    prompts: Sequence[str | Prompt],
    placeholders: Mapping[str, Sequence[int]] = {},
    *,
    clip_skip: int = 0,
    chunks: int = 1,
) -> Tensor:
    """Prompts -> (B, 77 k, D): states after the final LayerNorm, on the encoder's device, in its dtype.

    A text is a caption: read as it stands, and cut off at 75 tokens with a warning. A `Prompt`, from `parse_prompt`, has
    weights and any length. k is what the longest needs, and `chunks` at least; the others are filled with empty chunks.
    `clip_skip` = n takes the states n layers before the last (diffusers' numbering; A1111's is one higher).

    Gradients flow if they are on (textual inversion wants them); callers who only read use `torch.no_grad()`.
    """
    _check_clip_skip(text_encoder, clip_skip)
    read = [_chunks_of(tokenizer, prompt, placeholders) for prompt in prompts]
    k = max(chunks, *map(len, read))
    flat = [chunk for own in read for chunk in own + [[]] * (k - len(own))]  # B k of them, a prompt's own side by side
    ids = torch.tensor([_marked(tokenizer, [index for index, _ in chunk]) for chunk in flat])
    hidden = _states(text_encoder, ids.to(text_encoder.device), clip_skip)  # (B k, 77, D)
    weighed = [_weighed(z, [weight for _, weight in chunk]) for z, chunk in zip(hidden, flat)]
    return torch.stack(weighed).reshape(len(prompts), k * LENGTH, -1)


def _chunks_of(
    tokenizer: "CLIPTokenizer", prompt: str | Prompt, placeholders: Mapping[str, Sequence[int]]
) -> list[list[Token]]:
    if isinstance(prompt, Prompt):
        return chunked(tokenizer, prompt, placeholders)
    return [[(index, 1.0) for index in _read_by_clip(tokenizer, prompt, placeholders)]]


def _states(text_encoder: "CLIPTextModel", ids: Tensor, clip_skip: int) -> Tensor:
    """ids (N, 77) -> (N, 77, D). The last states come out of the tower with the LayerNorm; earlier ones without it."""
    if not clip_skip:
        last: Tensor = text_encoder(input_ids=ids).last_hidden_state
        return last
    states = text_encoder(input_ids=ids, output_hidden_states=True).hidden_states  # the embeddings, then every layer's
    norm: nn.Module = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    hidden: Tensor = norm(states[-1 - clip_skip])
    return hidden


def _weighed(z: Tensor, weights: list[float]) -> Tensor:
    """States (77, D) times the weights of their tokens, with the mean that they had before. Marks and filling weigh 1.

    The rule is A1111's, "prompt weights" (sd_emphasis.py, "Original"):  z' = z w,  z'' = z' mean(z) / mean(z')
    There the mean is over a batch, here over the chunk alone, so that a prompt's states do not depend on its neighbours.
    Where a mean is lost in the spread (0.001 beside 1 in the pocket checkpoint), the quotient is chance: it can blow all
    states up (A1111's issue 14867), or turn them around. There z' stays as it is, which is A1111's "No norm".
    """
    if all(weight == 1 for weight in weights):
        return z
    before = z.float()
    w = torch.tensor([1.0, *weights] + [1.0] * (LENGTH - 1 - len(weights)), device=z.device)
    after = before * w[:, None]
    old, new = before.mean(), after.mean()
    lost = (old.abs() < STANDS_OUT * before.std()) | (new.abs() < STANDS_OUT * after.std()) | (old * new < 0)
    if not lost:
        after = after * (old / new)
    return after.to(z.dtype)


def _check_clip_skip(text_encoder: "CLIPTextModel", clip_skip: int) -> None:
    layers = text_encoder.config.num_hidden_layers
    if not isinstance(clip_skip, int) or clip_skip not in range(layers):
        raise SettingsError(
            f"clip_skip is {clip_skip}; this text encoder has {layers} layers, so it is 0 (none skipped) to {layers - 1}. "
            f"A1111's Clip skip counts one higher: 1 to {layers}."
        )
