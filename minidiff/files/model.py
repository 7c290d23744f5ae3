"""A whole model on disk, in and out: a folder in the layout of SD 1.5 on the hub, or one file in the LDM layout.

    read_model("checkpoints/pocket")                              a folder, or a hub id in the local cache
    read_model("sd15.safetensors")                                a single file, SD 1.x, SD 2.x or SDXL
    read_model("pocket.safetensors", like="checkpoints/pocket")   a single file of another architecture

A single file holds the three networks and nothing else: no sizes, no schedule, no vocabulary.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.core import textual_inversion
from minidiff.core.config import SD2_UNET, SD15_UNET, SD15_VAE, SDXL_UNET, SDXL_VAE, NoiseConfig, UNetConfig, VAEConfig
from minidiff.core.errors import AdapterError, SettingsError, WeightsError
from minidiff.core.inject import adapter_names
from minidiff.core.ip_adapter import ImageAttention
from minidiff.core.unet import UNet2DConditionModel
from minidiff.core.vae import AutoencoderKL
from minidiff.files import folder as layout
from minidiff.files import names, text_files, weights
from minidiff.files.folder import BIGG_TEXT, SD2_TEXT, SD15_TEXT, config_of, config_values, local_folder, read_config
from minidiff.files.weights import TensorFile, TensorInfo, find_weights, read_header, save

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

OPENCLIP_PAD = 0  # the token "!"
SINGLE_FILE, TOWERS = ".safetensors", ("text_encoder", "text_encoder_2")
CLASSES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
XL_CLASSES = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")
MODEL_INDEX: dict[str, Any] = {
    "_class_name": CLASSES[0], "_diffusers_version": "0.30.0", "feature_extractor": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
XL_INDEX = {key: value for key, value in MODEL_INDEX.items() if key not in ("safety_checker", "requires_safety_checker")} | {
    "_class_name": XL_CLASSES[0], "image_encoder": [None, None],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
}  # fmt: skip


class Family(NamedTuple):
    """The networks of a family's models. `texts`: of each text encoder the beginning of its names, and its config."""

    unet: UNetConfig
    vae: VAEConfig
    texts: dict[str, dict[str, Any]]


FAMILIES = {
    "SDXL": Family(
        SDXL_UNET, SDXL_VAE, {"conditioner.embedders.0.transformer.": SD15_TEXT, "conditioner.embedders.1.model.": BIGG_TEXT}
    ),
    "SD 2": Family(SD2_UNET, SD15_VAE, {"cond_stage_model.model.": SD2_TEXT}),
    "SD 1": Family(SD15_UNET, SD15_VAE, {"cond_stage_model.transformer.": SD15_TEXT}),
}


@dataclass(frozen=True)
class ModelParts:
    """Three networks, or SDXL's four, a vocabulary and a schedule. SDXL's second vocabulary differs from the first in its
    padding alone. `home`: the folder that says how the networks are built, if there is one."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer | None" = None
    noise_config: NoiseConfig = NoiseConfig()
    sampler: str = "ddim"
    home: Path | None = None
    text_encoder_2: Any = None  # transformers' CLIPTextModelWithProjection
    tokenizer_2: "CLIPTokenizer | None" = None
    force_zeros_for_empty_prompt: bool = True  # in SDXL, where a missing negative prompt is zeros, and "" is encoded

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's constructor. SettingsError if there is no vocabulary."""
        if self.tokenizer is None:
            need = "a model folder needs a vocabulary, and a single file has none"
            raise SettingsError(f"{need}; give --tokenizer, the tokenizer folder of SD 1.5.")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "home"}

    @property
    def towers(self) -> dict[str, Any]:
        """The text encoders."""
        return {name: tower for name in TOWERS if (tower := getattr(self, name)) is not None}

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "vae": self.vae, **self.towers}

    @property
    def adaptable(self) -> dict[str, nn.Module]:
        """The networks that adapters change."""
        return {"unet": self.unet, **self.towers}

    def weights(self) -> dict[str, Tensor]:
        """Every tensor, by network and minidiff's name; the tensors themselves, not copies."""
        return {f"{part}.{key}": tensor for part in self.networks for key, tensor in weights.named(self.networks[part]).items()}


# --- reading -----------------------------------------------------------------------------------------------------------


