"""What every test shares: one thread, no network, and a complete tiny model folder with drawn weights."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path += [str(folder) for folder in Path(__file__).parent.iterdir() if folder.is_dir()]  # tests use each other's helpers
torch.set_num_threads(1)  # the same bits on every machine, and nothing here is big enough for two

PROMPTS = ["a photo of a red dog on the beach", "a drawing of a blue cat in the snow"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`pytest -n auto`: a process for each core, but each has PyTorch in memory."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of one file go to one process, where they share what is slow to make."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_curve() -> Iterator[None]:
    """No loss.png after each training: matplotlib would take longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minidiff.trainer.run.loss_curve", lambda metrics, path: None)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in SD's layout: TINY_UNET, TINY_VAE, a CLIP text tower of width 24. Read it, never change it.

    The weights come from `fill` in golden/make_models.py, which keeps variances: the networks answer with numbers
    about 1, so that a difference shows, as it would not behind PyTorch's small initial weights.
    """
    from tiny_sizes import TINY_UNET, TINY_VAE

    from minidiff.core.config import NoiseConfig
    from minidiff.core.unet import UNet2DConditionModel
    from minidiff.core.vae import AutoencoderKL
    from minidiff.draw.pipeline import StableDiffusionPipeline
    from minidiff.files.folder import SD15_TEXT
    from minidiff.files.text_files import build_text_encoder, load_tokenizer
    from minidiff.pocket.tokenizer import build_tokenizer

    fill = runpy.run_path(str(Path(__file__).parent / "golden" / "make_models.py"))["fill"]
    root = tmp_path_factory.mktemp("tiny")
    build_tokenizer(root / "words", PROMPTS)
    tokenizer = load_tokenizer(root / "words")
    text_config = SD15_TEXT | {
        "vocab_size": len(tokenizer),
        "hidden_size": TINY_UNET.cross_attention_dim,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 24,
    }
    parts = (UNet2DConditionModel(TINY_UNET), AutoencoderKL(TINY_VAE), build_text_encoder(text_config, "tiny"))
    unet, vae, text_encoder = map(fill, parts)
    pipe = StableDiffusionPipeline(unet, vae, text_encoder, tokenizer, NoiseConfig())
    pipe.save_pretrained(root / "model")
    return root / "model"
