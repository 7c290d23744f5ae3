# %% [markdown]
# # Lesson 5: samplers
#
# A network was trained to see noise. A *sampler* decides how to use it: where to look, how far to go after each
# look, and whether to throw in fresh noise. The network stays the same; eleven samplers make eleven journeys.
#
# ```
#   pure noise                                                             picture
#   sigma = 14.6  o------------o---------o------o----o---o--o-o-oo  sigma = 0
#                 |            |         |      |    each o is one call of the network
#                 ask: which noise is in here? -> eps. Then go on, as the sampler says
# ```
#
# In this lesson you see that sampling is solving a differential equation, solve it by hand with Euler and Heun,
# measure how fast nine samplers converge (the others, `lcm` and `tcd`, are for models that were distilled to them),
# and then look at what they draw.
#
# Time: under a minute on one core. Needs: lesson 0, and knowing what a derivative is.

# %% tags=["setup"]
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from minidiff import StableDiffusionPipeline
from minidiff.core.config import NoiseConfig
from minidiff.core.grids import SAMPLERS, karras_sigmas, sigmas_at, timesteps, timesteps_at
from minidiff.core.rng import normal
from minidiff.core.schedule import NoiseSchedule
from minidiff.draw.images import HAIRLINE, INK, PAPER, contact_sheet, to_pil

LESSONS = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()  # a notebook has no __file__
ROOT = LESSONS.parent
CHECKPOINT = ROOT / "checkpoints" / "pocket"
FIGURES = Path("outputs") / "lessons" / "05_samplers"
BLUE, PALE, RUST = "#1d4f8f", "#8fb0d6", "#b3541e"


def show(picture, name):
    """Save a picture or a matplotlib figure, say where it is, and hand it to the notebook, if there is one."""
    path = FIGURES / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, Figure):
        for axes in picture.axes:
            axes.set_facecolor(PAPER)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=HAIRLINE, linewidth=0.8)
            axes.set_axisbelow(True)
        picture.savefig(path, dpi=150, facecolor=PAPER, bbox_inches="tight", pad_inches=0.2)
    else:
        picture.save(path)
    print(f"[figure] {path}")
    return Image.open(path)


# %% [markdown]
# ## One equation
#
# **What does a sampler compute?** Divide a noisy latent by √ā, and it is a clean latent plus noise, x = x_0 + σ ε.
# The network looks at x and answers ε. If σ becomes a little smaller, by dσ, then x changes by
#
# dx = ε dσ                                                              (DDIM, arXiv 2010.02502, eq. 14)
#
# An ordinary differential equation, whose right-hand side is the network. We start at σ = 14.6, where x is noise,
# and have to arrive at σ = 0. The oldest method is Euler's: pretend that ε stays as it is over a whole step.
#
# To see whether it works we need a problem whose answer we know. So our "pictures" are single numbers, near -1 or
# near +1, equally often. For such data the best possible network can be written down: the mean of ε over all
# pictures that could be behind x.

# %%
PEAK, WIDTH = 1.0, 0.15  # data ~ half N(-1, 0.15^2), half N(+1, 0.15^2)
schedule = NoiseSchedule.from_config(NoiseConfig())  # SD 1.5's noise: sigma from 0.029 to 14.6


def perfect_network(x, t):
    """The best guess of eps, for x (B, 1, 1, 1) whose variance is about 1 and t (B,)."""
    sigma = sigmas_at(schedule, [t[0].item()])[0]
    y = x * (sigma**2 + 1) ** 0.5  # x0 + sigma eps
    peaks = torch.tensor([-PEAK, PEAK])
    chance = torch.softmax(-((y - peaks) ** 2) / (2 * (WIDTH**2 + sigma**2)), dim=-1)  # of each peak, seen from y
    x0 = (chance * (peaks + WIDTH**2 / (WIDTH**2 + sigma**2) * (y - peaks))).sum(-1, keepdim=True)
    return (y - x0) / sigma


