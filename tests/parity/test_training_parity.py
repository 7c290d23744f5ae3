"""The recipes beside diffusers and peft: five steps of a hand-written loop over their modules give the same weights.

What they share is a random base model, the pictures' latents, and of each batch the noise and the timesteps. Prompts are
encoded, noise is added, the model answers, the loss is taken and the weights move in the libraries' own code.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import assert_as_near
from tiny_recipes import PRIOR, draw_pictures, loaded, tiny
from torch import Tensor, nn

from minidiff.core.inject import adapter_weights
from minidiff.core.train import Batch
from minidiff.files.lora_file import read_lora
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit
from minidiff.trainer.task import Job

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

STEPS = 5
NORM = 0.05  # low, so that every step is clipped
EPSILON = 1e-5  # of Adam: else it blows up the rounding of gradients that are zero on paper, as those of k's bias are
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
INSTANCE, CLASS = "a photo of a sks dog", PRIOR["class_prompt"]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Any:
    pictures = draw_pictures(tmp_path / "pictures")
    often = {"max_train_steps": STEPS, "max_grad_norm": NORM, "adam_weight_decay": 0.1, "learning_rate": 1e-2}
    often |= {"adam_epsilon": EPSILON}
    return lambda method, **changes: tiny(method, tiny_folder, pictures, tmp_path / "out", **{**often, **changes})


@pytest.fixture
def theirs(tiny_folder: Path) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    for network in (pipe.unet, pipe.text_encoder):
        network.requires_grad_(False)
    return pipe


def train_ours(settings: Any) -> tuple[Job, list[Batch]]:
    """The recipe, run to its end; and the batches it saw."""
    task = RECIPES[type(settings)](settings)
    batches = [task.batch(step, 0) for step in range(STEPS)]
    assert fit(task, settings).finished
    return task, batches


def train_by_hand(groups: list[dict[str, Any]], batches: list[Batch], loss_of: Callable[[Batch], Tensor]) -> None:
    """As in the libraries' scripts: backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, eps=EPSILON)
    parameters = [p for group in groups for p in group["params"]]
    for batch in batches:
        loss_of(batch).backward()
        norm = nn.utils.clip_grad_norm_(parameters, NORM)
        assert norm > NORM
        optimizer.step()
        optimizer.zero_grad()


def encoded(pipe: Any, prompts: list[str]) -> Tensor:
    """With gradients, if the encoder is trained."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(ids).last_hidden_state


def answer(pipe: Any, batch: Batch, text: Tensor) -> tuple[Tensor, Tensor]:
    """The U-Net's output and its target: the noise."""
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    x_t = scheduler.add_noise(batch["latents"], batch["noise"], batch["t"])
    return pipe.unet(x_t, batch["t"], text).sample, batch["noise"]


def plain_loss(pipe: Any, prompts: list[str]) -> Callable[[Batch], Tensor]:
    return lambda batch: F.mse_loss(*answer(pipe, batch, encoded(pipe, prompts)))


def prior_loss(pipe: Any, weight: float) -> Callable[[Batch], Tensor]:
    """train_dreambooth.py: both halves go through the model as one batch, then are chunked."""

    def loss(batch: Batch) -> Tensor:
        output, target = answer(pipe, batch, encoded(pipe, [INSTANCE, INSTANCE, CLASS, CLASS]))
        (own, prior), (own_target, prior_target) = output.chunk(2), target.chunk(2)
        return F.mse_loss(own, own_target) + weight * F.mse_loss(prior, prior_target)

    return loss


def close(a: Tensor, b: Tensor, start: Tensor) -> None:
    """Equal to 1e-5, after having moved by more."""
    assert (a - start).abs().max() > 1e-4
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def peft_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def add_adapter(model: nn.Module, ours: nn.Module, targets: list[str], dora: bool) -> None:
    """peft's own adapter of rank 2, alpha 3, which begins at the same A: the one thing that is drawn."""
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=dora))  # type: ignore[operator]
    start = adapter_weights(ours)
    for name, layer in peft_layers(model).items():
        layer.lora_A["default"].weight.data = start[name.removeprefix("text_model.")].A.clone()


