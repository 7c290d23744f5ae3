"""Flags of the diffusers training scripts that have another name here, or that nothing needs."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from minidiff.core.errors import SettingsError, WeightsError
from minidiff.files.folder import local_folder

SAME = {"save_steps": "checkpointing_steps", "dataset_name": "train_data_dir"}
NOT_NEEDED = {  # flag -> why
    "enable_xformers_memory_efficient_attention": "attention is fused", "allow_tf32": "PyTorch decides",
    "set_grads_to_none": "they always are", "pre_compute_text_embeddings": "prompts are encoded once",
    "tokenizer_name": "the model has its own", "tokenizer_max_length": "it is 77", "non_ema_revision": "there is one U-Net",
    "text_encoder_use_attention_mask": "CLIP has none", "class_labels_conditioning": "SD has none", "offload_ema": "small",
    "variant": "the file that is there is read", "foreach_ema": "it is quick", "image_interpolation_mode": "it is Lanczos",
    "validation_scheduler": "the model's own sampler draws", "skip_save_text_encoder": "only what is trained is saved",
    "save_as_full_pipeline": "the word's file is enough", "dataset_config_name": "a folder has none",
    "tracker_project_name": "--logging_dir names the folder", "hub_token": "`hf auth login` keeps it",
    "local_rank": "torchrun and accelerate say it",
}  # fmt: skip


def adapted(words: list[str]) -> list[str]:
    """The words of a command line with minidiff's flags alone. One note says which were left out, and why."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in [*SAME, *NOT_NEEDED]:
        parser.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", nargs="*")
    found, kept = parser.parse_known_args(words)
    given = {name: values for name, values in vars(found).items() if values is not None}
    if left := ", ".join(f"--{name} ({why})" for name, why in NOT_NEEDED.items() if name in given):
        print(f"Note: not needed here: {left}.", file=sys.stderr)
    for name, ours in SAME.items():
        if name in given:
            kept += [f"--{ours}", *(map(dataset, given[name]) if name == "dataset_name" else given[name])]
    return kept


def dataset(name: str) -> str:
    """A folder of pictures: the name itself, or a data set of that name in the local cache of the Hugging Face hub."""
    try:
        folder = local_folder(name, kind="dataset")
    except WeightsError as error:
        where = "there is no such folder, and no data set of that name in the hub's cache"
        raise SettingsError(f"--dataset_name {name}: {where}. Give the folder of the pictures as --train_data_dir.") from error
    return name if Path(name).is_dir() else str(folder / "train" if (folder / "train").is_dir() else folder)
