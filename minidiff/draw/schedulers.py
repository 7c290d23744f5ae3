"""diffusers' schedulers, by their names: each is one of minidiff's samplers and a noise schedule.

    DDIMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, t)

Shapes: B pictures, C h w a latent.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import SettingsError
from minidiff.core.schedule import NoiseSchedule, add_noise
from minidiff.files import folder as model_folder
from minidiff.files.values import check_names

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
        home = model_folder.found(folder, changes)
        return cls.from_config(model_folder.config_of(home, "scheduler_config.json")[0], **changes)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (B, C, h, w) for clean latents, noise, and timesteps (B,)."""
        return add_noise(self.schedule, original_samples, noise, timesteps)

    def __getattr__(self, name: str) -> Any:
        loop = "minidiff's samplers are iterators of steps: for step in SAMPLERS[name](…), see core/grids.py."
        raise AttributeError(f"{type(self).__name__} has no {name}; {loop}")


SCHEDULERS: dict[str, type[Scheduler]] = {name: type(name, (Scheduler,), {}) for name in model_folder.SAMPLER_OF}
globals().update(SCHEDULERS)


def scheduler_of(pipe: Any) -> Scheduler:
    """`pipe.scheduler`: the sampler and the noise schedule of a call that names no sampler."""
    values = model_folder.scheduler_values(pipe.noise_config, pipe.sampler)
    return SCHEDULERS[values["_class_name"]].from_config(values)


def set_scheduler(pipe: Any, new: Any) -> None:
    """`pipe.scheduler = new`. SettingsError if it is none of minidiff's."""
    if not isinstance(new, Scheduler):
        raise SettingsError(f"scheduler is a {type(new).__name__}; take one of minidiff's: {', '.join(SCHEDULERS)}.")
    pipe.sampler, pipe.noise_config, pipe.schedule = new.sampler, new.noise_config, new.schedule
