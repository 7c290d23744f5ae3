"""Which file was it? sha256 of weight files, model folders and pictures, remembered so that 4 GB are read only once.

What is remembered lies in one small JSON file, `$XDG_CACHE_HOME/minidiff/hashes.json` (or ~/.cache/minidiff): for each large
file its size, its time of change and its sha256; and for each hash the place where it was last seen, so that
`minidiff sample --from` finds a file again whose path the picture does not tell. A lost, broken or read-only cache costs time
and nothing else.
"""

import functools
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from minidiff.core.errors import MinidiffError
from minidiff.files.folder import local_folder
from minidiff.files.lora_file import find_lora
from minidiff.files.weights import find_weights
from minidiff.files.word_file import find_file

REMEMBERED = 1 << 20  # bytes: smaller files are read as quickly as the cache is asked
SETTLED = 2.0  # seconds: a file that has just changed may change again within one tick of its file system's clock
MAX_ENTRIES, MAX_CACHE = 2000, 4 << 20  # files; bytes

# --- files -----------------------------------------------------------------------------------------------------------


def sha256_of(path: str | Path, data_only: bool = False) -> str:
    """64 hex digits. `data_only`: a safetensors file without its header, which A1111 and Civitai use for LoRAs (AutoV3):
    editing the title leaves it as it was."""
    path = Path(path).resolve()
    try:
        status = path.stat()
        if status.st_size < REMEMBERED:
            return _digest(path, data_only)
        return _remembered(path, status.st_size, status.st_mtime_ns, data_only)
    except OSError as error:
        why = error.strerror or error
        raise MinidiffError(f"{path.name}: cannot be read ({why}). Check the path and the rights.") from error


def _digest(path: Path, data_only: bool) -> str:
    with path.open("rb") as file:
        if data_only:
            file.seek(8 + int.from_bytes(file.read(8), "little"))  # the format: header length, header, data
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)  # for a cache that cannot be written: several pictures of one call hash once
def _remembered(path: Path, size: int, mtime_ns: int, data_only: bool) -> str:
    key, part = f"{path}", "data" if data_only else "sha256"
    entry = _read_cache()["files"].get(key, {})
    same = isinstance(entry, dict) and (entry.get("size"), entry.get("mtime_ns")) == (size, mtime_ns)
    if same and is_sha256(entry.get(part)):
        return str(entry[part])
    found = _digest(path, data_only)
    if time.time() - mtime_ns / 1e9 > SETTLED:
        _add("files", key, {**(entry if same else {}), "size": size, "mtime_ns": mtime_ns, part: found})
    return found


def model_sha256(name: str) -> str:
    """The hash of a model: that of a single file; of a folder or hub id, one over those parts of it that make pictures.

    These are config.json and the weight file of unet, vae and text_encoder, scheduler/scheduler_config.json, and every
    .json and .txt file of tokenizer. It is the sha256 of lines `HASH  unet/config.json`, sorted by name, as `sha256sum`
    writes them: so a card, a preview or another precision beside them changes nothing, and coreutils can check it.
    """
    if Path(name).is_file():
        return sha256_of(name)
    home = local_folder(name)
    files = [home / "scheduler" / "scheduler_config.json"]
    for part in ("unet", "vae", "text_encoder"):
        files += [home / part / "config.json", find_weights(home / part)]
    files += [file for ending in ("json", "txt") for file in (home / "tokenizer").glob(f"*.{ending}")]
    lines = sorted((file.relative_to(home).as_posix(), sha256_of(file)) for file in files)
    return hashlib.sha256("".join(f"{found}  {name}\n" for name, found in lines).encode()).hexdigest()


def folder_sha256(folder: str | Path) -> str:
    """The same rule for a tokenizer's folder: all of its .json and .txt files."""
    files = [file for ending in ("json", "txt") for file in Path(folder).glob(f"*.{ending}")]
    if not files:
        raise MinidiffError(f"{folder}: there is no tokenizer in it; give the folder with vocab.json and merges.txt.")
    lines = sorted((file.name, sha256_of(file)) for file in files)
    return hashlib.sha256("".join(f"{found}  {name}\n" for name, found in lines).encode()).hexdigest()


HASHES = {  # by setting: how the file behind its value is hashed
    "pretrained_model_name_or_path": model_sha256,
    "tokenizer": folder_sha256,
    "lora": lambda path: sha256_of(find_lora(path, None)),
    "textual_inversion": lambda path: sha256_of(find_file(Path(path))),
    "image": sha256_of,
    "mask_image": sha256_of,
}


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


# --- places ----------------------------------------------------------------------------------------------------------


def remember_place(sha256: str, path: str | Path) -> None:
    """Where something with this hash is, for this user only."""
    _add("places", sha256, str(Path(path).expanduser().absolute()))


def remembered_place(sha256: str) -> str | None:
    """Where it was last seen; whether it is still there is for the caller to check."""
    place = _read_cache()["places"].get(sha256)
    return place if isinstance(place, str) else None


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(folder) if os.path.isabs(folder) else Path("~/.cache").expanduser()  # as its specification says
    return home / "minidiff" / "hashes.json"


def _read_cache() -> dict[str, dict[str, Any]]:
    try:
        path = cache_file()
        found = json.loads(path.read_text("utf-8")) if path.stat().st_size <= MAX_CACHE else {}
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder, or JSON nested too deep
        found = {}
    tables = found if isinstance(found, dict) else {}
    return {name: table if isinstance(table := tables.get(name), dict) else {} for name in ("files", "places")}


def _add(table: str, key: str, value: object) -> None:
    """Write the cache anew with one entry more, the newest last and the oldest gone; whole or not at all."""
    tables = _read_cache()
    tables[table].pop(key, None)
    entries = [*tables[table].items(), (key, value)]
    tables[table] = dict(entries[-MAX_ENTRIES:])
    try:
        path = cache_file()
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            part.write_text(json.dumps(tables, indent=1), "utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError):
        pass  # a folder that cannot be written: next time it takes as long again
