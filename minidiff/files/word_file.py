"""Textual inversion files: the vectors of a new word, in the form of any program.

    diffusers   {"<dog>": (n, D) or (D,)}                                     the key is the word; A1111 and ComfyUI read it
    kohya       {"emb_params": (n, D)}                                        the file's name is the word
    OneTrainer  {"clip_l": (n, D)}                                            the file's name is the word
    A1111 .pt   {"string_to_param": {"*": (n, D)}, "string_to_token": …}      the file's name is the word; for `convert`
    bare        (n, D) or (D,)                                                the word must be given; for `convert`
    bundled     {"bundle_emb.WORD.emb_params": (n, D), …}                     in a LoRA's file
    SDXL        {"clip_l": (n, 768), "clip_g": (n, 1280)}                     for two text encoders; the file's name is the word

minidiff's files also name the word in their metadata, so the kohya form keeps it. A prompt names the word once, however many
vectors it has.

Shapes: n vectors, D width of the text: 768 in SD 1.x, 1024 in SD 2.x, 128 in the pocket checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff import __version__
from minidiff.core.errors import AdapterError
from minidiff.core.text import LENGTH
from minidiff.core.textual_inversion import inject, placeholders
from minidiff.files.looks import FAMILIES, architecture, is_embedding
from minidiff.files.lora_names import bundled_words, lora_dialect
from minidiff.files.values import listed
from minidiff.files.weights import file_at, find_weights, read_header, save

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

FILE_NAME = "learned_embeds.safetensors"
KOHYA, CLIP_L, CLIP_G = "emb_params", "clip_l", "clip_g"
FILES_NAME = {  # dialects in which the file's name is the word, by the name of the tensor
    "kohya": KOHYA, "OneTrainer": CLIP_L, "SDXL": CLIP_G, "A1111": "string_to_param/"  # `convert` joins names of tables
}  # fmt: skip
RESERVED = ("__metadata__", "emb_params", "clip_l", "clip_g", "string_to_param")  # names that are read in another way
ADVICE = "Take a word of your own, such as <my-dog>."
RENAME = 'minidiff convert --token "<my-dog>" writes it under that word; in Python, token="<my-dog>" reads it so.'


@dataclass(frozen=True)
class Embedding:
    """The new word of a file, and its vectors."""

    path: Path
    dialect: str
    word: str
    vectors: Tensor  # (n, D), fp32
    second: Tensor | None = None  # the same for SDXL's second text encoder

    @property
    def widths(self) -> list[int]:
        return [own.shape[1] for own in (self.vectors, self.second) if own is not None]

    def __str__(self) -> str:
        n, width = len(self.vectors), " and ".join(map(str, self.widths))
        return f"{self.path}: {self.dialect} style, {self.word}, {n} vector{'s'[: n > 1]} of width {width}"


def load_embedding(
    tokenizer: "CLIPTokenizer", towers: Sequence["CLIPTextModel"], path: str | Path, token: str | None = None
) -> Embedding:
    """Teach the text encoders the word of a file, under its own name or as `token`. The vectors are frozen.

    Raises AdapterError or WeightsError, before anything is changed, for a file or a word that cannot be used.
    """
    embedding = read_embedding(path, token)
    widths, reads = embedding.widths, [tower.config.hidden_size for tower in towers]
    if widths != reads:
        mine, wanted = (
            f"{' and '.join(map(str, sizes))} wide, as in {FAMILIES.get(sum(sizes), 'no model of the SD family')}"
            for sizes in (widths, reads)
        )
        way = "Look for an embedding that was made for this model."
        raise AdapterError(f"{embedding.path}: its vectors are {mine}; this text encoder is {wanted}. {way}")
    try:
        check_word(tokenizer, embedding.word, placeholders(towers[0]))
    except AdapterError as error:
        raise AdapterError(f"{embedding.path}: {error} {RENAME}") from error
    for tower, vectors in zip(towers, (embedding.vectors, embedding.second)):
        assert vectors is not None
        inject(tower).add(embedding.word, vectors).requires_grad_(False)
    return embedding


def read_embedding(path: str | Path, token: str | None = None) -> Embedding:
    """The word and the vectors of a safetensors file, or of a folder with one; a LoRA file may bring words along.

    `token` gives the word another name; where a file holds several words, it says which one is meant.
    """
    file = read_header(find_weights(path, [FILE_NAME]))
    if words := bundled_words(file.tensors):
        file = replace(file, tensors={word: file.tensors[key] for word, key in words.items()})
    if not is_embedding(file.tensors):
        raise AdapterError(file.misfit(f"{file.path} is no textual inversion."))
    embedding = embedding_in(file.read(), file.path, token, file.metadata.get("token"))
    return replace(embedding, dialect="bundled") if words else embedding


def embedding_in(tensors: Mapping[str, Tensor], path: Path, token: str | None = None, said: str | None = None) -> Embedding:
    """The word among the tensors of a file. `said` is the word in the metadata; in some dialects `path` names the word."""
    if tensors.keys() == {CLIP_L, CLIP_G}:
        first, second = (embedding_in({KOHYA: tensors[key]}, path, token, said) for key in (CLIP_L, CLIP_G))
        if len(first.vectors) != len(second.vectors):
            counts = f"{len(first.vectors)} vectors for one text encoder, and {len(second.vectors)} for the other"
            raise AdapterError(f"{path} has {counts}; a word has as many for both.")
        return replace(first, dialect="SDXL", second=second.vectors)
    chosen = [key for key in tensors if key == token] or list(tensors)
    if len(chosen) != 1:
        way = "minidiff convert --token makes a file of one; in Python, token=… says which."
        raise AdapterError(f"{path} holds {len(chosen)} words, where one is wanted.\n{listed('words', chosen)}\n{way}")
    vectors, (dialect, own) = tensors[chosen[0]], word_of(chosen[0], path, said)
    if not (word := token or own):
        raise AdapterError(f"{path} does not say what its word is. {RENAME}")
    rows = torch.atleast_2d(vectors)
    if not rows.is_floating_point() or rows.ndim != 2 or not rows.numel() or len(rows) > LENGTH - 2:
        there, wanted = f"{tuple(vectors.shape)} of {vectors.dtype}", f"(n, D) floating-point numbers, n at most {LENGTH - 2}"
        raise AdapterError(f"{path}: its vectors are {there}; a word has {wanted}.")
    return Embedding(path, dialect, word, rows.detach().float())


def word_of(key: str, path: Path, said: str | None) -> tuple[str, str]:
    """The dialect of a tensor's name, and the word that it stands for."""
    dialect = next((name for name, start in FILES_NAME.items() if key.startswith(start)), "diffusers" if key else "bare")
    return dialect, said or path.stem if dialect in FILES_NAME else key