def read_model(
    name: str | Path, like: str | Path | None = None, tokenizer: str | Path | None = None,
    dtypes: Mapping[str, torch.dtype | None] = {}, light: Any = None, prediction_type: str | None = None,
) -> ModelParts:  # fmt: skip
    """A model folder, a hub id in the local cache, or an SD 1.x, SD 2.x or SDXL checkpoint in one LDM file; frozen.

    `like` is a folder that describes the networks of a single file, in place of its family's sizes. `tokenizer` is the folder
    of a vocabulary, in place of the model's own. `dtypes`: network -> the dtype to cast its weights to; else as in the file.
    `light`: see `load_tokenizer`. `prediction_type`: of a single file, which does not say it. WeightsError for anything that
    is missing, damaged or does not fit.
    """
    file = read_header(name) if is_single_file(name) else None
    family = family_of(file) if file else None
    model = empty_model(like if file else name, light, family)
    if file:
        files = split_single_file(file, model.unet.config, model.vae.config, model.text_encoder.config.num_hidden_layers)
    else:
        files = {part: read_header(find_weights(local_folder(str(name)) / part)) for part in model.networks}
    for part, network in model.networks.items():
        weights.load_into(network, files[part], dtypes.get(part.removesuffix("_2")))
        network.requires_grad_(False).eval()
    if model.home is not None:
        values, where = config_of(model.home / "scheduler", "scheduler_config.json")
        noise = read_config(NoiseConfig, layout.noise_values(values), where)
        model = replace(model, noise_config=noise, sampler=layout.sampler_of(values, where))
    if file or prediction_type:
        model = replace(model, noise_config=predicting(model, name, file, prediction_type))
    if folder := tokenizer or (model.home and model.home / "tokenizer"):
        model = replace(model, tokenizer=text_files.load_tokenizer(Path(folder), light))
    if model.text_encoder_2 is not None and model.home:
        model = replace(model, tokenizer_2=text_files.load_tokenizer(model.home / "tokenizer_2", light))
    if model.tokenizer and not model.home:  # the folder may be that of any model
        model.tokenizer.pad_token_id = OPENCLIP_PAD if family == "SD 2" else model.tokenizer.eos_token_id
        if family == "SDXL":
            second = copy.deepcopy(model.tokenizer)
            second.pad_token_id, model = OPENCLIP_PAD, replace(model, tokenizer_2=second)
    return model


def predicting(model: ModelParts, name: str | Path, file: TensorFile | None, prediction_type: str | None) -> NoiseConfig:
    """The noise settings of a single file. SD 2.x has models of both kinds; the biases of one norm tell, as in ComfyUI."""
    if file is None or prediction_type not in (None, "epsilon", "v_prediction"):
        rule = "it is epsilon or v_prediction, for a model in one file alone; a folder has a scheduler_config.json"
        raise SettingsError(f'{name}: --prediction_type is "{prediction_type}"; {rule}.')
    if prediction_type is None and model.home is None and family_of(file) == "SD 2":
        key = f"{names.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        bias = replace(file, tensors={k: info for k, info in file.tensors.items() if k == key}).read(torch.float32)
        v = any(numbers.std(correction=0) > 0.09 for numbers in bias.values())
        rule = "does not say whether it predicts epsilon or v, and epsilon is taken. Say it yourself with --prediction_type"
        warnings.warn(f"{name} {rule}; by its weights it is {'v_prediction' if v else 'epsilon'}.", stacklevel=3)
    marked = "v_prediction" if "v_pred" in file.tensors else None  # as in SDXL's that were trained so
    said: Any = prediction_type or marked or model.noise_config.prediction_type
    return replace(model.noise_config, prediction_type=said)


def read_again(model: ModelParts, place: Path) -> ModelParts:
    """A model that was just written, to compare it."""
    return read_model(place, model.home, prediction_type=model.noise_config.prediction_type if is_single_file(place) else None)


def is_single_file(name: str | Path) -> bool:
    return Path(name).is_file() or Path(name).suffix == SINGLE_FILE


