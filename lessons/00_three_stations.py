# %% [markdown]
# # Lesson 0: three stations
#
# You type a sentence, and a picture comes out. What happens in between?
#
# Three networks stand in a row, and each one is simple to describe:
#
# ```
#   "a photo of a pink car in a meadow"             noise, drawn from a seed
#                 |                                            |
#          1  ENCODE: text -> numbers                          |
#                 |     (1, 77, 128)                           v  (1, 4, 16, 16)
#                 +-------------------------->  2  DENOISE: 25 small steps from noise to a latent
#                                                              |  (1, 4, 16, 16)
#                                                              v
#                                               3  DECODE: latent -> picture
#                                                              |  (1, 3, 128, 128)
# ```
#
# In this lesson you make one picture, take it apart, and build it again by hand. At the end your own ten lines
# give the same picture as the library.
#
# The model is the *pocket checkpoint*. It is built like Stable Diffusion 1.5 and stored in the same files, with 73
# times fewer parameters: three levels instead of four, one layer in each, attention only where a latent is 8 x 8 or
# 4 x 4, and 670 tokens. All that you see here happens in the big one, too.
#
# Time: under a minute on two cores. Needs: Python, and knowing what a matrix is.

# %% tags=["setup"]
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from minidiff import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from minidiff.core.config import SD15_UNET, SD15_VAE, NoiseConfig
from minidiff.core.grids import ddim
from minidiff.core.guidance import guided
from minidiff.core.rng import normal
from minidiff.core.schedule import NoiseSchedule
from minidiff.core.text import tokenize
from minidiff.core.vae import sample_posterior
from minidiff.draw.images import HAIRLINE, INK, PAPER, contact_sheet, to_pil, to_tensor
from minidiff.files.folder import SD15_TEXT
from minidiff.files.text_files import build_text_encoder
from minidiff.pocket.world import Picture, draw

LESSONS = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()  # a notebook has no __file__
ROOT = LESSONS.parent
CHECKPOINT = ROOT / "checkpoints" / "pocket"
FIGURES = Path("outputs") / "lessons" / "00_three_stations"
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
# ## The whole road, in one line
#
# First the picture, then the questions. The prompt is one that the model has never seen: no training
# *photo* showed a pink car in a meadow. It has seen pink things, cars and meadows, and it has to put the words
# together.

# %%
PROMPT, SEED, STEPS, SCALE = "a photo of a pink car in a meadow", 0, 25, 5.0

pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT)
pipe.set_progress_bar_config(disable=True)

film = []  # the sampler hands over every step; we keep them all for later
output = pipe(PROMPT, seed=SEED, num_inference_steps=STEPS, guidance_scale=SCALE, sampler="ddim", callback=film.append)
picture = output.images[0]
show(contact_sheet([[picture]], column_labels=[f"{PROMPT}, seed {SEED}"], tile=384), "1_first_picture")

# %% [markdown]
# Who did that? Three networks, with the class names that you will meet in every tutorial. We count their
# parameters, and beside them those of SD 1.5. The big ones are built on PyTorch's `meta` device: shapes without
# memory, so that your laptop holds them easily.

# %%
with torch.device("meta"):
    big = [build_text_encoder(SD15_TEXT, "SD 1.5"), UNet2DConditionModel(SD15_UNET), AutoencoderKL(SD15_VAE)]

print("\nstation  network                      pocket         SD 1.5")
for station, small, large in zip(("encode", "denoise", "decode"), (pipe.text_encoder, pipe.unet, pipe.vae), big):
    counts = [sum(p.numel() for p in network.parameters()) for network in (small, large)]
    print(f"{station:8} {type(small).__name__:22} {counts[0]:>12,} {counts[1]:>14,}")

sizes = [sum(p.numel() for p in network.parameters()) for network in big]
assert sizes == [123_060_480, 859_520_964, 83_653_863]
ours = sum(p.numel() for network in (pipe.text_encoder, pipe.unet, pipe.vae) for p in network.parameters())
assert round(sum(sizes) / ours) == 73

