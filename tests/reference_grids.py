"""The samplers with the grids of the reference, where ours differ on purpose.

DDIM and PNDM always go T // steps back there. Unless timestep_spacing is leading, a step then ends beside the timestep at
which the next one begins, and noise stays. Ours go to the next timestep (test_ddim_ends_where_the_next_step_begins).
"""

from dataclasses import replace

from minidiff.core.grids import SAMPLERS, Sampler, a_bar_at, timesteps
from minidiff.core.samplers import Grid
from minidiff.core.schedule import NoiseSchedule


def equal_jumps(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    jump = len(schedule.alphas_cumprod) // steps
    ts = timesteps(schedule, steps, spacing)[first:]
    return [(t, a_bar_at(schedule, t), a_bar_at(schedule, t - jump)) for t in ts]


def first_jump_twice(schedule: NoiseSchedule, steps: int, first: int, spacing: str, karras: bool) -> Grid:
    grid, jump = equal_jumps(schedule, steps, first, spacing, karras), len(schedule.alphas_cumprod) // steps
    return grid[:1] + [(t, a_bar_at(schedule, t + jump), a_bar) for t, a_bar, _ in grid[1:2]] + grid[1:]


def as_in_the_reference(name: str) -> Sampler:
    grids = {"ddim": equal_jumps, "pndm": first_jump_twice}
    return replace(SAMPLERS[name], grid=grids[name]) if name in grids else SAMPLERS[name]
