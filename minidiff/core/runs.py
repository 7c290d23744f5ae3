"""What all samplers share: one run of a sampler, prepared. What is left for the sampler is its update rule.

Shapes: B pictures, C H W one latent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.core.schedule import read_output

Model = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> eps or v
UNetCall = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, text) -> eps or v
StepNoise = Callable[[int], Tensor]  # i -> noise
Grid = list[tuple[float, float, float]]  # one for each step: t, the noise level there, the level that the step goes to
Visit = tuple[float, Tensor, Tensor]  # after a network call: the t it saw, x on the VP scale, x0


@dataclass(frozen=True, eq=False)
class Run:
    """Where a sampler starts, the levels it visits, and the network, read in both ways."""

    model: Model
    prediction_type: str
    x: Tensor  # (B, C, H, W) fp32: noise, or a noisy picture; VP scale for walkers, VE scale for solvers
    grid: Grid  # levels are a_bar for walkers, sigma for solvers
    step_noise: StepNoise
    eta: float = 0.0
    fix_x0: Callable[[Tensor], Tensor] | None = None

    def output(self, x: Tensor, t: float) -> Tensor:
        """The network's raw answer to VP-scale `x`, in fp32 whatever the network computes in."""
        return self.model(x, torch.full((len(x),), float(t), device=x.device)).float()

    def read(self, output: Tensor, x: Tensor, a_bar: float) -> tuple[Tensor, Tensor]:
        """An answer read as a clean latent and as noise: x0 and eps. What is known of x0 overrules the network."""
        x0, eps = read_output(output, x, a_bar, self.prediction_type)
        if self.fix_x0:
            x0 = self.fix_x0(x0)
            eps = (x - a_bar**0.5 * x0) / (1 - a_bar) ** 0.5  # DDPM eq. 4, solved for eps
        return x0, eps

    def predict(self, x: Tensor, t: float, a_bar: float) -> tuple[Tensor, Tensor]:
        """x0 and eps at VP-scale `x`: one network call."""
        return self.read(self.output(x, t), x, a_bar)

    def fresh_noise(self, i: int) -> Tensor:
        """Noise for step i, beside x."""
        return self.step_noise(i).to(self.x)


Rule = Callable[[Run], Iterator[Visit]]


def grid_of(ts: list[float], levels: list[float]) -> Grid:
    """Timesteps and one level more: each step goes to where the next one starts."""
    return list(zip(ts, levels, levels[1:], strict=False))