def naive_euler(noise, steps):
    ts = timesteps(schedule, steps, "linspace", whole=False)
    sigmas = sigmas_at(schedule, ts)  # one more than ts: the last is 0
    x = sigmas[0] * noise
    for t, sigma, sigma_next in zip(ts, sigmas, sigmas[1:]):
        eps = perfect_network(x / (sigma**2 + 1) ** 0.5, torch.full((len(x),), t))
        x = x + (sigma_next - sigma) * eps  # DDIM eq. 13: Euler's step on eq. 14
    return x


def no_noise(i):
    raise AssertionError("Euler needs no fresh noise")


noise = normal((1000, 1, 1, 1), 0, "numbers")
*_, last = SAMPLERS["euler"](perfect_network, noise, schedule, 50, no_noise)
torch.testing.assert_close(naive_euler(noise, 50), last.x, atol=1e-4, rtol=1e-4)

near = ((last.x.abs() - PEAK).abs() < 3 * WIDTH).float().mean()
print(f"Euler, 50 steps, by hand and by the library: the same. {near:.0%} of 1000 numbers ended at a peak")
assert near > 0.97

# %% [markdown]
# **Experiment: two kinds of journey.** `euler` follows the equation. `euler_a` ("ancestral") goes to *less* noise
# than it should at every step, and then adds fresh noise up to the right level (arXiv 2011.13456, appendix F). We
# watch the same thirty starts.


# %%
def paths(name, steps=40, count=30):
    fresh = [normal((count, 1, 1, 1), 0, "fresh", i) for i in range(steps)]
    walk = SAMPLERS[name](perfect_network, noise[:count], schedule, steps, lambda i: fresh[i])
    return torch.stack([noise[:count], *(step.x for step in walk)]).flatten(1)  # (steps + 1, count)


figure = Figure(figsize=(10, 3.8))
both = figure.subplots(1, 2, sharey=True)
for axes, name, said in zip(both, ("euler", "euler_a"), ("the equation alone", "fresh noise at every step")):
    journeys = paths(name)
    for journey in journeys.T:
        axes.plot(journey, color=BLUE if journey[0] > 0 else RUST, linewidth=0.9, alpha=0.75)
    axes.set_title(f"{name}: {said}", loc="left")
    axes.set_xlabel("step")
    axes.set_yticks([-2, -1, 0, 1, 2])
both[0].set_ylabel("x, variance kept near 1")
show(figure, "1_two_kinds_of_journey")

straight, jagged = paths("euler"), paths("euler_a")
assert (straight[-1].sign() == straight[0].sign()).all()  # the equation never crosses: the start decides
changed = (jagged[-1].sign() != jagged[0].sign()).float().mean()
print(f"euler: every path ends on the side it began. euler_a: {changed:.0%} change sides on the way")

# %% [markdown]
# Colour is the side on which a path began. With the equation alone the start decides everything, and more steps
# give the *same* picture, only more exactly. With fresh noise, another number of steps is another picture. That is
# why `euler_a` never "settles", and why people who compare settings with it compare chance.
#
# ## Where to look
#
# **At which noise levels should the network be asked?** There are 1000 timesteps, and we can afford perhaps
# eight. The file that comes with a model names one of three *spacings* (arXiv 2305.08891, table 2). A fourth rule
# chooses the σ themselves, equally spaced in σ^(1/7) (EDM, arXiv 2206.00364, eq. 5): *Karras sigmas*.
#
# **Naive code**: eq. 5, and the library's.


# %%
def naive_karras(steps, rho=7):
    high, low = schedule.sigmas[-1] ** (1 / rho), schedule.sigmas[0] ** (1 / rho)
    return [((high + i / (steps - 1) * (low - high)) ** rho).item() for i in range(steps)]


LOOKS = 8
karras = karras_sigmas(schedule.sigmas[-1].item(), schedule.sigmas[0].item(), LOOKS)
np.testing.assert_allclose(naive_karras(LOOKS), karras, rtol=1e-4)

looks = {spacing: timesteps(schedule, LOOKS, spacing) for spacing in ("leading", "linspace", "trailing")}
looks["Karras"] = timesteps_at(schedule, karras)
print("\n8 looks     at t =")
for name, ts in looks.items():
    print(f"  {name:9}", " ".join(f"{t:4.0f}" for t in ts))

