"""Textual inversion: teach a frozen model one new word (arXiv 2208.01618).

No weight changes. A word such as `<dog>` gets n vectors beside the model's token table, and only they are learned:

    v* = arg min over v of E || eps - eps_theta(z_t, t, c(y)) ||²        eq. 2; c(y): a sentence with the word, encoded

    ids < V     a row of the token table, frozen
    ids >= V    a row of a new word

The table itself does not grow: in a larger table, AdamW's weight decay would move the old rows, too.

    row = inject(text_encoder).add("<dog>", initial_vectors(tokenizer, text_encoder, "dog", 2))    # train `row`
    encode(text_encoder, tokenize(tokenizer, ["a photo of <dog>"], placeholders(text_encoder)))

Shapes: B prompts, L tokens, D width of the text, V words in the table, n vectors of a new word.
"""

from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.core.errors import AdapterError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


class ExtendedEmbedding(nn.Module):
    """A frozen token table (V, D) and the rows of new words, fp32. Their ids follow those of the table."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.vectors = nn.ParameterList()  # (n, D) each; a list, because "<v1.5>" cannot name a parameter
        self.placeholders: dict[str, list[int]] = {}  # word -> ids, in the order of `vectors`

    def add(self, word: str, vectors: Tensor) -> nn.Parameter:
        """Give `word` the next n ids and a copy of `vectors` (n, D). Returns the copy, the Parameter to train."""
        row = nn.Parameter(vectors.detach().to(self.base.weight.device, torch.float32, copy=True))
        first = self.base.num_embeddings + sum(map(len, self.vectors))
        self.placeholders[word] = list(range(first, first + len(row)))
        self.vectors.append(row)
        return row

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, D), in the dtype of the table."""
        if not self.placeholders:
            return self.base(ids)
        V = self.base.num_embeddings
        known = self.base(ids.clamp(max=V - 1))
        new = F.embedding((ids - V).clamp(min=0), torch.cat(list(self.vectors)))
        return torch.where((ids >= V)[..., None], new.to(known.dtype), known)


def inject(text_encoder: "CLIPTextModel") -> ExtendedEmbedding:
    """Put an ExtendedEmbedding around the token table, unless it is there already. Without a new word, it changes nothing."""
    table: nn.Module = text_encoder.get_input_embeddings()
    if isinstance(table, nn.Embedding):
        text_encoder.set_input_embeddings(table := ExtendedEmbedding(table))
    assert isinstance(table, ExtendedEmbedding)
    return table


def eject(text_encoder: "CLIPTextModel") -> None:
    """Remove every new word: the same `nn.Embedding` returns, with the same bits (still frozen)."""
    if isinstance(table := text_encoder.get_input_embeddings(), ExtendedEmbedding):
        text_encoder.set_input_embeddings(table.base)


def placeholders(text_encoder: "CLIPTextModel") -> dict[str, list[int]]:
    """The new words and their ids, as `tokenize` wants them; empty where there are none."""
    return dict(getattr(text_encoder.get_input_embeddings(), "placeholders", {}))


def initial_vectors(tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel", words: str, count: int) -> Tensor:
    """The start of learning: `count` vectors (n, D), fp32, copied from the tokens of `words` in turn.

    Copies of the same token do not stay equal: their places in the prompt differ, and so do their gradients.
    """
    ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    if not 1 <= len(ids) <= count:
        raise AdapterError(f'"{words}" has {len(ids)} tokens for {count} vectors; take a word such as "dog", or more vectors.')
    in_turn = torch.tensor(list(islice(cycle(ids), count)), device=text_encoder.device)
    vectors: Tensor = text_encoder.get_input_embeddings()(in_turn)
    return vectors.detach().float()
