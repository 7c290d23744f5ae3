"""Makes samplers.safetensors: whole trajectories of diffusers' schedulers with a fixed fake network.

    python tests/golden/make_samplers.py

The tests load this file too, for `fake_network` and `reference_trajectory`; diffusers is imported where it is used.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

SHAPE = (1, 4, 4, 4)
STEPS = 7  # not a divisor of 1000: the integer division of "leading" shows
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++_2m": "DPMSolverMultistepScheduler",
    "dpm++_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "ddpm": {"clip_sample": False},
    "ddim": {"clip_sample": False, "set_alpha_to_one": False},
    "pndm": {"skip_prk_steps": True},
    "dpm++_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}
KARRAS = ("euler", "heun", "dpm++_2m", "dpm++_2m_sde", "unipc")
SPACINGS = ("leading", "linspace", "trailing")

# sampler, eta, prediction, spacing, strength, "karras" or "zero_snr" or ""
CASES: list[tuple[str, float, str, str | None, float, str]] = [
    *((name, 0.0, prediction, None, 1.0, "") for name in CLASSES for prediction in ("epsilon", "v_prediction")),
    *((name, 0.0, "epsilon", spacing, 1.0, "") for name in CLASSES if name not in ("lcm", "tcd") for spacing in SPACINGS),
    *((name, 0.0, "epsilon", "leading", 1.0, "karras") for name in KARRAS),
    *((name, 0.0, "epsilon", None, 0.6, "") for name in CLASSES),
    *((name, 0.0, "v_prediction", "trailing", 1.0, "zero_snr") for name in CLASSES if name not in ("pndm", "heun")),
    *(("ddim", 0.6, "v_prediction", spacing, 1.0, "") for spacing in SPACINGS),
    *(("tcd", eta, "epsilon", None, strength, "") for eta in (0.3, 1.0) for strength in (1.0, 0.6)),
]


def fake_network(x: Tensor, t: Tensor) -> Tensor:
    """A fixed smooth function of x (B, 4, H, W) and t (a number or (B,)) in place of a U-Net."""
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)).to(x.dtype) / 6
    shift = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1) / 500
    return torch.tanh(conv2d(x, weight, padding=1) + torch.cos(shift))


def noises(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """The start noise, then one for each step."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(count + 1)]


def picture(shape: tuple[int, ...]) -> Tensor:
    """Clean latents for image to image."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.8


def reference_scheduler(name: str, prediction: str, spacing: str | None, special: str = "", **settings: Any) -> Any:
    """diffusers' scheduler with SD 1.5's settings; `spacing` None: its own default."""
    import diffusers

    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction,
    }
    config |= OWN_SETTINGS.get(name, {}) | settings
    if spacing:
        config["timestep_spacing"] = spacing
    if special:
        config[{"karras": "use_karras_sigmas", "zero_snr": "rescale_betas_zero_snr"}[special]] = True
    return getattr(diffusers, CLASSES[name])(**config)


def reference_trajectory(scheduler: Any, steps: int, shape: tuple[int, ...], eta: float = 0.0, strength: float = 1.0) -> Tensor:
    """Latents after each network call, (calls, B, 4, H, W), VP scale. Start and steps draw what `noises` draws.

    `strength` below 1 starts from `picture`, as diffusers' image-to-image pipeline does.
    """
    generator = torch.Generator().manual_seed(2)
    scheduler.set_timesteps(steps)
    noise, ve_scale = torch.randn(shape, generator=generator), "Discrete" in type(scheduler).__name__
    ts, first = scheduler.timesteps, 0
    if strength == 1:
        x = noise * scheduler.init_noise_sigma
    else:
        first = (steps - min(int(steps * strength), steps)) * scheduler.order
        ts = repeated_second(ts, first) if "PNDM" in type(scheduler).__name__ else ts[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(picture(shape), noise, ts[:1])
    share = {"eta": eta} if eta > 0 or "TCD" in type(scheduler).__name__ else {}  # TCD's own default is 0.3
    draws = {} if any(n in type(scheduler).__name__ for n in ("PNDM", "Heun", "UniPC")) else {"generator": generator}
    trajectory = []
    for i, t in enumerate(ts, first):
        output = fake_network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, **draws, **share).prev_sample
        trajectory.append(x / level_after(scheduler, i) if ve_scale else x)
    return torch.stack(trajectory)


def exact_trajectory(scheduler: Any, steps: int, shape: tuple[int, ...], eta: float = 0.0) -> Tensor:
    """`reference_trajectory` in float64: from the scheduler's float32 tables and the same noise, but without further rounding.

    The schedulers say float32 in many places; while they run, it means float64.
    """
    for name, table in vars(scheduler).items():
        if isinstance(table, Tensor) and table.is_floating_point():
            setattr(scheduler, name, table.double())
    module, single = sys.modules[type(scheduler).__module__], torch.float32

    def draw(*shape: Any, generator: torch.Generator | None = None, **how: Any) -> Tensor:
        return randn(*shape, generator=generator, dtype=single).double()

    randn, old = torch.randn, (torch.randn, torch.float32, np.float32, getattr(module, "randn_tensor", None))
    try:
        torch.randn, torch.float32, np.float32, module.randn_tensor = draw, torch.float64, np.float64, draw
        return reference_trajectory(scheduler, steps, shape, eta)
    finally:
        torch.randn, torch.float32, np.float32, module.randn_tensor = old


def repeated_second(timesteps: Tensor, first: int) -> Tensor:
    """PNDM's timesteps from the first one walked: the second of them twice, as from pure noise.

    The image-to-image pipeline cuts the doubled list t0, t1, t1, t2 ... at `first`. From there on the network is asked
    at a t one step away from the level that the sample is at.
    """
    once = torch.cat([timesteps[:1], timesteps[2:]])[first:]
    return torch.cat([once[:2], once[1:2], once[2:]])


def level_after(scheduler: Any, i: int) -> Tensor:
    """The factor between VE and VP scale after call i."""
    return (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5


def main() -> None:
    import diffusers
    from safetensors.torch import save_file

    golden = {}
    for name, eta, prediction, spacing, strength, special in CASES:
        scheduler = reference_scheduler(name, prediction, spacing, special)
        key = f"{name}/{eta}/{prediction}/{spacing}/{strength}/{special}"
        golden[key] = reference_trajectory(scheduler, STEPS, SHAPE, eta, strength)
    golden["noises"] = torch.stack(noises(SHAPE, STEPS))
    golden["picture"] = picture(SHAPE)
    path = Path(__file__).with_name("samplers.safetensors")
    save_file(golden, path, {"diffusers": diffusers.__version__, "torch": torch.__version__})
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
