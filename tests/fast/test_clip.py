"""CLIP without transformers: the same ids, the same numbers, and no import of transformers for a picture."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidiff.core.text import encode, tokenize
from minidiff.fast import clip
from minidiff.files.text_files import build_text_encoder, load_tokenizer

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"
LETTERS = [*"abcdefghij ABC'’!?.,0123\n\té🐕ß中\u0301<|>_-", "<|endoftext|>", "<|StartOfText|>", "dog", "don't", "red "]


def config() -> dict[str, object]:
    values: dict[str, object] = json.loads((POCKET / "text_encoder" / "config.json").read_text())
    return values


def test_the_tokenizer_gives_the_ids_of_transformers() -> None:
    theirs, ours = load_tokenizer(POCKET / "tokenizer"), clip.text_tokenizer(POCKET / "tokenizer")
    assert ours and type(ours) is not type(theirs)
    names = random.Random(0)
    texts = ["", "a photo of a red dog", *("".join(names.choices(LETTERS, k=names.randint(0, 30))) for _ in range(500))]
    for text in texts:
        ids = theirs(text, add_special_tokens=False, verbose=False).input_ids
        assert ours(text).input_ids == ids and ours.decode(ids) == theirs.decode(ids), text
    assert (len(ours), ours.get_vocab(), ours.all_special_tokens) == (
        *(len(theirs), theirs.get_vocab(), theirs.all_special_tokens),
    )
    for index in range(len(ours)):
        assert ours.convert_ids_to_tokens(index) == theirs.convert_ids_to_tokens(index)
        assert ours.decode([index]) == theirs.decode([index])
    assert torch.equal(tokenize(ours, texts[:20]), tokenize(theirs, texts[:20]))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tower_is_that_of_transformers_to_the_bit(dtype: torch.dtype) -> None:
    theirs, ours = (build_text_encoder(config(), "pocket", light).to(dtype) for light in (None, clip))
    assert isinstance(ours, clip.TextTower)
    ours.load_state_dict({key.removeprefix("text_model."): value for key, value in theirs.state_dict().items()})
    ids = tokenize(load_tokenizer(POCKET / "tokenizer"), ["a photo of a red dog on the beach", ""])
    for skip in (0, 1):
        assert torch.equal(encode(ours, ids, skip), encode(theirs, ids, skip))
    gradients = []
    for tower in (ours, theirs):
        encode(tower, ids).float().square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(tower.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_other_towers_and_tokenizers_are_left_to_transformers(tmp_path: Path) -> None:
    assert clip.text_tower(config() | {"hidden_act": "gelu"}) is None
    assert clip.text_tokenizer(tmp_path) is None
    folder = Path(shutil.copytree(POCKET / "tokenizer", tmp_path / "words"))
    assert clip.text_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    new = {str(i): {"content": f"<new-{i}>"} for i in range(670, 676)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": new}))
    assert clip.text_tokenizer(folder) is None


def test_a_picture_is_drawn_without_the_import_of_transformers(tmp_path: Path) -> None:
    command = ["sample", "a dog", "--num_inference_steps", "1", "--output", str(tmp_path / "a.png")]
    heavy = "{'transformers', 'torch._dynamo', 'sympy', 'matplotlib'}"
    code = f"import sys; from minidiff.cli.main import main; main({command}); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and (tmp_path / "a.png").is_file()