figure = Figure(figsize=(10, 2.9))
axes = figure.subplots()
for row, (name, ts) in enumerate(looks.items()):
    axes.plot(sigmas_at(schedule, ts)[:-1], [row] * LOOKS, "o", markersize=8, color=RUST if name == "Karras" else BLUE)
axes.set_xscale("log")
axes.set_xlim(22, 0.02)
axes.set_xticks([10, 1, 0.1, 0.03], ["10", "1", "0.1", "0.03"])
axes.minorticks_off()
axes.set_yticks(range(4), list(looks))
axes.set_ylim(3.5, -0.5)
axes.set_xlabel("σ, noise over signal: from noise on the left to the picture on the right")
axes.set_title("Where eight calls of the network go", loc="left")
show(figure, "2_where_to_look")

# %% [markdown]
# The three spacings spend their calls where there is much noise. Karras keeps three of the eight for σ below 0.5,
# where edges are drawn; the others one or two. `leading` never sees the highest level at all, although x starts as
# pure noise. The other three do.
#
# ## Better than Euler
#
# **Can we get more out of a call?** Euler believes the direction at the start of a step. Heun takes the step, asks
# again at its end, and goes back to take it with the mean of both directions (EDM, algorithm 1). Two calls a step,
# and worth it: with half the step, Euler's error halves, and Heun's falls to a quarter.


# %%
def naive_heun(noise, steps):
    ts = timesteps(schedule, steps, "linspace", whole=False)
    sigmas = sigmas_at(schedule, ts)

    def direction(x, i):
        return perfect_network(x / (sigmas[i] ** 2 + 1) ** 0.5, torch.full((len(x),), ts[i]))

    x = sigmas[0] * noise
    for i in range(steps):
        jump, start = sigmas[i + 1] - sigmas[i], direction(x, i)
        if i + 1 < steps:  # at sigma = 0 there is no direction to ask for
            start = (start + direction(x + jump * start, i + 1)) / 2  # EDM algorithm 1, line 8
        x = x + jump * start
    return x


*_, last = SAMPLERS["heun"](perfect_network, noise, schedule, 20, no_noise)
torch.testing.assert_close(naive_heun(noise, 20), last.x, atol=1e-3, rtol=1e-3)

# %% [markdown]
# Others get second order from *one* call a step, by remembering. `dpm++_2m` draws a line through the last two x_0
# (arXiv 2211.01095, algorithm 2). `unipc` does the same, and when the next answer is in, corrects the step it has
# just made, for nothing; the correction gives it one order more, the third (arXiv 2302.04867, theorem 3.1). `pndm`
# mixes the last four answers (arXiv 2202.09778, eq. 12).
#
# **Experiment: the order, measured.** One Gaussian peak instead of two: then the exact solution of the equation is
# known, and so is each sampler's error half-way down, at t = 499. For those with fresh noise it is the error of the
# variance. On double-logarithmic paper, order p is a line of slope -p.

# %%
MEAN, SPREAD = 0.7, 0.5  # one peak now


def level(t):
    return 1 / (1 + sigmas_at(schedule, [t])[0] ** 2)  # a_bar


def gaussian_network(x, t):
    a_bar = level(t[0].item())
    x0 = MEAN + a_bar**0.5 * SPREAD**2 / (a_bar * SPREAD**2 + 1 - a_bar) * (x - a_bar**0.5 * MEAN)
    return (x - a_bar**0.5 * x0) / (1 - a_bar) ** 0.5


def half_way(name, steps, start, fresh):
    """x at t = 499, and the calls it took. A black image under all the noise: everyone starts at the same point."""
    walk = SAMPLERS[name](gaussian_network, start, schedule, steps, fresh, image=0 * start, spacing="trailing")
    walk = list(walk)
    calls = next(i for i, step in enumerate(walk) if step.t == 499) + (name == "heun")
    return walk[calls - 1].x, calls


