"""Textual inversion files: the vectors of a new word, in the form of any program.

    diffusers   {"<dog>": (n, D) or (D,)}                                     the key is the word; A1111 and ComfyUI read it
    kohya       {"emb_params": (n, D)}                                        the file's name is the word
    A1111 .pt   {"string_to_param": {"*": (n, D)}, "string_to_token": …}      the file's name is the word; for `convert`
    bare        (n, D) or (D,)                                                the word must be given; for `convert`
    SDXL        {"clip_l": (n, 768), "clip_g": (n, 1280)}                     for two text encoders: refused

minidiff's files also name the word in their metadata, so the kohya form keeps it whatever the file is called. A prompt
names the word once, however many vectors it has.

Shapes: n vectors, D width of the text: 768 in SD 1.x, 1024 in SD 2.x, 128 in the pocket checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff import __version__
from minidiff.core.errors import AdapterError
from minidiff.core.textual_inversion import MAX_VECTORS, add_word, placeholders
from minidiff.files import names as keymaps
from minidiff.files.values import listed
from minidiff.files.weights import file_at, find_weights, is_finite, read_header, save

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

FILE_NAME = "learned_embeds.safetensors"
KOHYA = "emb_params"
A1111 = "string_to_param/"  # a table in a pickle; `convert` joins its name with the names in it
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


# --- reading -----------------------------------------------------------------------------------------------------------


def load_embedding(
    tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel", path: str | Path, token: str | None = None
) -> Embedding:
    """Teach the text encoder the word of a file, under its own name or as `token`. The vectors are frozen.

    Raises AdapterError or WeightsError, before anything is changed, for a file or a word that cannot be used.
    """
    embedding = read_embedding(path, token)
    width, reads = embedding.vectors.shape[1], text_encoder.config.hidden_size
    if width != reads:
        raise AdapterError(
            f"{embedding.path}: its vectors are {width} wide, {_family(width)}; this text encoder is {reads} wide, "
            f"{_family(reads)}. Look for an embedding that was made for this model."
        )
    try:
        check_word(tokenizer, embedding.word, placeholders(text_encoder))
    except AdapterError as error:
        raise AdapterError(f"{embedding.path}: {error} {RENAME}") from error
    add_word(tokenizer, text_encoder, embedding.word, embedding.vectors).requires_grad_(False)
    return embedding


def _family(width: int) -> str:
    return f"as in {keymaps.FAMILIES[width]}" if width in keymaps.FAMILIES else "as in no model of the SD family"


def read_embedding(path: str | Path, token: str | None = None) -> Embedding:
    """The word and the vectors of a safetensors file, or of a folder with one.

    `token` gives the word another name; where a file holds several words, it says which one is meant.
    """
    file = read_header(find_weights(path, [FILE_NAME]))
    if not is_embedding(file.tensors):
        raise AdapterError(f"{file.path} is no textual inversion. The file looks like {file.looks_like}.")
    return embedding_in(file.read(), file.path, token, file.metadata.get("token"))


def is_embedding(tensors: Mapping[str, keymaps.HasShape]) -> bool:
    """Are these vectors under words, and not parts of a model or a LoRA?"""
    parts = keymaps.lora_dialect(tensors) or any(key.endswith((".weight", ".bias")) for key in tensors)
    return bool(tensors) and not parts and all(1 <= len(tensor.shape) <= 2 for tensor in tensors.values())


def embedding_in(tensors: Mapping[str, Tensor], path: Path, token: str | None = None, said: str | None = None) -> Embedding:
    """The vectors among the tensors of a file.

    `said` is the word in the file's metadata. `path` names the file in errors, and in some dialects the word.
    """
    dialect, words = _words_in(tensors, path, said)
    if token in words:
        words = {token: words[token]}
    if len(words) != 1:
        raise AdapterError(
            f"{path} holds {len(words)} words, where one is wanted.\n{listed('words', words)}\n"
            "minidiff convert --token makes a file of one; in Python, token=… says which."
        )
    ((own, vectors),) = words.items()
    if not (word := token or own):
        raise AdapterError(f"{path} does not say what its word is. {RENAME}")
    return Embedding(path, dialect, word, _checked(vectors, path))


def _words_in(tensors: Mapping[str, Tensor], path: Path, said: str | None) -> tuple[str, dict[str, Tensor]]:
    """The dialect, and word -> vectors."""
    if {"clip_l", "clip_g"} & tensors.keys():
        raise AdapterError(f"{path} was made for SDXL, which has two text encoders (clip_l, clip_g); SD 1.x cannot use it.")
    if table := {name.removeprefix(A1111): tensor for name, tensor in tensors.items() if name.startswith(A1111)}:
        return "A1111", {path.stem if len(table) == 1 else name: vectors for name, vectors in table.items()}
    if set(tensors) == {KOHYA}:
        return "kohya", {said or path.stem: tensors[KOHYA]}
    return "bare" if set(tensors) == {""} else "diffusers", dict(tensors)


def _checked(vectors: Tensor, path: Path) -> Tensor:
    """(n, D) in fp32."""
    if not vectors.is_floating_point():
        raise AdapterError(f"{path} is no textual inversion: where its vectors should be is {vectors.dtype}.")
    if vectors.ndim not in (1, 2) or not vectors.numel():
        raise AdapterError(f"{path} is no textual inversion: its vectors have the shape {tuple(vectors.shape)}, not (n, D).")
    if not is_finite(vectors):
        raise AdapterError(f"{path}: its vectors have NaN or infinite values.")
    rows = vectors.detach().float().reshape(-1, vectors.shape[-1])
    if len(rows) > MAX_VECTORS:
        raise AdapterError(f"{path} has {len(rows)} vectors for one word, and a prompt has room for {MAX_VECTORS}.")
    return rows


# --- writing -----------------------------------------------------------------------------------------------------------


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
        "modelspec.architecture": "stable-diffusion-v1/textual-inversion",
        "modelspec.trigger_phrase": word,
    }
    tensor = vectors.detach().to(torch.float32)
    save({KOHYA if dialect == "kohya" else word: tensor}, path, {**(metadata or {}), **about})
    return path


# --- what can be a word ------------------------------------------------------------------------------------------------


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
    if not word:
        raise AdapterError(f"the new word is empty. {ADVICE}")
    if any(letter.isspace() for letter in word):
        raise AdapterError(f'"{word}" has a space in it; a new word is one word. {ADVICE}')
    if not word.isprintable():
        raise AdapterError(f"{word!a} has a character that nobody can see. {ADVICE}")
    if len(word) > LONGEST:
        raise AdapterError(f'"{word[:20]}…" has {len(word):,} letters; {LONGEST} are enough. {ADVICE}')
    if word in RESERVED or word.endswith((".weight", ".bias")) or keymaps.lora_dialect([word]):
        raise AdapterError(f'"{word}" means something else in files, so that the word could not be read again. {ADVICE}')
