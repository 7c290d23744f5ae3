"""From a prompt to a picture: the three networks of Stable Diffusion, and what goes from one to the next.

    prompt --text encoder--> (B, 77, D) --\\
    noise  (B, 4, h, w) ----------------- U-Net, once a step, through guidance and a sampler --> latents --VAE--> picture

    B pictures   D text width   H W picture height and width   h w = H/8, W/8 latent height and width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff import weights
from minidiff.adapters import inject, textual_inversion
from minidiff.call import as_list, check_call, check_latents, noise_source
from minidiff.config import SD15_UNET, SD15_VAE, NoiseConfig, UNetConfig, VAEConfig
from minidiff.diffusion.guidance import guided
from minidiff.diffusion.samplers import Step, sampler_named
from minidiff.diffusion.schedule import NoiseSchedule
from minidiff.errors import SettingsError, WeightsError
from minidiff.files import embeddings, lora
from minidiff.images import to_pil
from minidiff.layout import (
    MODEL_INDEX,
    SAMPLER_OF,
    SD15_TEXT,
    check_class,
    config_of,
    local_folder,
    read_json,
    sampler_of,
    save_tokenizer,
    write_json,
)
from minidiff.models.text import build_text_encoder, encode_prompt, load_tokenizer, to_file_keys
from minidiff.models.unet import UNet2DConditionModel
from minidiff.models.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


MAX_SIDE = 8192  # pixels: beyond, attention takes days


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL pictures; or one tensor, where `output_type` asked for it."""

    images: Any


