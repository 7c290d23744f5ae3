"""Makes samplers.safetensors: whole trajectories of diffusers' schedulers with a fixed fake network.

    python tests/golden/make_samplers.py

The tests load this file too, for `fake_network` and `reference_trajectory`; diffusers is imported where it is used.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

SHAPE = (1, 4, 4, 4)
STEPS = 7  # not a divisor of 1000: the integer division of "leading" shows
CASES = [
    (name, eta, prediction, spacing)
    for name, eta in (("ddim", 0.0), ("ddim", 0.6), ("euler_a", 0.0), ("dpm++_2m", 0.0))
    for prediction in ("epsilon", "v_prediction")
    for spacing in ("leading", "linspace", "trailing")
]


def fake_network(x: Tensor, t: Tensor) -> Tensor:
    """A fixed smooth function of x (B, 4, H, W) and t (a number or (B,)) in place of a U-Net."""
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6
    shift = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 500
    return torch.tanh(conv2d(x, weight, padding=1) + torch.cos(shift))


def noises(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """The start noise, then one for each step."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(count + 1)]


def reference_scheduler(name: str, prediction: str, spacing: str | None, set_alpha_to_one: bool = False) -> Any:
    """diffusers' scheduler with SD 1.5's settings; `spacing` None: its own default."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction,
    }
    if spacing:
        config["timestep_spacing"] = spacing
    if name == "ddim":
        return DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=set_alpha_to_one)
    return {"euler_a": EulerAncestralDiscreteScheduler, "dpm++_2m": DPMSolverMultistepScheduler}[name](**config)


def reference_trajectory(scheduler: Any, steps: int, shape: tuple[int, ...], eta: float) -> Tensor:
    """Latents after each step, (steps, B, 4, H, W), VP scale. Start and steps draw what `noises` draws."""
    generator = torch.Generator().manual_seed(2)
    scheduler.set_timesteps(steps)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    only_ddim = {"eta": eta} if eta > 0 else {}
    trajectory = []
    for i, t in enumerate(scheduler.timesteps):
        output = fake_network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=generator, **only_ddim).prev_sample
        ve_scale = "Euler" in type(scheduler).__name__
        trajectory.append(x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5 if ve_scale else x)
    return torch.stack(trajectory)


def main() -> None:
    import diffusers
    from safetensors.torch import save_file

    golden = {}
    for name, eta, prediction, spacing in CASES:
        scheduler = reference_scheduler(name, prediction, spacing)
        key = f"{name}/{eta}/{prediction}/{spacing}"
        golden[key] = reference_trajectory(scheduler, STEPS, SHAPE, eta)
    golden["noises"] = torch.stack(noises(SHAPE, STEPS))
    path = Path(__file__).with_name("samplers.safetensors")
    save_file(golden, path, {"diffusers": diffusers.__version__, "torch": torch.__version__})
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
