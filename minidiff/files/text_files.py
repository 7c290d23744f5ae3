"""The text tower's files: vocab.json and merges.txt, config.json, and the names of its weights.

transformers 4 keeps the tower one level down, `text_model.encoder…`; transformers 5 has `encoder…`. minidiff reads both forms
and writes the first, that of SD 1.5's files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minidiff.core.errors import WeightsError
from minidiff.core.text import LENGTH

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

PREFIX = "text_model."


def load_tokenizer(folder: Path, light: Any = None) -> "CLIPTokenizer":
    """The tokenizer of an SD folder (`<checkpoint>/tokenizer`): `vocab.json` and `merges.txt`, or `tokenizer.json`.

    `light`: fast/clip.py, for a caller that only reads prompts and does not want to wait for transformers.
    """
    merges = folder / "merges.txt"
    two_files = (folder / "vocab.json").is_file() and merges.is_file()
    if not two_files and not (folder / "tokenizer.json").is_file():
        raise WeightsError(f"{folder}: no CLIP tokenizer here; vocab.json or merges.txt is missing. Copy the folder again.")
    try:  # the length is passed explicitly: without tokenizer_config.json the library assumes 10^30
        if (tokenizer := light and light.text_tokenizer(folder)) is None:
            from transformers import CLIPTokenizer

            tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=LENGTH, local_files_only=True)
        joined = set(merges.read_text(encoding="utf-8").replace(" ", "").splitlines()) if two_files else None
    except Exception as error:  # the library raises bare Exception for a damaged file
        files = "vocab.json and merges.txt" if two_files else "tokenizer.json"
        raise WeightsError(f"{folder}: the tokenizer cannot be read ({files}): {error}. Copy the folder again.") from error
    if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise WeightsError(f"{folder}: the start, end or padding token is not in the vocabulary; not a CLIP tokenizer.")
    longer = {token for token in tokenizer.get_vocab() if len(token.removesuffix("</w>")) > 1 and not token.startswith("<|")}
    if joined is not None and longer - joined:  # a shortened merges.txt: the library accepts it, and gives other ids
        raise WeightsError(f"{folder}: merges.txt lacks {len(longer - joined)} tokens of vocab.json. Copy both again.")
    return tokenizer


def build_text_encoder(values: Mapping[str, Any], where: str, light: Any = None) -> "CLIPTextModel":
    """The tower that `text_encoder/config.json` describes, with random weights; `where` names the file in errors.

    Under `torch.device("meta")` it takes no memory and no time; `weights.load_into` then brings the weights.
    """
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    if missing := [key for key in needed if key not in values]:
        raise WeightsError(f"{where}: not the configuration of a CLIP text model; {', '.join(missing)} missing.")
    for key, possible in {"max_position_embeddings": [LENGTH], "num_hidden_layers": range(1, 101)}.items():
        if (value := values.get(key, LENGTH)) not in possible:
            raise WeightsError(f"{where}: {key} is {value!r}; no text tower of SD 1.x has that.")
    try:
        if (tower := light and light.text_tower(values)) is None:
            from transformers import CLIPTextConfig, CLIPTextModel

            tower = CLIPTextModel(CLIPTextConfig(**values))
        return tower.eval()
    except Exception as error:  # each version of the library checks in its own way and raises its own classes
        raise WeightsError(f"{where}: not a usable configuration: {error}.") from error


def to_file_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of either layout -> the keys of SD 1.5's files: with `text_model.`, without the old `position_ids`."""
    named = {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}
    return {key: value for key, value in named.items() if not key.endswith("embeddings.position_ids")}