class StableDiffusionPipeline:
    """Text to image. The parts are plain attributes: `unet`, `vae`, `text_encoder`, `tokenizer`, `schedule`."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: "CLIPTextModel",
        tokenizer: "CLIPTokenizer",
        noise_config: NoiseConfig,
        sampler: str = "ddim",
        name_or_path: str = "",
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.noise_config, self.schedule = noise_config, NoiseSchedule.from_config(noise_config)
        self.sampler, self.name_or_path, self.progress_bar = sampler, name_or_path, True
        check_parts_fit(self)

    # --- loading and saving ----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32) -> "StableDiffusionPipeline":
        """Read a folder in the diffusers layout, or a hub id whose files are in the local cache.

        The VAE stays in fp32 whatever `torch_dtype` says: in fp16 it overflows, and the picture is black.
        Raises WeightsError for anything that is missing, damaged or does not fit.
        """
        home = local_folder(str(folder))
        parts = read_json(home / "model_index.json", "a model folder in the diffusers layout has one")
        check_class(parts, home / "model_index.json")
        with torch.device("meta"):  # no memory and no random numbers: the file's tensors become the weights
            unet = UNet2DConditionModel(UNetConfig.from_dict(*config_of(home / "unet")))
            vae = AutoencoderKL(VAEConfig.from_dict(*config_of(home / "vae")))
            text_encoder = build_text_encoder(*config_of(home / "text_encoder"))
        for model, part, dtype in (
            (unet, "unet", torch_dtype),
            (vae, "vae", torch.float32),
            (text_encoder, "text_encoder", torch_dtype),
        ):
            weights.load_into(model, weights.find_weights(home / part), dtype)
        noise, where = config_of(home / "scheduler", "scheduler_config.json")
        sampler = sampler_of(noise, where)
        tokenizer = load_tokenizer(home / "tokenizer")
        return cls(
            frozen(unet),
            frozen(vae),
            frozen(text_encoder),
            tokenizer,
            NoiseConfig.from_dict(noise, where),
            sampler,
            str(folder),
        )

    @classmethod
    def from_single_file(
        cls, path: str | Path, tokenizer: str | Path, torch_dtype: torch.dtype = torch.float32
    ) -> "StableDiffusionPipeline":
        """Read an SD 1.x checkpoint in one LDM/CompVis `.safetensors` file.

        Such a file has no vocabulary: `tokenizer` is the folder of any SD 1.x model's tokenizer.
        """
        files = weights.split_single_file(path)
        with torch.device("meta"):
            unet, vae = UNet2DConditionModel(SD15_UNET), AutoencoderKL(SD15_VAE)
            text_encoder = build_text_encoder(SD15_TEXT, "SD 1.5")
        for model, file, dtype in (
            (unet, files.unet, torch_dtype),
            (vae, files.vae, torch.float32),
            (text_encoder, files.text_encoder, torch_dtype),
        ):
            weights.load_into(model, file, dtype)
        return cls(
            frozen(unet), frozen(vae), frozen(text_encoder), load_tokenizer(Path(tokenizer)), NoiseConfig(), "ddim", str(path)
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder that `from_pretrained` reads, and diffusers too; weights as they are, or cast to `dtype`.

        Raises AdapterError while a LoRA or a new word is attached: take it out, or `fuse_lora` and eject, first.
        """
        home = Path(folder)
        inject.check_plain(self.unet)
        inject.check_plain(self.text_encoder)
        textual_inversion.check_plain(self.text_encoder)
        class_name = next(name for name, sampler in SAMPLER_OF.items() if sampler == self.sampler)
        text_config = dict(sorted({**self.text_encoder.config.to_diff_dict(), "architectures": ["CLIPTextModel"]}.items()))
        for part, model, config in (
            ("unet", self.unet, self.unet.config.to_dict("UNet2DConditionModel")),
            ("vae", self.vae, self.vae.config.to_dict("AutoencoderKL")),
            ("text_encoder", self.text_encoder, text_config),
        ):
            state = to_file_keys(model.state_dict()) if part == "text_encoder" else model.state_dict()
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in state.items()}
            weights.save(tensors, home / part / f"{stem}.safetensors")
            write_json(home / part / "config.json", config)
        write_json(home / "scheduler" / "scheduler_config.json", self.noise_config.to_dict(class_name))
        save_tokenizer(self.tokenizer, home / "tokenizer")
        write_json(home / "model_index.json", MODEL_INDEX | {"scheduler": ["diffusers", class_name]})

    def to(self, device: str | torch.device) -> "StableDiffusionPipeline":
        """Move the networks."""
        parts: tuple[nn.Module, ...] = (self.unet, self.vae, self.text_encoder)
        for module in parts:
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's; adapters are fp32, and come after it."""
        return next(self.unet.parameters()).dtype

    # --- text to image -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callable[[Step], None] | None = None,
    ) -> PipelineOutput:
        """Draw one picture for each prompt (times `num_images_per_prompt`).

        `seed`: picture i is drawn from seed + i (or from seed[i]), alone or in a batch, on any device. `generator` draws
        in the order of diffusers instead; `latents` (B, 4, h, w) are unit-variance noise to start from. `output_type` is
        "pil", "pt" (B, 3, H, W) in [-1, 1], or "latent" (B, 4, h, w). `callback` sees every `Step`.
        """
        prompts = [p for p in as_list(prompt) for _ in range(num_images_per_prompt)]
        negatives = as_list(negative_prompt or "")
        negatives = (
            negatives * len(prompts) if len(negatives) == 1 else [n for n in negatives for _ in range(num_images_per_prompt)]
        )
        check_call(prompts, negatives, output_type, num_images_per_prompt)
        shape = self.latent_shape(len(prompts), height, width)
        start, step_noise = noise_source(shape, seed, generator)
        noise = start() if latents is None else check_latents(latents, shape)

        text = self.encode_prompt(prompts)
        no_text = self.encode_prompt(negatives) if guidance_scale > 1 else None
        model = guided(self.unet, text, no_text, guidance_scale)
        draw = sampler_named(sampler or self.sampler)
        steps = draw(model, noise.to(self.device), self.schedule, num_inference_steps, step_noise)
        for step in self.progress(steps, num_inference_steps):
            if callback:
                callback(step)
        if output_type == "latent":
            return PipelineOutput(step.x)
        pictures = self.decode(step.x)
        return PipelineOutput(pictures if output_type == "pt" else to_pil(pictures))

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, 77, D) in the U-Net's dtype; each distinct one is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        rows = encode_prompt(self.tokenizer, self.text_encoder, distinct, self.placeholders)
        return rows[[distinct.index(p) for p in prompts]].to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> pictures (B, 3, H, W) in [-1, 1], one at a time to spare memory."""
        z = latents.to(self.vae.post_quant_conv.weight) / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(row[None]) for row in z]).clamp(-1, 1)

    def latent_shape(self, count: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """(B, 4, h, w); SettingsError for sides the networks cannot draw."""
        factor, usual = self.vae.config.downscale, self.unet.config.sample_size
        sides = []
        for flag, side in (("height", height), ("width", width)):
            side = usual * factor if side is None else side
            if not factor <= side <= MAX_SIDE or side % factor:
                below = min(max(side // factor, 1), MAX_SIDE // factor - 1) * factor
                raise SettingsError(
                    f"{flag} is {side}; it must be a multiple of {factor} up to {MAX_SIDE}: {below} or {below + factor}."
                )
            sides.append(side // factor)
        return count, self.unet.config.in_channels, sides[0], sides[1]

    def set_progress_bar_config(self, disable: bool = False) -> None:
        self.progress_bar = not disable

    def progress(self, steps: Any, total: int) -> Any:
        """A progress bar on stderr around the sampler."""
        from tqdm import tqdm

        return tqdm(steps, total=total, unit="step", leave=False, disable=not self.progress_bar)

    # --- LoRA ----------------------------------------------------------------------------------------------------------

    @property
    def adapted(self) -> nn.ModuleDict:
        """The networks that adapters go into, as one."""
        return nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})

    def load_lora_weights(
        self, path: str | Path, adapter_name: str = "default", weight_name: str | None = None, alpha: float | None = None
    ) -> lora.LoRAFile:
        """Attach the adapter of a file or folder, and switch it on alone; what came of it, as one line, if printed.

        `alpha` is for files that do not say it.
        """
        return lora.load_lora(dict(self.adapted.items()), path, adapter_name, weight_name, alpha)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Sequence[float] | None = None) -> None:
        """Switch on these adapters, each at its weight (1 if none are given), and every other one off."""
        inject.set_adapters(self.adapted, as_list(adapter_names), adapter_weights)

    def fuse_lora(self) -> None:
        """Fold the adapters into the weights: the same pictures, a little faster."""
        inject.merge(self.adapted)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, to the bit."""
        inject.unmerge(self.adapted)

    def unload_lora_weights(self) -> None:
        """Take every adapter out; the base model is what it was, to the bit."""
        inject.eject(self.adapted)

    # --- textual inversion -------------------------------------------------------------------------------------------

    @property
    def placeholders(self) -> dict[str, list[int]]:
        """The new words that prompts may use, and the ids of their vectors."""
        return textual_inversion.placeholders(self.text_encoder)

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> embeddings.Embedding:
        """Learn the word of a file or folder, or call it `token`; what came of it, as one line, if printed."""
        return embeddings.load_embedding(self.tokenizer, self.text_encoder, path, token)

    def unload_textual_inversion(self) -> None:
        """Forget every new word; the text encoder is what it was, to the bit."""
        textual_inversion.eject(self.text_encoder)


# --- what the parts need -----------------------------------------------------------------------------------------------


def check_parts_fit(pipe: StableDiffusionPipeline) -> None:
    """The widths at which the networks meet; each alone may be sound, and yet from another model."""
    words, table = len(pipe.tokenizer), pipe.text_encoder.config.vocab_size
    if words != table:  # a smaller tokenizer would not fail: its ids mean other words, and the picture is another
        raise WeightsError(f"the tokenizer has {words} tokens and the text encoder {table}; they are from different models.")
    width, reads = pipe.text_encoder.config.hidden_size, pipe.unet.config.cross_attention_dim
    if width != reads:
        raise WeightsError(f"the text encoder is {width} wide and the U-Net reads {reads}; they are from different models.")
    channels, wanted = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != wanted:
        what = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth model"}.get(channels, "another model")
        raise WeightsError(f"the U-Net has {channels} input channels ({what}); text to image needs {wanted}.")


def frozen(model: Any) -> Any:
    """For use, not for training: nothing asks for gradients until something is added."""
    nn.Module.requires_grad_(model, False)
    return model.eval()
