"""Textual inversion: teach a frozen model one new word (arXiv 2208.01618).

No weight changes. The word, such as `<dog>`, gets n vectors beside the model's token table, and only they are learned:

    v* = arg min over v of E || eps - eps_theta(z_t, t, c(y)) ||²        eq. 2; c(y): a sentence with the word, encoded

    ids < V     the row of the token table, frozen; it is never resized
    ids >= V    the row of a new word

So the optimizer holds nothing but the new vectors. (If the table were enlarged, AdamW's weight decay would move its other
49,408 rows, too.)

    row = add_word(tokenizer, text_encoder, "<dog>", initial_vectors(tokenizer, text_encoder, "dog", 2))    # train `row`
    encode_captions(tokenizer, text_encoder, ["a photo of <dog>"], placeholders(text_encoder))
    eject(text_encoder)

Shapes: B prompts, L tokens, D width of the text, V words in the table, n vectors of a new word.
"""

from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.core.errors import AdapterError
from minidiff.core.text import LENGTH

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

MAX_VECTORS = LENGTH - 2  # a prompt has room for no more


class ExtendedEmbedding(nn.Module):
    """A frozen token table and the rows of new words, which take the ids behind it.

    The rows are fp32 whatever the dtype of the table. Cast the model before, not after.
    """

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.vectors = nn.ParameterList()  # (n, D) each; a list, because "<v1.5>" cannot name a parameter
        self.placeholders: dict[str, list[int]] = {}  # word -> ids, in the order of `vectors`

    def add(self, word: str, vectors: Tensor) -> nn.Parameter:
        """Give `word` the next n ids and a copy of `vectors` (n, D); the Parameter to train."""
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


# --- a text encoder and its words --------------------------------------------------------------------------------------


def inject(text_encoder: "CLIPTextModel") -> ExtendedEmbedding:
    """Put an ExtendedEmbedding around the token table, unless it is there already. It changes no prompt by itself."""
    table: nn.Module = text_encoder.get_input_embeddings()
    if isinstance(table, nn.Embedding):
        text_encoder.set_input_embeddings(table := ExtendedEmbedding(table))
    assert isinstance(table, ExtendedEmbedding)
    return table


def eject(text_encoder: "CLIPTextModel") -> None:
    """Take every new word out: the very same `nn.Embedding` returns, with the very same bits (still frozen)."""
    if isinstance(table := text_encoder.get_input_embeddings(), ExtendedEmbedding):
        text_encoder.set_input_embeddings(table.base)


def add_word(tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel", word: str, vectors: Tensor) -> nn.Parameter:
    """Teach the encoder a word, given its vectors (n, D); the Parameter to train, fp32.

    Raises AdapterError, before anything is changed, for a word that is known already or vectors that do not fit.
    """
    if word in placeholders(text_encoder) or len(tokenizer(word, add_special_tokens=False).input_ids) == 1:
        raise AdapterError(f'"{word}" has a meaning already; take a word of your own, such as <my-dog>.')
    width, shape = text_encoder.config.hidden_size, tuple(vectors.shape)
    if shape[1:] != (width,) or not 1 <= len(vectors) <= MAX_VECTORS:
        raise AdapterError(f'the vectors of "{word}" are {shape}; this text encoder takes 1 to {MAX_VECTORS} of width {width}.')
    return inject(text_encoder).add(word, vectors)


def placeholders(text_encoder: "CLIPTextModel") -> dict[str, list[int]]:
    """The new words and their ids, as `tokenize` and `encode_captions` want them; empty where there are none."""
    return dict(getattr(text_encoder.get_input_embeddings(), "placeholders", {}))


def initial_vectors(tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel", words: str, count: int) -> Tensor:
    """Where learning starts: `count` vectors (n, D), fp32, copied from the tokens of `words`, in turn.

    "dog" for three vectors gives three copies of it, as in diffusers: they are at different places of the prompt, so
    their gradients differ and they part. AdapterError where `words` has no token, or more of them than `count`.
    """
    ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    if not 1 <= len(ids) <= count:
        raise AdapterError(f'"{words}" has {len(ids)} tokens for {count} vectors; take a word such as "dog", or more vectors.')
    in_turn = torch.tensor(list(islice(cycle(ids), count)), device=text_encoder.device)
    vectors: Tensor = text_encoder.get_input_embeddings()(in_turn)
    return vectors.detach().float()
