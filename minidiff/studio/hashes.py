"""Which file was it? The sha256 of models, adapters and pictures, in 64 hex digits."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from minidiff.files.atomic import sha256
from minidiff.files.folder import LORA_FILES, local_folder
from minidiff.files.weights import find_weights
from minidiff.files.word_file import FILE_NAME


def sha256_of(path: str | Path) -> str:
    """The hash of a file, which is read once in a process."""
    return _digest(Path(path).resolve(), Path(path).stat().st_mtime_ns)


@functools.cache
def _digest(path: Path, mtime_ns: int) -> str:
    return sha256(path)


def model_sha256(name: str) -> str:
    """The hash of a model in one file; of a folder or hub id, that of the lines that `sha256sum` writes for the files which the
    pipeline reads, `HASH  unet/config.json`, sorted by name."""
    if Path(name).is_file():
        return sha256_of(name)
    home = local_folder(name)
    files = [home / "scheduler" / "scheduler_config.json"]
    second = [home / part for part in ("tokenizer_2", "text_encoder_2") if (home / part).is_dir()]  # SDXL's
    tokenizers = [file for folder in (home / "tokenizer", *second[:1]) for file in folder.iterdir()]
    files += [file for file in tokenizers if file.suffix in (".json", ".txt")]
    for part in ("unet", "vae", "text_encoder", *(folder.name for folder in second[1:])):
        files += [home / part / "config.json", find_weights(home / part)]
    named = sorted((file.relative_to(home).as_posix(), file) for file in files)
    return hashlib.sha256("".join(f"{sha256_of(file)}  {name}\n" for name, file in named).encode()).hexdigest()


HASHES: dict[str, Callable[[str], str]] = {  # by setting: how the file that it names is hashed
    "pretrained_model_name_or_path": model_sha256,
    "lora": lambda path: sha256_of(find_weights(path, LORA_FILES)),
    "textual_inversion": lambda path: sha256_of(find_weights(path, (FILE_NAME,))),
    "ip_adapter": lambda path: sha256_of(find_weights(path, ())),
    **dict.fromkeys(("image_encoder", "controlnet"), lambda path: sha256_of(find_weights(path))),
    **dict.fromkeys(("image", "mask_image", "ip_adapter_image", "control_image"), sha256_of),
}