def error_of(name, steps):
    first, now = level(999), level(499)
    spread_now = (now * SPREAD**2 + 1 - now) ** 0.5
    if name in STOCHASTIC:
        # x is linear in the noises, so no sampling is needed. Row k of the batch gets a 1 for the k-th noise and 0 for
        # all others: x then is that noise's coefficient, and the variance is the sum of their squares. The last row
        # gets no noise: it is the mean, and is subtracted.
        unit = torch.eye(steps + 2).view(steps + 2, steps + 2, 1, 1, 1)
        x, calls = half_way(name, steps, unit[0], lambda i: unit[i + 1])
        coefficients = x.flatten().double() - x.flatten().double()[-1]
        return abs(coefficients.square().sum().item() - spread_now**2), calls
    start = noise[:100]
    x, calls = half_way(name, steps, start, no_noise)
    deviations = ((1 - first) ** 0.5 * start - first**0.5 * MEAN) / (first * SPREAD**2 + 1 - first) ** 0.5
    return (x - now**0.5 * MEAN - spread_now * deviations).abs().max().item(), calls


STOCHASTIC = ("ddpm", "euler_a", "dpm++_2m_sde")
measured = {}
print("\nerror at t = 499   (calls: error)                                          order")
for name in ("ddpm", "ddim", "euler", "euler_a", "pndm", "heun", "dpm++_2m", "dpm++_2m_sde", "unipc"):
    errors, calls = zip(*(error_of(name, steps) for steps in (10, 20, 40)))
    order = -np.polyfit(np.log([10, 20, 40]), np.log(errors), 1)[0]
    measured[name] = (calls, errors, order)
    print(f"  {name:13}", "   ".join(f"{c:3}: {e:.1e}" for c, e in zip(calls, errors)), f"{order:28.1f}")

assert all(abs(measured[name][2] - 1) < 0.1 for name in ("ddpm", "ddim", "euler", "euler_a"))
assert all(abs(measured[name][2] - 2) < 0.25 for name in ("heun", "dpm++_2m", "dpm++_2m_sde"))
assert measured["unipc"][2] > 2.7

figure = Figure(figsize=(10, 5.2))
axes = figure.subplots()
LABELS = {
    "euler_a": "euler_a, ddpm",
    "euler": "euler, ddim",
    "dpm++_2m_sde": "",
    "dpm++_2m": "",
    "unipc": "",
    "heun": "",
    "pndm": "",
}
for name, label in LABELS.items():
    calls, errors, order = measured[name]
    colour = INK if name == "unipc" else PALE if name == "pndm" else BLUE if order > 1.5 else RUST
    axes.loglog(calls, errors, "o--" if name in STOCHASTIC else "o-", color=colour, linewidth=1.8, markersize=6)
    said = f"{label or name}: " + ("no clear slope" if name == "pndm" else f"slope {order:.1f}")
    right = name in ("heun", "pndm")
    end = (calls[-1], errors[-1]) if right else (calls[0], errors[0])
    place = {"xytext": (10 if right else -10, 0), "textcoords": "offset points", "ha": "left" if right else "right"}
    axes.annotate(said, end, color=INK, va="center", **place)
axes.set_xlim(1.7, 75)
axes.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
axes.minorticks_off()
axes.set_xlabel("network calls")
axes.set_ylabel("error")
axes.set_title("Error against network calls, on a problem with a known answer; dashed: with fresh noise", loc="left")
show(figure, "3_orders")

# %% [markdown]
# `ddim` and `euler` are one and the same method in two notations, and so are `ddpm` and `euler_a`. PNDM starts
# with other formulas than it goes on with, so its error does not fall along one line.
#
# A warning about the order: it says what happens in the limit of many calls, for a smooth right-hand side. A real
# network with guidance is not that smooth. So we look.
#
# ## The same prompt, eleven samplers
#
# **Which one should I take?** One prompt, one seed, and a budget of 4, 8, 16 or 32 network calls. (Heun makes two
# calls a step and one at the end, PNDM one more than there are steps; they get as many steps as the budget allows.)

# %%
PROMPT, SEED, SCALE, BUDGETS = "a photo of a pink car in a meadow", 0, 5.0, (4, 8, 16, 32)

pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT)
pipe.set_progress_bar_config(disable=True)