# %% [markdown]
# ## Station 1: encode
#
# **How does a network read words?** It does not. It reads numbers from a table. The *tokenizer* cuts the prompt
# into pieces that it knows, and each piece has a number, its *id*. Around them stand a start mark and an end
# mark, and then filling, until there are 77. Always 77: the network has 77 places, whatever you say.
#
# ```
# "a photo of a pink car in a meadow"  ->  ids (1, 77)  ->  text encoder  ->  (1, 77, 128)
# ```
#
# (In SD 1.5 the last number is 768.)
#
# **Equation.** Each id picks a row of a table, and each place adds a row of its own: h_i = E[id_i] + P_i. Then
# self-attention (arXiv 1706.03762, eq. 1) mixes the places, with one rule: place i may look at places 0 … i, and
# never ahead (the mask of section 3.2.3; CLIP's text tower, arXiv 2103.00020, section 2.4). Let us see both.
#
# **Naive code**: the 77 ids, made by hand.

# %%
def naive_ids(prompt):
    words = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
    start, end, filling = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
    return torch.tensor([[start, *words, end] + [filling] * (75 - len(words))])


ids = naive_ids(PROMPT)  # (1, 77)
assert torch.equal(ids, tokenize(pipe.tokenizer, [PROMPT]))  # the library's

length = len(pipe.tokenizer(PROMPT, add_special_tokens=False).input_ids) + 2  # with the two marks
pieces = pipe.tokenizer.convert_ids_to_tokens(ids[0, :length].tolist())
print("\nStation 1, encode")
print("  pieces:", " ".join(piece.replace("</w>", "") for piece in pieces), f"… and {77 - length} times filling")
print("  ids:   ", ids[0, :length].tolist())

text = pipe.encode_prompt([PROMPT])  # (1, 77, 128): one row of 128 numbers for each place
print(f"  ids {tuple(ids.shape)} -> text {tuple(text.shape)}")

# %% [markdown]
# **Experiment.** Change one word, *car* to *house*, and see which of the 77 rows change. If no place looks ahead,
# then the rows before the word stay as they were, and every row after it can change, even the filling.

# %%
other = pipe.encode_prompt([PROMPT.replace("car", "house")])
change = (text - other)[0].square().mean(dim=1).sqrt()  # (77,): how far each row moved
first = int((ids != naive_ids(PROMPT.replace("car", "house")))[0].nonzero()[0])  # the place of the word

assert change[:first].max() < 1e-4  # nothing before it: the mask works
assert change[first:].min() > 1e-4  # everything from there on
print(
    f"  car -> house: rows 0 to {first - 1} are the same; rows {first} to 76 moved, the word's own by {change[first]:.2f}"
)

SHOWN = 32  # of the 77 places; from there on it looks the same
figure = Figure(figsize=(10, 3.4))
axes = figure.subplots()
axes.bar(range(SHOWN), change[:SHOWN], color=[BLUE if i == first else PALE for i in range(SHOWN)])
words = [piece.replace("</w>", "").strip("<|>") for piece in pieces]
axes.set_xticks(range(length), words, rotation=45, ha="right", rotation_mode="anchor")
axes.set_ylim(top=1.15 * float(change.max()))
axes.text(length, 1.08 * float(change.max()), f"places {length} to 76 are filling", color=INK, va="center")
axes.set_ylabel("how far the row moved")
axes.set_title("What changes in the encoded prompt when “car” becomes “house”", loc="left")
axes.margins(x=0.01)
show(figure, "2_one_word")

# %% [markdown]
# The word speaks through every place after it. This is one reason why word order matters in prompts, and why you
# cannot "take out a word" by deleting its row.
#
# **What breaks if** the prompt has more than 75 tokens? Nothing: it is cut into chunks of 75, and each chunk is
# encoded alone, between a start and an end mark of its own. The U-Net gets all chunks, one behind the other. But no
# word sees a word of another chunk. (Other programs throw the rest away.)

# %%
long = pipe.encode_prompt(["a photo of a pink car, " * 40])
print(f"  a prompt of more than 75 tokens: {tuple(long.shape)}, {long.shape[1] // 77} chunks")
assert long.shape[1] % 77 == 0 and long.shape[1] > 77

