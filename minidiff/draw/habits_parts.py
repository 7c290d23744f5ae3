"""The habits of the field around the parts of a pipeline: diffusers' schedulers, U-Net and VAE, and peft's adapters.

    DDIMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, t)
    unet(noisy, t, encoder_hidden_states=text).sample        vae.encode(x).latent_dist.sample()
    unet = get_peft_model(unet, LoraConfig(r=4)); unet.print_trainable_parameters(); unet.save_pretrained("my-lora")

`adopt` gives a network a subclass of its own class, as fast.install does. The field's keywords give the field's output;
positional calls give the plain tensors of `core`. Shapes: B pictures, C h w a latent, H W a picture.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from minidiff.core import inject, unet, vae
from minidiff.core.config import NoiseConfig
from minidiff.core.errors import AdapterError, SettingsError, WeightsError, did_you_mean
from minidiff.core.lora import LoRAWeights
from minidiff.core.rng import normal
from minidiff.core.schedule import NoiseSchedule, add_noise
from minidiff.draw.speed import checkpoint_gradients, speed_up_network
from minidiff.files import folder as model_folder
from minidiff.files.lora_file import save_lora
from minidiff.files.weights import save

CALLED = {  # a name of other programs -> minidiff's
    "init_image": "image", "mask": "mask_image", "cfg_scale": "guidance_scale", "steps": "num_inference_steps",
    "sampler_name": "sampler", "timesteps": "timestep_spacing", "sigmas": "use_karras_sigmas", "dtype": "torch_dtype",
    "device_map": "pipe.to(device)", "lora_scale": 'cross_attention_kwargs={"scale": 0.8}',
}  # fmt: skip
NO_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # parts that minidiff does not have
HARMLESS = (  # keywords that change nothing: safetensors are read, from the disk, without a network
    "use_safetensors", "local_files_only", "low_cpu_mem_usage", "force_download", "token", "use_auth_token", "variant",
    "requires_safety_checker", *NO_PARTS,
)  # fmt: skip


def check_names(where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """SettingsError for a name that is not known, with minidiff's name for it. A value of None asks for nothing."""
    if wrong := next((name for name, value in given.items() if value is not None and name not in known), None):
        called = f" minidiff calls it {CALLED[wrong]}." if wrong in CALLED else did_you_mean(wrong, known)
        raise SettingsError(f"{where} has no {wrong}.{called}")


def found(path: Any, given: dict[str, Any]) -> Path:
    """The path itself, or the local copy of a hub id (owner/name). Takes the keywords that say where it is out of `given`."""
    path = getattr(path, "path", path)  # of an adapter that was read or trained
    where = {name: given.pop(name, None) for name in ("cache_dir", "revision")}
    for name in HARMLESS:
        given.pop(name, None)
    if not Path(path).exists() and str(path).count("/") == 1:
        try:
            path = model_folder.local_folder(str(path), **where)
        except WeightsError:
            pass  # whoever reads the path says that it is not there
    return Path(path, given.pop("subfolder", ""))


# --- schedulers ----------------------------------------------------------------------------------------------------------

BARE = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")  # a class's own defaults, which are not SD's; but:
OWN: dict[str, Any] = {"HeunDiscreteScheduler": dict(beta_schedule="linear"), "LCMScheduler": {}, "TCDScheduler": {}}


class Config(dict[str, Any]):
    """Settings by name, which are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self else self.__getattribute__(name)


class Scheduler:
    """A sampler of minidiff's and its noise schedule, under the name that diffusers has for it."""

    SETTINGS = (*(f.name for f in fields(NoiseConfig)), *model_folder.ONLY[NoiseConfig], *model_folder.DRAWN_AS)

    def __init__(self, **settings: Any) -> None:
        where = type(self).__name__
        check_names(where, settings, self.SETTINGS)
        ends = {"steps_offset": 0, "set_alpha_to_one": where in ("DDIMScheduler", "LCMScheduler", "TCDScheduler")}
        given = {**ends, **OWN.get(where, BARE), **settings, "_class_name": where}
        self.config = Config({name: value for name, value in given.items() if value is not None})
        self.sampler = model_folder.sampler_of(self.config, where)
        self.noise_config = model_folder.read_config(NoiseConfig, self.config, where)
        self.schedule = NoiseSchedule.from_config(self.noise_config)
        self.alphas_cumprod = self.schedule.alphas_cumprod

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """The scheduler with the settings of another one, where they apply, and `changes`."""
        return cls(**{name: value for name, value in config.items() if name in cls.SETTINGS} | changes)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> Self:
        """The scheduler with the settings in a model's folder, of which `subfolder` says "scheduler"."""
        home = found(folder, changes)
        return cls.from_config(model_folder.config_of(home, "scheduler_config.json")[0], **changes)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (B, C, h, w) for clean latents, noise, and timesteps (B,)."""
        return add_noise(self.schedule, original_samples, noise, timesteps)

    def __getattr__(self, name: str) -> Any:
        loop = "minidiff's samplers are iterators of steps: for step in SAMPLERS[name](…), see core/grids.py."
        raise AttributeError(f"{type(self).__name__} has no {name}; {loop}")


SCHEDULERS: dict[str, type[Scheduler]] = {name: type(name, (Scheduler,), {}) for name in model_folder.SAMPLER_OF}
globals().update(SCHEDULERS)

# --- networks ------------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """The field's output of a network; a tuple, too."""

    sample: Tensor


