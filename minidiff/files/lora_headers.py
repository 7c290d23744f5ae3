"""Which file is the LoRA, and what its header says of each module, before any data is read.

    lora_header(read_header(find_lora("dog")), SD15_UNET).modules      {"unet.….attn1.to_q": {"down": TensorInfo, …}, …}

dialects.py knows the names; lora.py reads the data.
"""

from dataclasses import dataclass
from pathlib import Path

from minidiff.core.config import UNetConfig
from minidiff.core.errors import AdapterError
from minidiff.files import names as keymaps
from minidiff.files import word_file as embeddings
from minidiff.files.lora_names import place_of
from minidiff.files.weights import TensorFile, TensorInfo

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
USE_INVERSION = "A textual inversion is used by --textual_inversion, in Python by load_textual_inversion."

Headers = dict[str, dict[str, TensorInfo]]  # module -> its tensors by part


@dataclass(frozen=True)
class LoRAHeader:
    """The tensors of a file by module and part, and the names that are no part of any."""

    file: TensorFile
    dialect: str  # the style of its names: dialects.py lists them
    modules: Headers
    unknown: list[str]


def find_lora(path: str | Path, weight_name: str | None = None) -> Path:
    """The file that is meant by a file or a folder."""
    path = Path(path)
    if weight_name is not None:
        return path / weight_name
    if not path.is_dir():
        return path
    for name in (FILE_NAME, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    there = sorted(p.name for p in path.glob("*.safetensors"))
    if embeddings.FILE_NAME in there:
        raise AdapterError(f"{path} is no LoRA's folder: it has {embeddings.FILE_NAME}. {USE_INVERSION}")
    hint = f"it has {', '.join(there)}: name the file itself" if there else "there is no .safetensors file in it"
    raise AdapterError(f"{path} has no {FILE_NAME} and no {PEFT_FILE}; {hint}.")


def check_dialect(file: TensorFile) -> str:
    """The style of the file, or an AdapterError that says what the file is instead."""
    dialect, kind = keymaps.lora_dialect(file.tensors), keymaps.adapter_kind(file.tensors)
    if dialect is None:
        hint = f" {USE_INVERSION}" if embeddings.is_embedding(file.tensors) else ""
        raise AdapterError(f"{file.path} is no LoRA. The file looks like {file.looks_like}.{hint}")
    if kind not in ("LoRA", "DoRA"):
        raise AdapterError(
            f"{file.path}: unsupported adapter type {kind}; minidiff reads LoRA, LoCon and DoRA. Bake it into a model with the "
            "program that made it: minidiff merge extract gets a LoRA out of that."
        )
    if dialect == "cloneofsimo":
        raise AdapterError(
            f"{file.path} is {file.looks_like}, which counts layers and does not name them; minidiff does not read that. "
            f"Three of its tensors: {', '.join(list(file.tensors)[:3])}."
        )
    return dialect


def lora_header(file: TensorFile, config: UNetConfig) -> LoRAHeader:
    """The header in order. LDM's names are counted in a U-Net like `config`. AdapterError for another kind of file."""
    dialect, modules, unknown = check_dialect(file), Headers(), []
    for key, info in file.tensors.items():
        if (place := place_of(key, config)) is None:
            unknown.append(key)
        elif (twin := modules.setdefault(place.module, {}).setdefault(place.part, info)) is not info:
            raise AdapterError(f"{file.path} has two tensors for one place: {twin.key} and {key}.")
    return LoRAHeader(file, dialect, modules, unknown)