# %% [markdown]
# ## Station 2: denoise
#
# **How does noise become a picture?** In training, noise was mixed into pictures, a little or a lot, and the
# U-Net learned one thing: *which noise is in here?* Now we give it nothing but noise, and ask the same question
# 25 times. Each time it sees a little more structure in what is left.
#
# It works on *latents*, not on pixels: (1, 4, 16, 16), a small picture with four channels (station 3 says why).
#
# ```
# U-Net:   latents (1, 4, 16, 16), timestep t, text (1, 77, 128)   ->   the noise in it, eps (1, 4, 16, 16)
# ```
#
# **Equation.** A noisy latent is a mix, x_t = √ā_t x_0 + √(1 − ā_t) ε (DDPM, arXiv 2006.11239, eq. 4). The number
# ā_t says how much of the picture is left at timestep t: nearly 1 at t = 0, nearly 0 at t = 999.

# %%
a_bar = pipe.schedule.alphas_cumprod  # (1000,)
print("\nStation 2, denoise")
for t in (1, 241, 481, 721, 961):
    print(f"  t = {t:3}: {a_bar[t].sqrt():.2f} of the latent + {(1 - a_bar[t]).sqrt():.2f} of noise")

noise = normal((4, 16, 16), SEED, "latents")[None]  # (1, 4, 16, 16): the seed decides, and nothing else
with torch.no_grad():
    eps = pipe.unet(noise, 961, text)
print(f"  U-Net: latents {tuple(noise.shape)}, t = 961, text {tuple(text.shape)} -> noise {tuple(eps.shape)}")

# %% [markdown]
# **Guidance.** We can give the prompt more weight than the network itself gives it. The network is asked twice,
# with the prompt and with an empty one, and we go further in the direction from the second answer to the first:
#
# ε̃ = ε_empty + s · (ε_prompt − ε_empty)
#
# This is eq. 6 of arXiv 2207.12598. The paper writes it with w = s − 1; programs have `guidance_scale` = s. At s
# = 1 there is no guidance, and the empty prompt cancels out.
#
# **Naive code**: two calls. The **library** puts both into one batch of two, which gives the same numbers faster.

# %%
no_text = pipe.encode_prompt([""])


@torch.no_grad()
def naive_guidance(x, t):
    with_prompt, without = pipe.unet(x, t, text), pipe.unet(x, t, no_text)  # two calls of the U-Net
    return without + SCALE * (with_prompt - without)  # 2207.12598 eq. 6


with torch.no_grad():
    batched = guided(pipe.unet, (text,), (no_text,), SCALE)(noise, torch.tensor([961.0]))  # one call, batch of two
torch.testing.assert_close(naive_guidance(noise, 961), batched, atol=1e-4, rtol=1e-4)

# %% [markdown]
# **Now the loop.** The guided answer ε̃ tells us what the network believes the clean latent to be: solve eq. 4
# for x_0 (DDIM, arXiv 2010.02502, eq. 9). We do not trust it all the way. We go back to a *slightly less noisy*
# mix of the same x_0 and the same ε̃ (eq. 12 with σ = 0), and ask again:
#
# x_prev = √ā_prev · x_0 + √(1 − ā_prev) · ε̃
#
# 25 steps visit 25 of the 1000 timesteps: 961, 921, …, 41, 1. Here is the whole sampler.

# %%
def naive_ddim(x, steps):
    jump = 1000 // steps
    for t in range(1 + (steps - 1) * jump, 0, -jump):  # 961, 921, … 1
        eps = naive_guidance(x, t)
        x0 = (x - (1 - a_bar[t]).sqrt() * eps) / a_bar[t].sqrt()  # DDIM eq. 9: the clean latent, as believed now
        a_bar_prev = a_bar[max(t - jump, 0)]
        x = a_bar_prev.sqrt() * x0 + (1 - a_bar_prev).sqrt() * eps  # DDIM eq. 12: a little less noise than before
    return x


mine, latents = naive_ddim(noise, STEPS), film[-1].x
torch.testing.assert_close(mine, latents, atol=1e-3, rtol=1e-3)
print(f"  by hand and by the library: the same latents, to {(mine - latents).abs().max():.0e}")
print(f"  that took {2 * STEPS} answers of the U-Net: {STEPS} steps, with the prompt and without")