def empty_model(name: str | Path | None, light: Any = None, family: str | None = None) -> ModelParts:
    """The networks that a folder (or hub id) describes, or those of a `family`, on "meta": shapes without numbers."""
    if name is None:
        own = FAMILIES[family or "SD 1"]
        unet, vae, texts = own.unet, own.vae, [(text, "SD") for text in own.texts.values()]
        more: Any = {"noise_config": NoiseConfig(timestep_spacing="leading"), "sampler": "euler"} if family == "SDXL" else {}
    else:
        home = local_folder(str(name))
        index = layout.read_json(home / "model_index.json", "a model folder in the diffusers layout has one")
        if (kind := index.get("_class_name")) not in CLASSES + XL_CLASSES:
            what = f"describes a {kind}; minidiff reads Stable Diffusion 1.x, 2.x and XL ({CLASSES[0]}, {XL_CLASSES[0]})"
            raise WeightsError(f"{home / 'model_index.json'} {what}.")
        unet, vae = read_config(UNetConfig, *config_of(home / "unet")), read_config(VAEConfig, *config_of(home / "vae"))
        texts = [config_of(home / part) for part in (TOWERS if kind in XL_CLASSES else TOWERS[:1])]
        zeros = bool(index.get("force_zeros_for_empty_prompt", True))  # the default of the field's pipeline
        more = {"home": home, "force_zeros_for_empty_prompt": zeros}
    with torch.device("meta"):
        first = text_files.build_text_encoder(*texts[0], light)
        second = text_files.build_text_encoder(*texts[1], projected=True) if len(texts) > 1 else None
        return ModelParts(UNet2DConditionModel(unet), AutoencoderKL(vae), first, text_encoder_2=second, **more)


# --- one file ----------------------------------------------------------------------------------------------------------


def family_of(file: TensorFile) -> str:
    """The family of a model in one file, by the names of its last text encoder."""
    lasts = {name: [*family.texts][-1] for name, family in FAMILIES.items()}
    return next((name for name, last in lasts.items() if any(key.startswith(last) for key in file.tensors)), "SD 1")


def split_single_file(
    file: TensorFile, unet_config: UNetConfig = SD15_UNET, vae_config: VAEConfig = SD15_VAE, layers: int = 12
) -> dict[str, TensorFile]:
    """The networks of a single file under minidiff's names; no data is read. What training left behind is left out.

    `layers`: of SD 2's text encoder, whose file has one more.
    """
    texts = [*FAMILIES[family := family_of(file)].texts]
    openclip = [key for key in file.tensors if family != "SD 1" and key.startswith(texts[-1])]
    tables = {
        names.UNET_PREFIX: names.inverse(names.unet_table(unet_config)),
        names.VAE_PREFIX: names.inverse(names.vae_table(vae_config)),
        **dict.fromkeys(texts, dict[str, str]()),
    }
    parts: dict[str, dict[str, TensorInfo]] = {prefix: {} for prefix in tables}
    unknown = []
    for key, info in weights.without_leftovers(file.tensors, file.path, openclip).items():
        if prefix := next((prefix for prefix in tables if key.startswith(prefix)), None):
            parts[prefix][names.rename(key.removeprefix(prefix), tables[prefix])] = info
        else:
            unknown.append(key)
    absent = [prefix for prefix, tensors in parts.items() if not tensors]
    if absent or unknown:
        problems = {"parts missing": absent, "unknown": unknown}
        raise WeightsError(file.misfit(f"{file.path} is no SD 1.x, SD 2.x or SDXL checkpoint in one file.", problems))
    if openclip:
        parts[texts[-1]] = text_files.from_openclip(parts[texts[-1]], layers if family == "SD 2" else None)
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {part: replace(file, tensors=tensors) for part, tensors in zip(networks, parts.values())}


def ldm_tensors(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: nn.Module, text_encoder_2: Any = None
) -> dict[str, Tensor]:
    """The networks under the names of the LDM layout. SD 2 is known by its linear projections; its text is OpenCLIP's."""
    family = "SDXL" if text_encoder_2 is not None else "SD 2" if unet.config.use_linear_projection else "SD 1"
    tensors: dict[str, Tensor] = {}
    for prefix, tower in zip(FAMILIES[family].texts, (text_encoder, text_encoder_2)):
        written = text_files.to_openclip if prefix.endswith(".model.") else text_files.to_file_keys
        tensors |= {prefix + key: value for key, value in written(weights.named(tower)).items()}
    table = names.unet_table(unet.config)
    tensors |= {names.UNET_PREFIX + names.rename(key, table): value for key, value in unet.state_dict().items()}
    table = names.vae_table(vae.config)
    for key, value in vae.state_dict().items():
        weight = value[:, :, None, None] if names.is_vae_attention(key) else value
        tensors[names.VAE_PREFIX + names.rename(key, table)] = weight
    return tensors


# --- writing -----------------------------------------------------------------------------------------------------------


def write_model(model: ModelParts, place: Path) -> None:
    """As a single file or as a folder; the name of the place says which."""
    if place.suffix == SINGLE_FILE:
        save(ldm_tensors(model.unet, model.vae, model.text_encoder, model.text_encoder_2), place)
    else:
        write_folder(model, place)