def steps_for(name, budget):
    return {"heun": budget // 2, "pndm": budget - 1}.get(name, budget)


def drawn(name, steps, **settings):
    call = {"seed": SEED, "num_inference_steps": steps, "guidance_scale": SCALE, "output_type": "latent"} | settings
    return pipe(PROMPT, sampler=name, **call).images


rows = []
for name in SAMPLERS:
    latents = torch.cat([drawn(name, steps_for(name, budget)) for budget in BUDGETS])
    rows.append(to_pil(pipe.decode(latents)))
columns = [f"{budget} calls" for budget in BUDGETS]
show(contact_sheet(rows, list(SAMPLERS), columns, f"{PROMPT}, seed {SEED}", tile=192), "4_all_samplers")

# %% [markdown]
# Read along the rows. From 8 calls on, `ddim`, `euler`, `dpm++_2m` and `unipc` show one and the same car, and more
# calls only make it cleaner: they are on the same road. Those with fresh noise (`ddpm`, `euler_a`, `dpm++_2m_sde`)
# draw other clouds from column to column. The car stays nearly the same: the model knows few pink cars.
#
# At 4 calls `ddim` and `euler` draw different cars, though they are one method. They differ only in where they look:
# `ddim` takes `leading` spacing by default, `euler` `linspace`. Give both `trailing`, and they agree.
#
# **What breaks if** a method of high order gets too few calls? See `pndm` and `heun`. Both trust that the network's
# answer changes smoothly. Over long steps, with guidance at 5, it does not: an extrapolation from four answers
# overshoots, and the colours burn out. `dpm++_2m` extrapolates only x_0, only from two, and holds. PNDM is the
# sampler that SD 1.5's own files name. Take another one, or at least 40 steps.
#
# And `lcm`? It jumps all the way to x_0 at every step, and adds fresh noise. A network that was *distilled* knows
# where the jump ends (arXiv 2310.04378), and is done after four. This one was not: at 4 calls it overdoes the
# colours, and later it is just one more sampler with fresh noise. `tcd` (arXiv 2402.19159) jumps only as far as the next
# noise level, or with `eta` a little further, and comes back up with fresh noise. Without `eta` it is DDIM's step.
#
# **Experiment: how far from the end of the road?** For those that solve the equation there is a true answer, also
# for the real network: the latent after very many calls. Here is how far they are from it.

# %%
CALLS = (4, 8, 16, 32, 64)
truth = drawn("unipc", 100, timestep_spacing="trailing")
figure = Figure(figsize=(10, 4.2))
axes = figure.subplots()
print("\ndistance from the exact latent, in parts of its spread")
for name, colour, shift in (("euler", RUST, 1.0), ("heun", PALE, 1.0), ("dpm++_2m", BLUE, 1.15), ("unipc", INK, 0.87)):
    ends = [drawn(name, steps_for(name, calls), timestep_spacing="trailing") for calls in CALLS]
    distances = [((end - truth).square().mean().sqrt() / truth.std()).item() for end in ends]
    print(f"  {name:9}", "   ".join(f"{c:2} calls: {d:.3f}" for c, d in zip(CALLS, distances)))
    axes.loglog(CALLS, distances, "o-", color=colour, linewidth=1.8)
    axes.annotate(f"  {name}", (CALLS[-1], distances[-1] * shift), color=INK, va="center", annotation_clip=False)
axes.set_xlim(3.6, 95)
axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
axes.minorticks_off()
axes.set_xlabel("network calls")
axes.set_ylabel("distance / spread of the latents")
axes.set_title(f"The pocket model, {PROMPT}: how far from the exact solution", loc="left")
show(figure, "5_distance")

# %% [markdown]
# On the paper above, `unipc` had the better slope. Here, at 16 calls, it is behind even `euler`, and level with
# `dpm++_2m` only from 25. The order promises something about many calls; most people make few.
#
# **Experiment: other looks.** `dpm++_2m` with 6 and with 12 steps, the same noise, and only the places changed.
# In the last column is the true answer from above.

# %%
SETTINGS = {"leading": {}, "linspace": {}, "trailing": {}, "Karras": {"use_karras_sigmas": True}}
rows = []
for steps in (6, 12):
    row = [
        drawn("dpm++_2m", steps, timestep_spacing="linspace" if name == "Karras" else name, **more)
        for name, more in SETTINGS.items()
    ]
    rows.append(to_pil(pipe.decode(torch.cat([*row, truth]))))
    off = [((end - truth).square().mean().sqrt() / truth.std()).item() for end in row]
    print(f"  {steps:2} steps  ", "   ".join(f"{name}: {d:.2f}" for name, d in zip(SETTINGS, off)))
show(
    contact_sheet(rows, ["6 steps", "12 steps"], [*SETTINGS, "unipc, 100 steps"], f"dpm++_2m: {PROMPT}", tile=180),
    "6_places",
)

# %% [markdown]
# `linspace` and `trailing` give the same picture: `dpm++_2m` leaves out the last point of `linspace`, and what remains
# are the points of `trailing`, to within one. `leading` comes nearest to the last column, with 6 steps and with 12.
#
# Six Karras looks are too few for this model: the last two lie below σ = 0.2, where little is left to decide, and
# the long steps before them are taken blindly. With twelve there is nothing wrong with them.
#
# **So which one?** For few calls and a steady hand: `dpm++_2m`, 15 to 25 steps, or `unipc` from 20. To explore:
# `euler_a`. With an LCM adapter: `lcm`, 4 to 8 steps; with a TCD one: `tcd`. With a model whose last timestep is pure
# noise (zero terminal SNR): `trailing` spacing. Everything else is taste, and now you know what you are tasting.
#
# ## Exercises
#
# **1. Heun.** Write `my_heun(direction, x, sigma, sigma_next)`: one step of Heun's method, where
# `direction(x, sigma)` is ε. To σ = 0 it has to be Euler's step.


# %% tags=["check"]
def check_1(my_heun):
    def direction(x, sigma):
        assert sigma > 0, "at sigma = 0 there is no noise, and no direction to ask for"
        return torch.tanh(x) / (1 + sigma)

    x = normal((4, 3), 0, "exercise")
    for sigma, sigma_next in ((14.6, 7.0), (2.0, 1.5), (0.1, 0.03), (0.03, 0.0)):
        d = direction(x, sigma)
        end = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            end = x + (sigma_next - sigma) * (d + direction(end, sigma_next)) / 2
        mine = my_heun(direction, x, sigma, sigma_next)
        assert torch.is_tensor(mine) and mine.shape == x.shape, "give the new x, in the shape of the old"
        assert torch.allclose(mine, end, atol=1e-5), (
            f"from {sigma} to {sigma_next}: not Heun's step. Take the mean of two directions, and start again from x."
        )
    print("check 1: right")


# %% [markdown]
# **2. Karras sigmas.** Write `my_karras(sigma_max, sigma_min, steps, rho)`: a list of `steps` sigmas, falling, with
# equal distances between their rho-th roots (EDM, eq. 5).


# %% tags=["check"]
def check_2(my_karras):
    for high, low, steps, rho in ((14.6, 0.03, 10, 7.0), (80.0, 0.002, 18, 7.0), (10.0, 1.0, 4, 1.0), (9.0, 4.0, 3, 2.0)):
        mine = my_karras(high, low, steps, rho)
        assert mine is not None and len(mine) == steps, f"{steps} sigmas were asked for"
        mine = torch.as_tensor(mine, dtype=torch.float64)
        assert torch.allclose(mine[[0, -1]], torch.tensor([high, low]).double(), rtol=1e-4), "the ends are the two given"
        gaps = (mine ** (1 / rho)).diff()
        assert (gaps < 0).all(), "the sigmas have to fall"
        assert torch.allclose(gaps, gaps.mean().expand_as(gaps), rtol=1e-3), (
            f"the roots, with rho {rho}, are not equally far apart"
        )
    assert np.allclose(my_karras(14.6, 0.03, 10, 7.0), karras_sigmas(14.6, 0.03, 10), rtol=1e-4)
    print("check 2: right")


# %% [markdown]
# ## Solutions


# %% tags=["solution", "hide-input"]
def my_heun(direction, x, sigma, sigma_next):
    d = direction(x, sigma)
    end = x + (sigma_next - sigma) * d
    if sigma_next == 0:
        return end
    return x + (sigma_next - sigma) * (d + direction(end, sigma_next)) / 2


def my_karras(sigma_max, sigma_min, steps, rho):
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)]


print()
check_1(my_heun)
check_2(my_karras)
