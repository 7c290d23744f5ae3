"""Prompt -> (B, 77, D): CLIP's text tower (arXiv 2103.00020), the one network that minidiff takes from a library.

    prompt -> tokenizer -> ids (B, 77) -> token and position embeddings -> causal transformer -> LayerNorm -> (B, 77, D)

Every text has 77 ids: a start mark, at most 75 tokens, an end mark, and padding. Stable Diffusion reads all 77 positions,
the padding too. CLIP itself was trained on one "pooled" vector, the state at the end mark. SDXL has two towers, and reads the
pooled vector of the second one, too.

    B prompts   D width of the text, 768 in SD 1.5 and 128 in the pocket checkpoint   P width of the pooled vector
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff.core.blocks import timestep_embedding

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

LENGTH = 77  # positions that CLIP was trained with


def encode(text_encoder: "CLIPTextModel", ids: Tensor, clip_skip: int = 0) -> Tensor:
    """ids (B, 77) -> (B, 77, D): the states after the last layer, or after an earlier one (`clip_skip`); then the LayerNorm."""
    states, norm = hidden_states(text_encoder, ids)
    hidden: Tensor = norm(states[-1 - clip_skip])
    return hidden


def hidden_states(text_encoder: Any, ids: Tensor) -> tuple[Sequence[Tensor], nn.Module]:
    """The embeddings and the output of each layer, all (B, 77, D); and the final LayerNorm."""
    states = text_encoder(input_ids=ids.to(text_encoder.device), output_hidden_states=True).hidden_states
    return states, getattr(text_encoder, "text_model", text_encoder).final_layer_norm  # transformers 4, transformers 5


class TextEncoders(nn.Module):
    """The text towers of a model: one, or SDXL's two, which read the same ids (arXiv 2307.01952, section 2.1)."""

    def __init__(self, towers: Iterable[nn.Module], end: int = 0, pad: int = 0) -> None:
        super().__init__()
        self.towers, self.end, self.pad = nn.ModuleList(towers), end, pad

    def forward(self, ids: Tensor, clip_skip: int = 0) -> tuple[Tensor, ...]:
        """ids (B, 77) -> states (B, 77, D); in SDXL, D is the width of both towers, and pooled vectors (B, P) follow."""
        tower, *others = list[Any](self.towers)
        if not others:
            return (encode(tower, ids, clip_skip),)
        end = (ids == self.end).int().argmax(dim=1)  # the first end mark of each row
        behind = torch.arange(LENGTH, device=ids.device) > end[:, None]  # there the second tower has its own padding, "!"
        (first, _), (second, norm) = map(hidden_states, self.towers, (ids, ids.masked_fill(behind, self.pad)))
        states = torch.cat([first[-2 - clip_skip], second[-2 - clip_skip]], dim=-1)  # before the last layers; without LayerNorm
        at_end = norm(second[-1])[torch.arange(len(ids)), end.to(states.device)]  # (B, D of the second tower)
        return states, others[0].text_projection(at_end)


def embed_sizes(sizes: Tensor, width: int) -> Tensor:
    """The second part of SDXL's vector, behind the pooled one: sizes (B, 6) -> (B, 6 width), fp32.

    The sizes are height and width of the picture before it was scaled; top and left of its crop; height and width of what is
    drawn (arXiv 2307.01952, section 2.2). Half precision is too coarse for them: there 4095 is 4096.
    """
    return timestep_embedding(sizes.flatten(), width).reshape(len(sizes), -1)


def tokenize(tokenizer: "CLIPTokenizer", captions: Sequence[str], placeholders: Mapping[str, Sequence[int]] = {}) -> Tensor:
    """Captions -> ids (B, 77), int64. Text beyond 75 tokens is cut off; a warning quotes it.

    `placeholders`: words of textual inversion and their ids, as {"<dog>": [49408, 49409]}. Upper and lower case are the same.
    """
    rows = []
    for caption in captions:
        ids = token_ids(tokenizer, caption, placeholders)
        if lost := ids[LENGTH - 2 :]:
            unread = f'"{spelled(tokenizer, lost, placeholders):.300}"'
            warnings.warn(f"the prompt has {len(ids)} tokens and CLIP reads {LENGTH - 2}; cut off: {unread}.", stacklevel=2)
        rows.append(with_marks(tokenizer, ids[: LENGTH - 2]))
    return torch.tensor(rows, dtype=torch.long).reshape(-1, LENGTH)


def with_marks(tokenizer: "CLIPTokenizer", ids: Sequence[int]) -> list[int]:
    """At most 75 ids between the start mark and the end mark, padded to 77."""
    marked = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return marked + [tokenizer.pad_token_id] * (LENGTH - len(marked))


def token_ids(tokenizer: "CLIPTokenizer", text: str, placeholders: Mapping[str, Sequence[int]] = {}) -> list[int]:
    """All ids of a text of any length, without the marks."""
    return [index for ids in pieces(tokenizer, text, placeholders) for index in ids]


def pieces(tokenizer: "CLIPTokenizer", text: str, placeholders: Mapping[str, Sequence[int]]) -> Iterator[Sequence[int]]:
    """The ids of a text: all ids of a placeholder together, every other id alone.

    The tokenizer gets the text between placeholders piece by piece. CLIP never joins letters across the end of a word, so the
    pieces get the same ids as in the whole text.
    """
    words = sorted(placeholders, key=len, reverse=True)  # "<dog>s" before "<dog>"
    edge = r"(?!(?<=\w)\w)"  # not between two letters: "sks" does not match inside "asks"
    pattern = f"{edge}({'|'.join(map(re.escape, words))}){edge}"
    for i, part in enumerate(re.split(pattern, text, flags=re.IGNORECASE) if words else [text]):
        if i % 2 == 0:  # between two placeholders
            yield from ([index] for index in tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
        else:
            yield next(placeholders[word] for word in words if re.fullmatch(re.escape(word), part, re.IGNORECASE))


def spelled(tokenizer: "CLIPTokenizer", ids: list[int], placeholders: Mapping[str, Sequence[int]]) -> str:
    """Ids as text again; the ids of a placeholder as its word."""
    word_of = {index: word for word, own in placeholders.items() for index in own}
    return " ".join(word or str(tokenizer.decode(list(run))) for word, run in groupby(ids, word_of.get))