# %% [markdown]
# That is all of it. The library's sampler has more checks and no more ideas.
#
# **Experiment: the film.** The callback kept every step. For some of them we decode two things (station three
# lends us its window): the noisy latents that the U-Net saw, and the clean ones that it believed in.

# %%
frames = [0, 2, 5, 8, 12, 17, 24]
seen = [noise if i == 0 else film[i - 1].x for i in frames]
believed = [film[i].x0 for i in frames]
rows = [to_pil(pipe.decode(torch.cat(row))) for row in (seen, believed)]
columns = [f"step {i + 1}, t = {film[i].t:.0f}" for i in frames]

plain = []  # once more without guidance
unguided = {"guidance_scale": 1.0, "sampler": "ddim", "callback": plain.append, "output_type": "latent"}
pipe(PROMPT, seed=SEED, num_inference_steps=STEPS, **unguided)
rows.append(to_pil(pipe.decode(torch.cat([plain[i].x0 for i in frames]))))
spreads = [steps[0].x0.std().item() for steps in (film, plain)]
print(f"  spread of the first guess: {spreads[0]:.2f} with guidance {SCALE:.0f}, {spreads[1]:.2f} without; of a latent: 1")
assert spreads[1] < 1 < spreads[0]
labels = ["what the U-Net sees", f"what it believes, guidance {SCALE:.0f}", "without guidance"]
show(contact_sheet(rows, labels, columns, f"{PROMPT}: {STEPS} steps", tile=224), "3_film")

# %% [markdown]
# Read the lowest row. Without guidance the first guess is a blur: the average of all that could still come. Guidance
# goes far beyond it, and the first guess is too bright and too dark. In both rows layout and colours are decided first,
# eyes and edges last. This order, from large to small, is how diffusion models draw.
#
# **What breaks if** guidance is left out, or overdone? The same two seeds, four scales. At scale 1 we take the
# network's answer as it is. At 20 each step goes much too far; the latents leave the range that the decoder knows,
# and pixels are cut off at pure black and pure white. The printed numbers say so too.

# %%
SCALES, SEEDS = (1.0, 2.0, 5.0, 20.0), (SEED, SEED + 1)
grid = []
for scale in SCALES:
    both = pipe([PROMPT] * 2, seed=SEEDS, num_inference_steps=STEPS, guidance_scale=scale, output_type="latent").images
    pixels = pipe.decode(both)
    clipped = (pixels.abs() >= 1).float().mean()
    print(f"  guidance {scale:4.0f}: latents have spread {both.std():.2f}; {clipped:6.1%} of the pixel values cut off")
    grid.append(to_pil(pixels))

assert np.abs(np.asarray(grid[2][0], dtype=int) - np.asarray(picture, dtype=int)).max() <= 2  # alone or in a batch
show(
    contact_sheet(
        list(zip(*grid)), [f"seed {s}" for s in SEEDS], [f"guidance {s:.0f}" for s in SCALES], PROMPT, tile=256
    ),
    "4_guidance",
)

# %% [markdown]
# The seed chooses *which* pink car in a meadow you get. The same seed gives the same noise, on any
# machine, alone or in a batch. The noise is the only thing about a picture that is left to chance, so the picture is
# the same, too, but for its last digits: machines round differently. The `assert` above allows 2 of 255.

# %% [markdown]
# ## Station 3: decode
#
# **Why not denoise the pixels themselves?** There are too many of them. A picture is 3 · 128 · 128 = 49,152
# numbers, and its latent is 4 · 16 · 16 = 1,024: 48 times fewer, for every one of the 50 calls. An *autoencoder*
# learned to go there and back (latent diffusion, arXiv 2112.10752, section 3.1).
#
# ```
# encode   picture (1, 3, 128, 128)  ->  mean, log-variance, each (1, 4, 16, 16)
# decode   latent  (1, 4, 16, 16)    ->  picture (1, 3, 128, 128)
# ```
#
# **Equation.** The encoder gives not one latent but a small cloud: z = μ + σ ⊙ ε (arXiv 1312.6114, eq. 10). And
# it is stored in other units: the U-Net wants numbers of spread 1, so latents are multiplied by a constant,
# `scaling_factor`, one over their spread (arXiv 2112.10752, appendix G). Before decoding, divide by it again.
#
# **Naive code**: from latents to bytes by hand. The **library** does the same inside `pipe(...)`.

