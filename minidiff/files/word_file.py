"""Textual inversion files: the vectors of a new word, in the form of any program.

    diffusers   {"<dog>": (n, D) or (D,)}                                     the key is the word; A1111 and ComfyUI read it
    kohya       {"emb_params": (n, D)}                                        the file's name is the word
    OneTrainer  {"clip_l": (n, D)}                                            the file's name is the word
    A1111 .pt   {"string_to_param": {"*": (n, D)}, "string_to_token": …}      the file's name is the word; for `convert`
    bare        (n, D) or (D,)                                                the word must be given; for `convert`
    bundled     {"bundle_emb.WORD.emb_params": (n, D), …}                     in a LoRA's file
    SDXL        {"clip_l": (n, 768), "clip_g": (n, 1280)}                     for two text encoders: refused

minidiff's files also name the word in their metadata, so the kohya form keeps it. A prompt names the word once, however many
vectors it has.

Shapes: n vectors, D width of the text: 768 in SD 1.x, 1024 in SD 2.x, 128 in the pocket checkpoint.
"""

from collections.abc import Mapping
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
KOHYA = "emb_params"
FILES_NAME = {  # dialects in which the file's name is the word, by the name of the tensor
    "kohya": KOHYA, "OneTrainer": "clip_l", "A1111": "string_to_param/"  # `convert` joins the names of tables in tables
}  # fmt: skip
LONGEST = 100  # letters of a word
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

    def __str__(self) -> str:
        n, width = self.vectors.shape
        return f"{self.path}: {self.dialect} style, {self.word}, {n} vector{'s'[: n > 1]} of width {width}"


def load_embedding(
    tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel", path: str | Path, token: str | None = None
) -> Embedding:
    """Teach the text encoder the word of a file, under its own name or as `token`. The vectors are frozen.

    Raises AdapterError or WeightsError, before anything is changed, for a file or a word that cannot be used.
    """
    embedding = read_embedding(path, token)
    width, reads = embedding.vectors.shape[1], text_encoder.config.hidden_size
    if width != reads:
        mine, wanted = (f"{size} wide, as in {FAMILIES.get(size, 'no model of the SD family')}" for size in (width, reads))
        way = "Look for an embedding that was made for this model."
        raise AdapterError(f"{embedding.path}: its vectors are {mine}; this text encoder is {wanted}. {way}")
    try:
        check_word(tokenizer, embedding.word, placeholders(text_encoder))
    except AdapterError as error:
        raise AdapterError(f"{embedding.path}: {error} {RENAME}") from error
    inject(text_encoder).add(embedding.word, embedding.vectors).requires_grad_(False)
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
    if "clip_g" in tensors:
        raise AdapterError(f"{path} was made for SDXL, which has two text encoders (clip_l, clip_g); SD 1.x cannot use it.")
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
    path: str | Path, word: str, vectors: Tensor, dialect: str = "diffusers", metadata: Mapping[str, str] | None = None
) -> Path:
    """Write the vectors (n, D) of a word, in fp32, as "diffusers" or "kohya" has them. Gives the path of the file.

    `path` is a `.safetensors` file, or a folder that gets `learned_embeds.safetensors`. Programs that read the kohya form
    take the file's name for the word, so name it after the word.
    """
    check_spelling(word)
    if dialect not in ("diffusers", "kohya"):
        raise AdapterError(f'a textual inversion is written as diffusers or kohya; "{dialect}" is neither.')
    path = file_at(path, FILE_NAME)
    about = {
        "token": word,
        "vectors": str(len(vectors)),
        "minidiff_version": __version__,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture(vectors.shape[-1])[0]}/textual-inversion",
        "modelspec.trigger_phrase": word,
    }
    save({KOHYA if dialect == "kohya" else word: vectors.detach().float()}, path, {**(metadata or {}), **about})
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
        f"has {len(word):,} letters; {LONGEST} are enough": len(word) > LONGEST,
        "means something else in files, so that the word could not be read again": (
            word in RESERVED or word.endswith((".weight", ".bias")) or lora_dialect([word]) is not None
        ),
    }
    if problem := next((problem for problem, there in problems.items() if there), None):
        raise AdapterError(f"{name} {problem}. {ADVICE}")