class Posterior(NamedTuple):
    """Mean and log-variance (B, C, h, w), as in `core`; and the field's distribution of latents, which is the same object."""

    mean: Tensor
    logvar: Tensor

    @property
    def latent_dist(self) -> "Posterior":
        return self

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device if generator else self.mean.device)
        return vae.sample_posterior(self.mean, self.logvar, noise.to(self.mean))

    def mode(self) -> Tensor:
        return self.mean


def print_trainable_parameters(model: nn.Module) -> None:
    """One line, in peft's form: trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927"""
    some = sum(parameter.numel() for parameter in inject.trainable(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    print(f"trainable params: {some:,} || all params: {every:,} || trainable%: {100 * some / every:.4f}")


class WithHabits(nn.Module):
    """Says so in `print(model)`."""

    def _get_name(self) -> str:
        return f"{type(self).__name__} with habits"


class UNet2DConditionModel(WithHabits, unet.UNet2DConditionModel):
    """core/unet.py's, which can be called in the field's way, too."""

    plainly = nn.Module.__call__  # for the pipeline: by position only
    print_trainable_parameters = print_trainable_parameters
    enable_gradient_checkpointing = checkpoint_gradients

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if named.keys() <= {"latents", "t", "text", "vector", "control"}:
            return super().__call__(*inputs, **named)
        names = ("sample", "timestep", "encoder_hidden_states")
        named = dict(zip(names, inputs)) | named
        check_names("the U-Net's call", named, (*names, "return_dict"))
        return Output(super().__call__(*(named[name] for name in names)))

    def add_adapter(self, adapter_config: "LoraConfig", adapter_name: str = "default") -> None:
        """A new adapter, which alone can be trained. AdapterError for settings that minidiff does not have."""
        c = adapter_config
        if c.bias != "none" or c.init_lora_weights not in (True, "gaussian"):
            raise AdapterError('LoraConfig: bias must be "none", and init_lora_weights True or "gaussian".')
        shape: Any = dict(rank_of=c.rank_pattern, rslora=c.use_rslora, dora=c.use_dora, dropout=c.lora_dropout)
        targets = c.target_modules or inject.DEFAULT_TARGETS
        layers = inject.inject(self, c.r, c.lora_alpha, targets, adapter_name=adapter_name, **shape)
        if c.init_lora_weights == "gaussian":  # as in peft: a standard deviation of 1 / r
            for name, layer in layers.items():
                A = layer.lora_A[adapter_name].data
                A.copy_(normal(A.shape, 0, "lora_A", name) / len(A))
        if type(self.conv_in) is not nn.Conv2d:  # the other layers are fast, too
            speed_up_network(self)

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """The U-Net as a folder; of one with an adapter the adapter, as a folder of peft. Always safetensors."""
        if adapters := inject.adapter_names(self):
            save_lora({f"unet.{name}": own for name, own in inject.adapter_weights(self, adapters[0]).items()}, folder, "peft")
        else:
            save(self.state_dict(), Path(folder, "diffusion_pytorch_model.safetensors"))
            values = model_folder.config_values(self.config, "UNet2DConditionModel")
            model_folder.write_json(Path(folder, "config.json"), values)


class AutoencoderKL(WithHabits, vae.AutoencoderKL):
    """core/vae.py's, which can be called in the field's way, too."""

    plainly = vae.AutoencoderKL.decode

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """(B, 3, H, W) -> mean and log-variance, which have `latent_dist`."""
        posterior = Posterior(*super().encode(x))
        return posterior if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool | None = None) -> Any:
        """(B, C, h, w) -> (B, 3, H, W); in an `Output` if `return_dict` is given."""
        pictures = super().decode(z)
        return pictures if return_dict is None else Output(pictures)


CLASSES: dict[type, type] = {unet.UNet2DConditionModel: UNet2DConditionModel, vae.AutoencoderKL: AutoencoderKL}


def adopt(network: nn.Module) -> None:
    """Give a U-Net or VAE the habits. Another network, or a compiled one, stays as it is."""
    network.__class__ = CLASSES.get(type(network), type(network))


# --- peft ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraConfig:
    """peft's settings of an adapter. `target_modules` as in core/inject.py; default: every attention projection."""

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    bias: str = "none"


def get_peft_model(model: Any, peft_config: LoraConfig, adapter_name: str = "default") -> Any:
    """The same U-Net with a new adapter."""
    model.add_adapter(peft_config, adapter_name)
    return model


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, LoRAWeights]:
    """An adapter by layer, for pipe.save_lora_weights; unlike peft's tensors, it says how strong it is."""
    return inject.adapter_weights(model, adapter_name)