def write_folder(model: ModelParts, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder for `read_model` and diffusers.

    Raises AdapterError while a LoRA or a new word is attached, and SettingsError if there is no vocabulary.
    """
    home = Path(folder)
    tokenizers = {"tokenizer": model.arguments["tokenizer"]}
    for adapted in model.adaptable.values():
        if adapters := adapter_names(adapted):  # the state dict would have names that no other program knows
            raise AdapterError(f"{type(adapted).__name__} carries adapters ({', '.join(adapters)}); unload_lora_weights first.")
    if any(isinstance(module, ImageAttention) for module in model.unet.modules()):
        raise AdapterError("the U-Net carries an IP-Adapter, which a model's folder cannot hold; unload_ip_adapter first.")
    if words := textual_inversion.placeholders(model.text_encoder):
        raise AdapterError(f"the text encoder has new words ({', '.join(words)}); unload_textual_inversion first.")
    index = MODEL_INDEX
    if model.text_encoder_2 is not None:
        index, tokenizers["tokenizer_2"] = XL_INDEX, model.tokenizer_2
        index = index | {"force_zeros_for_empty_prompt": model.force_zeros_for_empty_prompt}
    for part, network in model.networks.items():
        config: Any = network.config
        if part in TOWERS:
            state, stem = text_files.to_file_keys(network.state_dict()), "model"
            values = text_files.text_values(config, index[part][1])
        else:
            state, stem = network.state_dict(), "diffusion_pytorch_model"
            values = config_values(config, index[part][1])
        save({key: tensor.to(dtype or tensor.dtype) for key, tensor in state.items()}, home / part / f"{stem}.safetensors")
        layout.write_json(home / part / "config.json", values)
    scheduler = layout.scheduler_values(model.noise_config, model.sampler)
    layout.write_json(home / "scheduler" / "scheduler_config.json", scheduler)
    for part, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(str(home / part))
        if not (home / part / "vocab.json").exists():  # transformers 5 writes one file in place of SD 1.5's two
            tokenizer.backend_tokenizer.model.save(str(home / part))
            (home / part / "tokenizer.json").unlink()
    layout.write_json(home / "model_index.json", index | {"scheduler": ["diffusers", scheduler["_class_name"]]})


# --- checks ------------------------------------------------------------------------------------------------------------


def check_parts_fit(model: ModelParts, name: str = "") -> None:
    """WeightsError unless the networks fit each other: each may be sound, and from another model."""
    config, words, towers = model.unet.config, len(model.arguments["tokenizer"]), [*model.towers.values()]
    tables = [tower.config.vocab_size for tower in towers]
    width, reads = sum(tower.config.hidden_size for tower in towers), config.cross_attention_dim
    added, vector = config.projection_class_embeddings_input_dim, 6 * (config.addition_time_embed_dim or 0)
    channels, latent = config.in_channels, model.vae.config.latent_channels
    problem = None
    if {words} != {*tables}:  # a smaller tokenizer would not fail: its ids mean other words, and the picture is another
        table = " and ".join(map(str, tables))
        problem = f"tokenizer has {words} tokens and the text encoder {table}; they are from different models."
    elif width != reads:
        problem = f"text encoder is {width} wide and the U-Net reads {reads}; they are from different models."
    elif channels not in (latent, 2 * latent + 1):  # 9: noisy latents, the mask, and the latents of the masked picture
        what = {8: "an image-editing model", 5: "a depth model"}.get(channels, "another model")
        works = f"minidiff draws with {latent}, or {2 * latent + 1} for inpainting. Take such a model."
        problem = f"U-Net has {channels} input channels ({what}); {works}"
    elif (added or 0) != (vector := vector + (towers[1].config.projection_dim if len(towers) > 1 else 0)):
        problem = f"U-Net reads a vector of {added} numbers, as SDXL's do, and this model's text encoders make {vector}."
    if problem:
        raise WeightsError(f"{name}: the {problem}" if name else f"the {problem}")


def cast(model: ModelParts, dtype: torch.dtype) -> None:
    """All weights to another dtype, in place; WeightsError for a number that it cannot hold."""
    for key, tensor in model.weights().items():
        if not weights.is_finite(tensor.to(dtype)):
            raise WeightsError(f"{key} has numbers too large for {dtype}; take bfloat16 or float32.")
    for network in model.networks.values():
        network.to(dtype)