def save_embedding(
    path: str | Path, word: str, vectors: Tensor, dialect: str = "diffusers", metadata: Mapping[str, str] | None = None,
    second: Tensor | None = None,
) -> Path:  # fmt: skip
    """Write the vectors (n, D) of a word, in fp32, as "diffusers" or "kohya" has them. Gives the path of the file.

    With `second`, for SDXL's second text encoder, they are written as all programs read them.

    `path` is a `.safetensors` file, or a folder that gets `learned_embeds.safetensors`. Programs that read the kohya form
    take the file's name for the word, so name it after the word.
    """
    check_spelling(word)
    path, width = file_at(path, FILE_NAME), vectors.shape[-1] + (0 if second is None else second.shape[-1])
    about = {
        "token": word,
        "vectors": str(len(vectors)),
        "minidiff_version": __version__,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture(width)[0]}/textual-inversion",
        "modelspec.trigger_phrase": word,
    }
    named = {KOHYA if dialect == "kohya" else word: vectors} if second is None else {CLIP_L: vectors, CLIP_G: second}
    save({name: tensor.detach().float() for name, tensor in named.items()}, path, {**(metadata or {}), **about})
    return path


# --- the spelling of a word --------------------------------------------------------------------------------------------


def check_word(tokenizer: "CLIPTokenizer", word: str, taken: dict[str, list[int]]) -> None:
    """AdapterError for a word that prompts or files could not name, or that means something already."""
    check_spelling(word)
    if not (ids := tokenizer(word, add_special_tokens=False, verbose=False).input_ids):
        raise AdapterError(f"{word} has no character that the tokenizer sees. {ADVICE}")
    if len(ids) == 1 or word.lower() in tokenizer.get_vocab():  # a piece of a word too: other programs would refuse it
        raise AdapterError(f'"{word}" is in the model\'s vocabulary already, and its meaning would be overwritten. {ADVICE}')
    if twin := next((other for other in taken if other.lower() == word.lower()), None):
        raise AdapterError(f'"{word}": there is a new word "{twin}" already, and a prompt could not tell them apart. {ADVICE}')


def check_spelling(word: str) -> None:
    """The half of it that needs no vocabulary. In a file the word is the tensor's name, and must not read as another one's."""
    name = f'"{word:.20}"' if word.isprintable() else ascii(word)
    problems = {
        "is empty": not word,
        "has a space in it; a new word is one word": any(letter.isspace() for letter in word),
        "has a character that nobody can see": not word.isprintable(),
        "means something else in files, so that the word could not be read again": (
            word in RESERVED or word.endswith((".weight", ".bias")) or lora_dialect([word]) is not None
        ),
    }
    if problem := next((problem for problem, there in problems.items() if there), None):
        raise AdapterError(f"{name} {problem}. {ADVICE}")
