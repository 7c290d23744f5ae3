"""The text tower's files: vocab.json and merges.txt, config.json, and the names of its weights.

transformers 4 keeps the tower one level down, `text_model.encoder…`; transformers 5 has `encoder…`. minidiff reads both forms
and writes the first, that of SD 1.5's files. In single files of SD 2.x the tower has the names of OpenCLIP.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.core.errors import WeightsError
from minidiff.core.text import LENGTH

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

PREFIX = "text_model."
OPENCLIP = {  # pieces of transformers' names and of OpenCLIP's, where q, k and v are one tensor, `in_proj`
    "encoder.layers.": "transformer.resblocks.", ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".self_attn.": ".attn.",
    ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", "final_layer_norm.": "ln_final.", "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip


def load_tokenizer(folder: Path, light: Any = None) -> "CLIPTokenizer":
    """Of an SD folder (`<checkpoint>/tokenizer`). `light`: fast/clip.py, to read prompts without waiting for transformers."""
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


def build_text_encoder(
    values: Mapping[str, Any], where: str, light: Any = None, projected: bool = False
) -> "CLIPTextModel":
    """The tower that `text_encoder/config.json` describes, with random weights; `where` names the file in errors.

    `projected`: SDXL's second one, which has a projection for its pooled vector.
    Under `torch.device("meta")` it takes no memory and no time; `weights.load_into` then brings the weights.
    """
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    if missing := [key for key in needed if key not in values]:
        raise WeightsError(f"{where}: not the configuration of a CLIP text model; {', '.join(missing)} missing.")
    for key, possible in {"max_position_embeddings": [LENGTH], "num_hidden_layers": range(1, 101)}.items():
        if (value := values.get(key, LENGTH)) not in possible:
            raise WeightsError(f"{where}: {key} is {value!r}; no text tower of SD 1.x or 2.x has that.")
    try:
        if (tower := light and light.text_tower(values)) is None:
            from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

            tower = (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**values))
        return tower.eval()
    except Exception as error:  # each version of the library checks in its own way and raises its own classes
        raise WeightsError(f"{where}: not a usable configuration: {error}.") from error


def text_values(config: Any, class_name: str) -> dict[str, Any]:
    """The config.json of a text encoder, with the class that transformers builds from it."""
    values = config.to_diff_dict() | {"architectures": [class_name], "torch_dtype": "float32"}
    values.pop("dtype", None)  # transformers would load it in the file's dtype, diffusers loads the others in fp32
    return dict(sorted(values.items()))


def to_file_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of either layout -> the keys of SD's files: with `text_model.` but for SDXL's projection, without `position_ids`."""
    named = {key if "projection" in key else PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}
    return {key: value for key, value in named.items() if not key.endswith("embeddings.position_ids")}


def from_openclip(tensors: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """A header's entries under transformers' names, without those that are never read: the scale; for SD 2, whose tower has
    so many `layers`, also the last layer and the projection. SDXL's projection is transposed: OpenCLIP has x W, not x Wᵀ."""
    found = dict[str, Any]()
    for key, info in tensors.items():
        for ours, theirs in OPENCLIP.items():
            key = key.replace(theirs, ours)
        stem, fused, kind = key.partition(".in_proj_")
        n = (info.shape or (0,))[0] // 3
        parts = {f"{stem}.{x}_proj.{kind}": (i * n, i * n + n) for i, x in enumerate("qkv")} if fused else {}
        found |= {part: info._replace(shape=(n, *info.shape[1:]), rows=rows) for part, rows in parts.items()} or {key: info}
    if layers is None:
        found["text_projection.weight"] = found.pop("text_projection")._replace(transposed=True)
    unread = ("logit_scale",) if layers is None else ("text_projection", "logit_scale", f"encoder.layers.{layers}.")
    return {key: info for key, info in found.items() if not key.startswith(unread)}


def to_openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under OpenCLIP's names. A1111 wants all of OpenCLIP's, so what SD 2 leaves out is made up, as by kohya: its
    last layer is the one before it again, projection and scale are ones. Of SDXL's second tower everything is there."""
    tensors, state = dict[str, Tensor](), dict(state)
    projection = state.pop("text_projection.weight", None)
    layers = len({key.split(".")[2] for key in state if key.startswith("encoder.layers.")})
    for key, value in state.items():
        if ".q_proj." in key:
            value = torch.cat([state[key.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
        elif ".k_proj." in key or ".v_proj." in key or "position_ids" in key:
            continue
        for ours, theirs in ({".q_proj.": ".in_proj_"} | OPENCLIP).items():
            key = key.replace(ours, theirs)
        tensors[key] = value
    if projection is not None:
        return tensors | {"text_projection": projection.mT.contiguous()}
    last, scale = f"transformer.resblocks.{layers - 1}.", state["final_layer_norm.weight"]
    tensors |= {key.replace(last, f"transformer.resblocks.{layers}."): t for key, t in tensors.items() if key.startswith(last)}
    return tensors | {"text_projection": scale.new_ones(len(scale), len(scale)), "logit_scale": scale.new_ones(())}
