"""A result that is ready to upload: the model card, and the metadata of the weight file.

Neither has a path, a caption or a date: where the pictures are is private, and the same run gives the same bytes.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minidiff.core.errors import MinidiffError
from minidiff.core.text import token_ids
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.prompting import literal
from minidiff.files.folder import local_folder
from minidiff.files.looks import architecture
from minidiff.files.values import to_toml
from minidiff.trainer.latents import LatentData
from minidiff.trainer.settings import FineTuneSettings

RARE, USUAL = 40_000, ("sks", "ohwx")  # tokens of CLIP's 49,408, the frequent ones first; words that stand for a subject
TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training"]
LICENSE = ("license", "license_name", "license_link")
SHEET = "sheet.png"  # of samples/, which show training pictures, only this is published
# git and huggingface_hub follow .gitignore
NOT_PUBLISHED = ("checkpoint-*/", "samples/", "metrics.jsonl", ".lock", ".tmp-*", "state/")
TITLES = dict(dreambooth="DreamBooth", lora="LoRA", textual_inversion="Textual inversion", pivotal="Pivotal tuning",
              controlnet="ControlNet", ip_adapter="IP-Adapter")  # fmt: skip
WHOLE = 'pipe = StableDiffusionPipeline.from_pretrained("{name}")'
BASE = 'pipe = StableDiffusionPipeline.from_pretrained("{base}")'
WORD, LORA = 'pipe.load_textual_inversion("{name}")', 'pipe.load_lora_weights("{name}")'
IP = 'pipe.load_ip_adapter("{name}", subfolder="", weight_name="ip_adapter.safetensors")'
NET = 'net = ControlNetModel.from_pretrained("{name}")'
CONTROLLED = 'pipe = StableDiffusionControlNetPipeline.from_pretrained("{base}", controlnet=net)'
CODE = {  # that loads a result, by tag; other results are WHOLE models
    "lora": [BASE, LORA], "textual_inversion": [BASE, WORD], "pivotal": [BASE, WORD, LORA], "ip_adapter": [BASE, IP],
    "controlnet": [NET, CONTROLLED],
}  # fmt: skip


def base_license(base: str) -> dict[str, Any]:
    """The licence in the base model's card, which also holds for what is made from it; "other" if there is none."""
    from huggingface_hub import ModelCard

    card = local_folder(base) / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    data = ModelCard(text, ignore_metadata_errors=True).data
    found = {key: data[key] for key in LICENSE if isinstance(data.get(key), str)}
    return found if "license" in found else {"license": "other", "license_name": "unknown"}


def license_word(terms: Mapping[str, str]) -> str:
    """The name of a licence. The hub calls a licence that it does not know "other", and gives its name separately."""
    return terms.get("license_name", terms["license"])


def is_hub_id(name: str) -> bool:
    """Is it "owner/name", and no path that exists here?"""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def model_spec(
    settings: FineTuneSettings, kind: str, data: LatentData, pipe: StableDiffusionPipeline, base_hash: str
) -> dict[str, str]:
    """Metadata of an adapter's file: ModelSpec 1.0.1, and those fields of kohya's scripts (`ss_`) by which A1111 knows it.

    `kind` is "lora" or "textual-inversion", `base_hash` the fingerprint of the base.
    """
    name = Path(settings.output_dir).resolve().name
    v = pipe.schedule.config.prediction_type == "v_prediction"
    name_of_base, kohyas_name = architecture(pipe.unet.config.cross_attention_dim, v)
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{name_of_base}/{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.resolution": f"{data.resolution}x{data.resolution}",
        "modelspec.license": license_word(base_license(settings.pretrained_model_name_or_path)),
        "modelspec.prediction_type": "v" if v else "epsilon",
        "ss_v2": str(kohyas_name.startswith("sd_v2")),
        "ss_base_model_version": kohyas_name,
        "ss_output_name": name,
        "ss_sd_model_name": Path(settings.pretrained_model_name_or_path).resolve().name,
        "base_fingerprint": base_hash,
    }
    word = trigger_of(settings, data, pipe)
    triggers = {"modelspec.trigger_phrase": settings.prompt or word, "trigger": word}
    return spec | {key: text for key, text in triggers.items() if text}


def trigger_of(settings: FineTuneSettings, data: LatentData, pipe: StableDiffusionPipeline) -> str | None:
    """--trigger, or the one word that all captions share and the base hardly knows; None where there are several or none."""
    shared = set.intersection(*(set(re.findall(r"[\w<>-]+", e.caption.lower())) for e in data.examples))
    ids = {word: token_ids(pipe.tokenizer, word) for word in shared}
    unknown = [word for word, own in ids.items() if len(own) > 1 or own[0] > RARE or word in USUAL]
    return settings.trigger or (unknown[0] if len(unknown) == 1 else None)


def write_card(folder: Path, settings: FineTuneSettings, updates: int, tag: str, trigger: str | None) -> None:
    """Write `folder/README.md`, a model card whose code runs in the folder above, and .gitignore. `tag`: the hub's word."""
    from huggingface_hub import ModelCardData

    base, name, prompt = settings.pretrained_model_name_or_path, Path(settings.output_dir).resolve().name, settings.prompt
    short, terms = Path(base).resolve().name, base_license(base)
    front = ModelCardData(base_model=base if is_hub_id(base) else short, tags=[*TAGS, tag], inference=True, **terms)
    method = "DoRA" if getattr(settings, "use_dora", False) and tag == "lora" else TITLES.get(tag, "Full fine-tune")
    lines = [f"# {name}", f"{method} of {short}, {updates:,} updates."]
    if settings.validation_steps:
        lines.insert(1, f"![The base above, this model below]({SHEET})")
    if prompt:
        front["instance_prompt"], front["widget"] = prompt, [{"text": prompt}]
        lines.append(f"Its prompt: `{literal(prompt)}`.")
    if trigger:
        front["instance_prompt"] = prompt or trigger
        lines.append(f"Its trigger word: `{literal(trigger)}`.")
    there = Path(os.path.relpath(base, Path(settings.output_dir).parent)).as_posix() if Path(base).exists() else base
    code = "\n".join(CODE.get(tag, [WHOLE])).format(name=name, base=there)
    names = ", ".join(re.findall(r"(\w+)\.from_pretrained", code))
    lines.append(f"```python\nfrom minidiff import {names}  # or from diffusers\n\n{code}\n```")
    lines.append(f"Made with minidiff. The licence ({license_word(terms)}) is that of the base model. Settings:")
    lines.append(f"```toml\n{to_toml(settings, settings.HARMLESS)}```")
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n" + "\n\n".join(lines) + "\n", encoding="utf-8")
    (folder / ".gitignore").write_text("\n".join(NOT_PUBLISHED) + "\n", encoding="utf-8")


def upload(settings: FineTuneSettings) -> str:
    """--push_to_hub: the address of the repository that now holds the result. MinidiffError where it could not be reached."""
    from huggingface_hub import HfApi

    folder, api = Path(settings.output_dir).resolve(), HfApi()
    try:
        place = api.create_repo(settings.hub_model_id or folder.name, exist_ok=True)
        api.upload_folder(repo_id=place.repo_id, folder_path=folder, ignore_patterns=list(NOT_PUBLISHED))
    except Exception as error:  # of the network, of the token, of the name: each library has its own
        raise MinidiffError(f"{folder} is whole, but --push_to_hub failed: {error}. Is `hf auth login` done?") from error
    return str(place)
