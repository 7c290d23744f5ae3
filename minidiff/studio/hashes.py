"""Which file was it? The sha256 of models, adapters and pictures."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from minidiff.core.errors import MinidiffError
from minidiff.files.folder import local_folder
from minidiff.files.lora_file import LORA_FILES
from minidiff.files.weights import find_weights
from minidiff.files.word_file import FILE_NAME


def sha256_of(path: str | Path, data_only: bool = False) -> str:
    """64 hex digits; a file is read once in a process. `data_only` leaves out the header of a safetensors file, so that a
    new title does not change the hash: A1111 and Civitai name LoRAs by it (AutoV3)."""
    path = Path(path).resolve()
    try:
        status = path.stat()
        return _digest(path, status.st_size, status.st_mtime_ns, data_only)
    except OSError as error:
        raise MinidiffError(f"{path.name}: cannot be read ({error.strerror or error}). Check path and rights.") from error


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int, data_only: bool) -> str:
    with path.open("rb") as file:
        if data_only:
            file.seek(8 + int.from_bytes(file.read(8), "little"))  # the format: header length, header, data
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(folder: Path, files: Iterable[Path]) -> str:
    """The sha256 of the lines that `sha256sum` writes, `HASH  unet/config.json`, sorted by name."""
    lines = sorted((file.relative_to(folder).as_posix(), sha256_of(file)) for file in files)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()


def model_sha256(name: str) -> str:
    """The hash of a model in one file; of a folder or hub id, one over the files in it that the pipeline reads."""
    if Path(name).is_file():
        return sha256_of(name)
    home = local_folder(name)
    files = [home / "scheduler" / "scheduler_config.json", *_vocabulary(home / "tokenizer")]
    for part in ("unet", "vae", "text_encoder"):
        files += [home / part / "config.json", find_weights(home / part)]
    return sha256_of_files(home, files)


def _vocabulary(folder: Path) -> list[Path]:
    files = [file for ending in ("json", "txt") for file in folder.glob(f"*.{ending}")]
    if not files:
        raise MinidiffError(f"{folder}: there is no tokenizer in it; give the folder with vocab.json and merges.txt.")
    return files


HASHES: dict[str, Callable[[str], str]] = {  # by setting: how the file that it names is hashed
    "pretrained_model_name_or_path": model_sha256,
    "tokenizer": lambda folder: sha256_of_files(Path(folder), _vocabulary(Path(folder))),
    "lora": lambda path: sha256_of(find_weights(path, LORA_FILES)),
    "textual_inversion": lambda path: sha256_of(find_weights(path, [FILE_NAME])),
    "image": sha256_of,
    "mask_image": sha256_of,
}