# %%
factor = pipe.vae.config.scaling_factor
with torch.no_grad():
    pixels = pipe.vae.decode(latents / factor)  # (1, 3, 128, 128), about -1 … 1
bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)[0].permute(1, 2, 0)  # (128, 128, 3)
assert np.array_equal(bytes_.numpy(), np.asarray(picture))

print("\nStation 3, decode")
print(
    f"  latents {tuple(latents.shape)} / {factor:.4f} -> picture {tuple(pixels.shape)} -> bytes {tuple(bytes_.shape)}"
)
print(f"  {pixels.numel():,} numbers for {latents.numel():,}: {pixels.numel() / latents.numel():.0f} times fewer")

# %% [markdown]
# **Experiment: there and back.** We draw a picture with the code that drew the training data, encode it, look at
# its four channels, and decode it. What is lost is what no picture of this model can ever have.

# %%
drawn = draw(Picture("car", "pink", "meadow", "photo"), seed=3)
x = to_tensor(drawn)[None]  # (1, 3, 128, 128)
with torch.no_grad():
    mean, logvar = pipe.vae.encode(x)  # each (1, 4, 16, 16)
    z = sample_posterior(mean, logvar, normal((1, 4, 16, 16), SEED, "posterior"))
torch.testing.assert_close(z, mean + (logvar / 2).exp() * normal((1, 4, 16, 16), SEED, "posterior"))  # eq. 10

back = pipe.decode(z * factor)  # `decode` takes scaled latents
psnr = 10 * torch.log10(4 / (back - x).square().mean())  # 4 = (range of -1 … 1) squared
print(f"  there and back: {psnr:.1f} dB; spread of z {z.std():.2f}, of z · scaling_factor {(z * factor).std():.2f}")


def channel(c):
    """One channel of z as a gray picture, large cells so that they can be counted."""
    gray = (z[0, c] - z[0, c].min()) / (z[0, c].max() - z[0, c].min())
    return Image.fromarray((gray * 255).byte().numpy()).resize((256, 256), Image.Resampling.NEAREST)


tiles = [drawn, *(channel(c) for c in range(4)), to_pil(back)[0]]
labels = ["drawn, 128 x 128", *(f"channel {c}, 16 x 16" for c in range(4)), f"decoded, {psnr:.1f} dB"]
show(
    contact_sheet([tiles], (), labels, "There and back: a picture, its latent, and what the decoder makes of it", 224),
    "5_latent",
)

# %% [markdown]
# You can still see the car in the channels: a latent is a small picture, not a code word. That is why a U-Net,
# made of convolutions, can work on it.
#
# **What breaks if** the factor is not the one that the U-Net was trained with? Nothing crashes. The decoder sees
# latents of the wrong spread, and contrast and colours come out wrong. The pocket model's factor is 1, as its latents
# are in standard units already; SD 1.5 has 0.18215, and to forget it there is to decode latents five times too small.
# Here are latents half as large and twice as large as they should be.

# %%
wrong = {"right": latents / factor, "half as large": 0.5 * latents / factor, "twice as large": 2 * latents / factor}
with torch.no_grad():
    tiles = [to_pil(pipe.vae.decode(z))[0] for z in wrong.values()]
show(contact_sheet([tiles], (), list(wrong), "Latents in the wrong units", tile=256), "6_scaling_factor")