def trained_in(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def numbers_of(layer: Any) -> list[Tensor]:
    """A, B and m of a layer of peft's, in minidiff's shapes."""
    magnitude = [layer.lora_magnitude_vector["default"].weight.reshape(-1, 1)] if layer.use_dora["default"] else []
    return [t.detach() for t in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, *magnitude)]


@pytest.mark.parametrize(
    "method, changes",
    [
        ("lora", {}),
        ("lora, text encoder too", {}),
        ("dora", {"lora_targets": ("attention",)}),
        ("lora", {"with_prior_preservation": True, "prior_loss_weight": 0.7}),
        ("dora", {"lora_targets": ("attention",), "with_prior_preservation": True, "prior_loss_weight": 0.7}),
    ],
)
def test_lora_and_dora(make: Any, theirs: Any, tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    with_prior = "prior_loss_weight" in changes
    drawn = {"class_prompt": CLASS, "class_data_dir": str(tmp_path / "class")} if with_prior else {}
    settings = make(method, lora_alpha=3, **changes, **drawn)
    untrained = RECIPES[type(settings)](settings).modules
    parts = {"unet": (theirs.unet, ATTENTION)}
    if settings.train_text_encoder:
        parts["text_encoder"] = (theirs.text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj"])
    for part, (model, targets) in parts.items():
        add_adapter(model, untrained[part], targets, settings.use_dora)
    exactly = deepcopy(theirs)
    exactly.unet.double(), exactly.text_encoder.double()
    _, batches = train_ours(settings)
    found = []
    for pipe, dtype in ((theirs, torch.float32), (exactly, torch.float64)):
        loss_of = prior_loss(pipe, 0.7) if with_prior else plain_loss(pipe, [INSTANCE] * 2)
        networks = {part: getattr(pipe, part) for part in parts}
        trained = [p for network in networks.values() for p in trained_in(network)]
        own = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
        train_by_hand([{"params": trained, "lr": 1e-2}], own, loss_of)
        layers = {(part, k): v for part, m in networks.items() for k, v in peft_layers(m).items()}
        found.append({f"{part}.{k.removeprefix('text_model.')}": layer for (part, k), layer in layers.items()})

    result = read_lora(settings.output_dir).modules  # what the files say
    start = {f"{part}.{name}": w for part in parts for name, w in adapter_weights(untrained[part]).items()}
    assert result.keys() == found[0].keys()
    for name, weights in result.items():
        assert weights.scale == found[0][name].scaling["default"] == 1.5
        for moved, before in ((weights.A, start[name].A), (weights.B, start[name].B)):
            assert (moved - before).abs().max() > 1e-4
    ours = [t for name in result for t in (result[name].A, result[name].B, result[name].magnitude) if t is not None]
    assert_as_near(ours, *([t for name in result for t in numbers_of(layers[name])] for layers in found))


@pytest.mark.parametrize("method", ["full", "full, text encoder too"])
@pytest.mark.parametrize("prior_weight", [None, 0.7])
def test_full_and_dreambooth(make: Any, theirs: Any, tmp_path: Path, method: str, prior_weight: float | None) -> None:
    prior = {"with_prior_preservation": True, "prior_loss_weight": prior_weight, "class_prompt": CLASS}
    prior |= {"class_data_dir": str(tmp_path / "class")}
    settings = make(method, learning_rate=1e-3, **(prior if prior_weight else {}))
    networks = {"unet": theirs.unet} | ({"text_encoder": theirs.text_encoder} if settings.train_text_encoder else {})
    for network in networks.values():
        network.requires_grad_(True)
    start = {name: p.detach().clone() for network in networks.values() for name, p in network.named_parameters()}
    _, batches = train_ours(settings)
    loss_of = prior_loss(theirs, prior_weight) if prior_weight else plain_loss(theirs, [INSTANCE] * 2)
    parameters = [p for network in networks.values() for p in network.parameters()]
    train_by_hand([{"params": parameters, "lr": 1e-3}], batches, loss_of)
    result = diffusers.StableDiffusionPipeline.from_pretrained(settings.output_dir, local_files_only=True)
    for part, network in networks.items():
        found = dict(getattr(result, part).named_parameters())
        for name, p in network.named_parameters():
            if name.endswith("k_proj.bias"):  # it adds the same to every score of a row: no gradient but rounding
                torch.testing.assert_close(found[name], p, atol=1e-5, rtol=0)
            else:
                close(found[name], p, start[name])


# --- new words -------------------------------------------------------------------------------------------------------

WORDS = ["<dog>", "<dog>_1"]


def grow_table(pipe: Any) -> tuple[nn.Parameter, int]:
    """More rows in transformers' own table, which is trained as a whole; and how many rows are old."""
    dog = pipe.tokenizer("dog", add_special_tokens=False).input_ids[0]
    old = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    assert pipe.tokenizer.add_tokens(WORDS) == 2
    pipe.text_encoder.set_input_embeddings(nn.Embedding(len(old) + 2, old.shape[1]))
    table = pipe.text_encoder.get_input_embeddings().weight
    table.data = torch.cat([old, old[[dog, dog]]])
    return table, len(old)


def word_loss(pipe: Any, table: nn.Parameter, old: int) -> Callable[[Batch], Tensor]:
    """The prompts of textual_inversion.py: the word is written as all of its tokens, and old rows are put back at each step.
    Old rows get no gradient, as only the new ones count in the norm that is clipped."""
    table.register_hook(lambda gradient: torch.cat([torch.zeros(old, gradient.shape[1]), gradient[old:]]))
    rows, plain = table.detach()[:old].clone(), plain_loss(pipe, [f"a photo of {' '.join(WORDS)}"] * 2)

    def loss(batch: Batch) -> Tensor:
        table.data[:old] = rows  # weight decay has moved them
        return plain(batch)

    return loss


def test_textual_inversion(make: Any, theirs: Any) -> None:
    settings = make("textual inversion", instance_prompt="a photo of <dog>")
    table, old = grow_table(theirs)
    start = table.detach().clone()
    task, batches = train_ours(settings)
    train_by_hand([{"params": [table], "lr": 1e-2}], batches, word_loss(theirs, table, old))
    close(task.trainable["word"].detach(), table[old:].detach(), start[old:])


def test_pivotal(make: Any, theirs: Any) -> None:
    """Two groups, each with its own rate."""
    settings = make("pivotal", instance_prompt="a photo of <dog>", lora_alpha=3, learning_rate_embedding=2e-2)
    table, old = grow_table(theirs)
    start, untrained = table.detach().clone(), RECIPES[type(settings)](settings).modules["unet"]
    add_adapter(theirs.unet, untrained, ATTENTION, dora=False)
    task, batches = train_ours(settings)
    groups = [{"params": trained_in(theirs.unet), "lr": 1e-2}, {"params": [table], "lr": 2e-2}]
    train_by_hand(groups, batches, word_loss(theirs, table, old))
    close(task.trainable["word"].detach(), table[old:].detach(), start[old:])
    before, after = adapter_weights(untrained), adapter_weights(task.modules["unet"])
    for name, layer in peft_layers(theirs.unet).items():
        close(after[name].A, layer.lora_A["default"].weight, before[name].A)
        close(after[name].B, layer.lora_B["default"].weight, before[name].B)


def test_diffusers_answers_alike_with_what_comes_out(make: Any, theirs: Any) -> None:
    """The files of the recipes mean the same there as here."""
    for method in ("lora, text encoder too", "pivotal"):
        settings = make(method)
        settings = replace(settings, output_dir=f"{settings.output_dir}-{method[:4]}")
        train_ours(settings)
        ours = loaded(Path(settings.output_dir), settings)
        theirs.load_lora_weights(settings.output_dir)
        if method == "pivotal":
            theirs.load_textual_inversion(settings.output_dir)
        x_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
        prompt = "a photo of <dog>" if method == "pivotal" else INSTANCE
        with torch.no_grad():
            text = theirs.encode_prompt(prompt, "cpu", 1, False)[0]
            expected = theirs.unet(x_t, t, text).sample
            torch.testing.assert_close(ours.unet(x_t, t, ours.encode_prompt([prompt])), expected, atol=1e-5, rtol=1e-5)
        theirs.unload_lora_weights()
