"""CLIP's text tower and tokenizer without the import of transformers, which takes longer than a picture of the pocket model.

Same names, same numbers, for reading prompts alone. Training, saving and Python programs use the classes of transformers.

B prompts   L = 77 tokens   D width   N heads
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

DEFAULTS = {"max_position_embeddings": 77, "layer_norm_eps": 1e-5}  # of transformers' CLIPTextConfig
MARKS = ("bos_token", "eos_token", "pad_token", "unk_token")
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own pattern


class Layer(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        width, self.heads = c.hidden_size, c.num_attention_heads
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, c.intermediate_size), "fc2": nn.Linear(c.intermediate_size, width)})
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=c.layer_norm_eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); a token sees itself and those before it."""
        h, project, mlp = self.layer_norm1(x), self.self_attn, self.mlp
        q, k, v = (project[f"{name}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        x = x + project["out_proj"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = mlp["fc1"](self.layer_norm2(x))
        return x + mlp["fc2"](h * torch.sigmoid(1.702 * h))  # quick_gelu


class TextTower(nn.Module):
    """The part of transformers' CLIPTextModel that core/text.py reads, with the parameter names of its version 5."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.config = c = SimpleNamespace(**DEFAULTS | values)
        rows = {"token_embedding": c.vocab_size, "position_embedding": c.max_position_embeddings}
        # the tables are not drawn at random: on the device "meta" that imports torch._dynamo
        tables = {k: nn.Embedding.from_pretrained(torch.empty(n, c.hidden_size), freeze=False) for k, n in rows.items()}
        layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.embeddings, self.encoder = nn.ModuleDict(tables), nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    @property
    def device(self) -> torch.device:
        return self.final_layer_norm.weight.device

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings["token_embedding"]

    def set_input_embeddings(self, table: nn.Module) -> None:
        self.embeddings["token_embedding"] = table

    def forward(self, input_ids: Tensor, output_hidden_states: bool = True) -> SimpleNamespace:
        """ids (B, L) -> `hidden_states`: the embeddings and each layer's output, (B, L, D) each."""
        positions: Any = self.embeddings["position_embedding"]
        states = [self.get_input_embeddings()(input_ids) + positions.weight[: input_ids.shape[-1]]]
        for layer in self.encoder["layers"].children():
            states.append(layer(states[-1]))
        return SimpleNamespace(hidden_states=tuple(states))


def text_tower(values: dict[str, Any]) -> nn.Module | None:
    """The tower of a `text_encoder/config.json`; None for one that only transformers can build."""
    return TextTower(values) if values.get("hidden_act", "quick_gelu") == "quick_gelu" else None


class TextTokenizer:
    """The methods of transformers' CLIPTokenizer that reading a prompt needs, over the same library `tokenizers`."""

    def __init__(self, folder: Path, marks: dict[str, Any]) -> None:
        bos, eos, pad, unk = (one["content"] if isinstance(one := marks[name], dict) else one for name in MARKS)
        model = models.BPE.from_file(
            str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token=unk, end_of_word_suffix="</w>", fuse_unk=False
        )
        self.tokenizer: Any = Tokenizer(model)
        form = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        self.tokenizer.normalizer = normalizers.Sequence(form)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.tokenizer.decoder = decoders.ByteLevel()
        self.all_special_tokens = list(dict.fromkeys((bos, eos, unk, pad)))
        self.tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in self.all_special_tokens])
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(self.tokenizer.token_to_id, (bos, eos, pad))

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def __call__(self, text: str, add_special_tokens: bool = False, verbose: bool = False) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.tokenizer.encode(text, add_special_tokens=False).ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())

    def convert_ids_to_tokens(self, index: int) -> str:
        return str(self.tokenizer.id_to_token(index))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False)).replace("</w>", " ").strip()


def text_tokenizer(folder: Path) -> TextTokenizer | None:
    """The tokenizer of a folder in SD 1.5's form; None for one that only transformers can read."""
    needed = [folder / name for name in ("vocab.json", "merges.txt", "special_tokens_map.json")]
    if not all(path.is_file() for path in needed) or (folder / "added_tokens.json").exists():
        return None
    marks, config = json.loads(needed[2].read_text(encoding="utf-8")), folder / "tokenizer_config.json"
    added = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {}) if config.is_file() else {}
    if len(added) > len(MARKS):  # new words
        return None
    return TextTokenizer(folder, marks) if marks.keys() >= set(MARKS) else None