# %% [markdown]
# ## What to keep
#
# - Three networks: text encoder, U-Net, autoencoder. Only the U-Net is called again and again.
# - The U-Net answers one question, *which noise is in here?*, and eq. 9 turns the answer into a belief about the
#   picture.
# - A sampler is a loop of a few lines: believe, add back a little less noise, ask again.
# - Guidance is one more call and one line. The scale is a volume knob, and it can be turned up too far.
# - Latents are small pictures in other units. Mind the units.
#
# ## Two exercises
#
# Write each function in a cell of its own (or below, if you read this as a file), then call its check:
# `check_1(my_function)`. A check that says nothing more than "right" is content; a wrong answer gets a hint. The
# solutions are in the last cell.
#
# **1. The paper's form of guidance.** Eq. 6 of arXiv 2207.12598 reads (1 + w) ε_prompt − w ε_empty. Write
# `paper_guidance(with_prompt, without, guidance_scale)` in that form: find the w that belongs to a
# `guidance_scale`.

# %% tags=["check"]
def check_1(paper_guidance):
    with_prompt, without = normal((2, 4, 16, 16), 0, "with"), normal((2, 4, 16, 16), 0, "without")
    for scale in (1.5, 7.5, 20.0):

        def unet(x, t, text):
            return torch.cat([without, with_prompt])  # a stand-in: the library's batch of two, the empty prompt first

        theirs = guided(unet, (torch.ones(2, 77, 8),), (torch.zeros(2, 77, 8),), scale)(with_prompt, torch.zeros(2))
        mine = paper_guidance(with_prompt, without, scale)
        assert torch.is_tensor(mine) and mine.shape == theirs.shape, "give a tensor of the same shape as with_prompt"
        assert torch.allclose(mine, theirs, atol=1e-4), (
            f"guidance_scale {scale}: not the library's answer. Which w, and which scale, leaves ε_prompt as it is?"
        )
    print("check 1: right")


# %% [markdown]
# **2. A share of fresh noise.** DDIM has a knob η. At 0 it is the loop above; at 1 it adds fresh noise in every
# step and is DDPM's sampler. Write `noisy_ddim(model, x, a_bar, steps, step_noise, eta)`: the loop of this
# lesson, with `eps = model(x, t)`, `t` an int, and the fresh noise of step i (0, 1, …) from `step_noise(i)`. In
# eq. 12 the fresh noise comes in times σ, and √(1 − ā_prev) becomes √(1 − ā_prev − σ²). Eq. 16 gives σ = η √((1 −
# ā_prev) / (1 − ā_t)) √(1 − ā_t / ā_prev).

# %% tags=["check"]
def check_2(noisy_ddim):
    schedule = NoiseSchedule.from_config(NoiseConfig())
    noise = normal((1, 4, 8, 8), 0, "noise")

    def step_noise(i):
        return normal((1, 4, 8, 8), 0, "step", i)

    def model(x, t):
        return (
            0.5 * x + torch.as_tensor(t).float().sin()
        )  # any function will do: what counts is the arithmetic around it

    for eta in (0.0, 0.5, 1.0):
        theirs = [step.x for step in ddim(model, noise, schedule, 10, step_noise, eta=eta)][-1]
        mine = noisy_ddim(model, noise, schedule.alphas_cumprod, 10, step_noise, eta)
        assert torch.is_tensor(mine) and mine.shape == theirs.shape, "give the latents after the last step"
        hint = "the loop of this lesson" if eta == 0 else "eq. 12 with all three terms, and σ from eq. 16"
        assert torch.allclose(mine, theirs, atol=1e-3), f"eta {eta}: not the library's answer. Look again at {hint}."
    print("check 2: right")


# %% [markdown]
# ## Solutions
#
# w = guidance_scale − 1: at scale 1 there is no guidance, and w = 0 says so. The famous 7.5 is w = 6.5.

# %% tags=["solution", "hide-input"]
def paper_guidance(with_prompt, without, guidance_scale):
    w = guidance_scale - 1
    return (1 + w) * with_prompt - w * without


def noisy_ddim(model, x, a_bar, steps, step_noise, eta):
    jump = 1000 // steps
    for i, t in enumerate(range(1 + (steps - 1) * jump, 0, -jump)):
        a, a_prev = a_bar[t], a_bar[max(t - jump, 0)]
        sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()  # DDIM eq. 16
        eps = model(x, t)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()  # DDIM eq. 9
        x = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * eps + sigma * step_noise(i)  # DDIM eq. 12
    return x


print()
check_1(paper_guidance)
check_2(noisy_ddim)
