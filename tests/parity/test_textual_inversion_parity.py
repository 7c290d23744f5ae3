"""Textual inversion beside diffusers and transformers: the same files, the same embeddings, the same training."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sizes import TINY_UNET
from torch import Tensor, nn

from minidiff.core.losses import squared_error
from minidiff.core.schedule import add_noise, training_target
from minidiff.core.text import encode, tokenize
from minidiff.core.textual_inversion import initial_vectors, inject, placeholders
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.word_file import read_embedding, save_embedding

diffusers = pytest.importorskip("diffusers")

PROMPTS = ["a photo of a <dog> on the beach", "<dog>", "a <dog>, a red <dog>", "a drawing of a blue cat"]
STEPS = 5


@pytest.fixture
def ours(tiny_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_folder)


@pytest.fixture
def theirs(tiny_folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)


def vectors(n: int) -> Tensor:
    return torch.randn(n, TINY_UNET.cross_attention_dim, generator=torch.Generator().manual_seed(n))


def their_text(pipe: Any, prompts: list[str]) -> Tensor:
    with torch.no_grad():
        text: Tensor = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    return text


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_diffusers_reads_what_minidiff_writes(tmp_path: Path, ours: StableDiffusionPipeline, theirs: Any, n: int) -> None:
    path = save_embedding(tmp_path, "<dog>", vectors(n))
    before = their_text(theirs, PROMPTS)
    theirs.load_textual_inversion(tmp_path)
    ours.load_textual_inversion(path)
    text = their_text(theirs, PROMPTS)
    close(ours.encode_prompt(PROMPTS), text)
    assert (text - before)[:3].abs().amax((1, 2)).min() > 0.1


def test_case_is_folded_with_every_vector(tmp_path: Path, ours: StableDiffusionPipeline, theirs: Any) -> None:
    """diffusers folds the case too, but then expands only the word as it was spelled: "<Dog>" keeps the first vector."""
    for n, same in ((1, True), (3, False)):
        save_embedding(tmp_path, f"<dog{n}>", vectors(n))
        ours.load_textual_inversion(tmp_path)
        theirs.load_textual_inversion(tmp_path)
        text = ours.encode_prompt([f"a <Dog{n}>"])
        close(text, ours.encode_prompt([f"a <dog{n}>"]))
        assert torch.allclose(text, their_text(theirs, [f"a <Dog{n}>"]), atol=1e-5) == same


def test_both_read_a_one_dimensional_file(tmp_path: Path, ours: StableDiffusionPipeline, theirs: Any) -> None:
    """The form of diffusers' first years."""
    from safetensors.torch import save_file

    save_file({"<dog>": vectors(1)[0]}, tmp_path / "learned_embeds.safetensors")
    theirs.load_textual_inversion(tmp_path, token="<pet>")
    ours.load_textual_inversion(tmp_path, token="<pet>")
    close(ours.encode_prompt(["a <pet>"]), their_text(theirs, ["a <pet>"]))


def test_diffusers_reads_the_kohya_form_under_a_given_name(tmp_path: Path, ours: StableDiffusionPipeline, theirs: Any) -> None:
    path = save_embedding(tmp_path / "dog.safetensors", "<dog>", vectors(2), "kohya")
    theirs.load_textual_inversion(path, token="<dog>")
    ours.load_textual_inversion(path)
    close(ours.encode_prompt(PROMPTS), their_text(theirs, PROMPTS))


def test_a_bare_word_is_added_without_harm(ours: StableDiffusionPipeline, theirs: Any, tmp_path: Path) -> None:
    """Why minidiff leaves the tokenizer alone: once diffusers has the token "zwy", other words fall apart around it."""
    save_embedding(tmp_path, "zwy", vectors(1))
    before = ours.encode_prompt(["azwy"])
    ours.load_textual_inversion(tmp_path)
    theirs.load_textual_inversion(tmp_path)
    assert torch.equal(ours.encode_prompt(["azwy"]), before)
    close(ours.encode_prompt(["a zwy"]), their_text(theirs, ["a zwy"]))
    assert (their_text(theirs, ["azwy"]) - before).abs().max() > 0.1


# --- training ----------------------------------------------------------------------------------------------------------


def batches() -> list[tuple[Tensor, Tensor, Tensor, list[str]]]:
    """Five of (x0, noise, t, prompts)."""
    g = torch.Generator().manual_seed(0)
    said = ["a photo of <dog>", "a drawing of a red <dog> in the snow"]
    return [
        (torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g),
         torch.randint(1000, (2,), generator=g), said)
        for _ in range(STEPS)
    ]  # fmt: skip


def train_ours(pipe: StableDiffusionPipeline, n: int) -> Tensor:
    start = initial_vectors(pipe.tokenizer, pipe.text_encoder, "dog", n)
    row = inject(pipe.text_encoder).add("<dog>", start)
    optimizer = torch.optim.AdamW([row], lr=1e-2, weight_decay=0.01)
    for x0, noise, t, said in batches():
        text = encode(pipe.text_encoder, tokenize(pipe.tokenizer, said, placeholders(pipe.text_encoder)))
        output = pipe.unet(add_noise(pipe.schedule, x0, noise, t), t, text)
        loss = squared_error(output, training_target(pipe.schedule, x0, noise, t)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (row.detach() - start).abs().max() > 1e-2
    return row.detach()


def train_theirs(pipe: Any, n: int) -> Tensor:
    """A hand-written loop: more rows in transformers' own table, all of it trained, the old rows put back each time."""
    words = ["<dog>", *(f"<dog>_{i}" for i in range(1, n))]
    tokenizer, encoder = deepcopy(pipe.tokenizer), pipe.text_encoder
    dog = tokenizer("dog", add_special_tokens=False).input_ids[0]
    old = encoder.get_input_embeddings().weight.detach().clone()
    assert tokenizer.add_tokens(words) == n
    encoder.requires_grad_(False)
    encoder.set_input_embeddings(nn.Embedding(len(old) + n, old.shape[1]))
    table = encoder.get_input_embeddings().weight
    table.data = torch.cat([old, old[[dog] * n]])
    noising = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW([table], lr=1e-2, weight_decay=0.01)
    for x0, noise, t, said in batches():
        prompts = [text.replace("<dog>", " ".join(words)) for text in said]
        ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        text = encoder(ids).last_hidden_state
        output = pipe.unet(noising.add_noise(x0, noise, t), t, text).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(output, noise).backward()
        optimizer.step()
        table.data[: len(old)] = old
    return table.detach()[len(old) :]


@pytest.mark.parametrize("n", [1, 3])
def test_five_steps_of_training_give_the_same_rows(tmp_path: Path, ours: StableDiffusionPipeline, theirs: Any, n: int) -> None:
    mine, other = train_ours(ours, n), train_theirs(theirs, n)
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    path = save_embedding(tmp_path, "<dog>", mine)
    assert torch.equal(read_embedding(path).vectors, mine)
