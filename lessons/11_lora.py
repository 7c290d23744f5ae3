# %% [markdown]
# # Lesson 11: LoRA
#
# You have five pictures of a dog, and a model with millions of weights that has never seen this dog. How little
# of the model do you have to change?
#
# Fine-tuning moves every weight. *Low-rank adaptation* (LoRA, arXiv 2106.09685) leaves them all alone, and learns
# a small change beside them. The result is a file of a few hundred kilobytes that can be put on, turned up,
# turned down, and taken off again.
#
# ```
#             x  (in)
#             |
#       +-----+------+
#       |            |
#       v            v
#   W (out, in)   A (r, in)       down to r numbers, trained
#   frozen           |
#       |            v
#       |         B (out, r)      up again, trained
#       |            |
#       |            x  alpha / r
#       +---->+<-----+
#             |
#             v  y (out)
# ```
#
# In this lesson you build the layer by hand, count its parameters, teach the pocket model the dog, and look
# inside what it learned.
#
# Time: about a minute on two cores. Needs: lesson 0, and matrix multiplication.

# %% tags=["setup"]
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from minidiff import StableDiffusionPipeline, UNet2DConditionModel
from minidiff.core.config import SD15_UNET, UNetConfig
from minidiff.core.inject import DEFAULT_TARGETS, eject, inject, lora_layers, merge, trainable, unmerge
from minidiff.core.lora import LoRALinear, LoRAWeights
from minidiff.core.rng import generator, normal
from minidiff.draw.images import HAIRLINE, INK, PAPER, contact_sheet, load_image
from minidiff.files.lora_file import FILE_NAME
from minidiff.trainer import recipes
from minidiff.trainer.run import fit
from minidiff.trainer.settings import LoRASettings

LESSONS = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()  # a notebook has no __file__
ROOT = LESSONS.parent
CHECKPOINT = ROOT / "checkpoints" / "pocket"
FIGURES = Path("outputs") / "lessons" / "11_lora"
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
# ## One layer: W + BA
#
# **What is a small change of a big matrix?** Not few entries: few *directions*. A matrix that is a product B A,
# with only r columns in B and r rows in A, has rank r at most. It reads r features of the input, and writes along
# r directions of the output. That is a strong restriction, and it saves a lot of numbers.
#
# **Shapes.** W is (out, in); A is (r, in); B is (out, r). Here is one attention projection of the pocket model,
# to scale.

# %%
OUT, IN, RANK, ALPHA = 128, 128, 8, 16.0

figure = Figure(figsize=(9, 3.6))
axes = figure.subplots()
for x, height, width, color, name in (
    (0, OUT, IN, HAIRLINE, "W, frozen"),
    (175, OUT, RANK, BLUE, "B"),
    (225, RANK, IN, RUST, "A"),
):
    axes.add_patch(Rectangle((x, OUT - height), width, height, facecolor=color))
    axes.text(x + width / 2, OUT + 20, name, ha="center", color=INK, fontsize=12)
    axes.text(x + width / 2, OUT + 6, f"{height} × {width}", ha="center", color=INK, fontsize=9)
    axes.text(x + width / 2, OUT - height - 12, f"{height * width:,} numbers", ha="center", color=INK, fontsize=9)
axes.text(151, OUT / 2, "+", ha="center", va="center", fontsize=20, color=INK)
axes.set(xlim=(-5, 360), ylim=(-22, OUT + 34), aspect="equal")
axes.axis("off")
show(figure, "1_shapes")

# %% [markdown]
# **Equation.** y = W x + (α / r) B A x (arXiv 2106.09685, eq. 3, with the α / r of section 4.1). α is a number
# that you choose; more about it below.
#
# **Naive code**, then the **library's** layer with the same A and B. `LoRALinear` wraps a frozen `nn.Linear`.

# %%
def naive_lora(x, W, A, B, alpha):
    r = len(A)
    return x @ W.T + alpha / r * (x @ A.T @ B.T)  # 2106.09685 eq. 3; a row of x is one input


x = normal((5, IN), 0, "x")  # five inputs
A, B = normal((RANK, IN), 0, "A") / IN**0.5, normal((OUT, RANK), 0, "B") / RANK**0.5

layer = LoRALinear(nn.Linear(IN, OUT, bias=False))
layer.add("default", LoRAWeights(A, B, ALPHA / RANK))

torch.testing.assert_close(layer(x), naive_lora(x, layer.base.weight, A, B, ALPHA))
print("One layer")
print(f"  x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)} -> y {tuple(layer(x).shape)}; by hand = library")
print(f"  W has {OUT * IN:,} numbers, A and B together {A.numel() + B.numel():,}")

# %% [markdown]
# ## Why does B start at zero?
#
# There are three ways to start. Which of them can learn, and which of them starts as the model that we have?
#
# **Equation.** Let g = ∂L/∂y. By the chain rule, with s = α / r:
#
# ∂L/∂B = s · g (A x)ᵀ and ∂L/∂A = s · (Bᵀ g) xᵀ
#
# Look at what each of them is multiplied by. If B is zero, A gets no gradient; if A is zero, B gets none. One of
# them may be zero, as the other one gets it going. If both are zero, nothing ever moves.
#
# **Naive code** for the gradients, and the **library** with autograd.

# %%
def naive_gradients(x, g, A, B, scale):
    return scale * (g @ B).T @ x, scale * g.T @ (x @ A.T)  # of A (r, in) and of B (out, r), summed over the inputs


def fresh_layer(start, seed=0):
    """A frozen layer, and an adapter that starts in one of three ways."""
    base = nn.Linear(32, 32, bias=False)
    base.weight.data = normal((32, 32), seed, "W") / 32**0.5
    A, B = normal((4, 32), seed, "A") / 32**0.5, normal((32, 4), seed, "B") / 4**0.5
    if start != "both random":
        B = torch.zeros_like(B)
    if start == "both zero":
        A = torch.zeros_like(A)
    layer = LoRALinear(base)
    layer.add("default", LoRAWeights(A, B, 1.0))
    return layer


STARTS, STEPS = ("A random, B zero", "both zero", "both random"), 150
x = normal((256, 32), 1, "x")
wanted = normal((32, 4), 1, "up") @ normal((4, 32), 1, "down") / 32  # the change that should be learned, of rank 4
target = F.linear(x, fresh_layer("both zero").base.weight + wanted)

print("\nThree starts:          first loss   gradient of A   gradient of B   last loss")
curves = {}
for start in STARTS:
    layer = fresh_layer(start)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    optimizer = torch.optim.Adam([A, B], lr=1e-2)
    curves[start] = []
    for step in range(STEPS):
        y = layer(x)
        loss = F.mse_loss(y, target)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            grad_A, grad_B = naive_gradients(x, 2 * (y - target).detach() / y.numel(), A.detach(), B.detach(), 1.0)
            torch.testing.assert_close((A.grad, B.grad), (grad_A, grad_B))
            first = f"{loss:12.4f} {A.grad.norm():15.4f} {B.grad.norm():15.4f}"
        optimizer.step()
        curves[start].append(loss.item())
    print(f"  {start:18} {first} {loss:11.6f}")

at_start = {start: curve[0] for start, curve in curves.items()}
assert at_start["A random, B zero"] == at_start["both zero"] < at_start["both random"]  # the first two are the base
assert set(curves["both zero"]) == {at_start["both zero"]}  # 150 steps, and not a bit has moved

figure = Figure(figsize=(8, 3.8))
axes = figure.subplots()
for (start, curve), color in zip(curves.items(), (BLUE, INK, RUST)):
    axes.plot(curve, color=color, linewidth=2, label=start)
axes.set(yscale="log", xlabel="step", ylabel="loss")
axes.set_title("One layer learns a change of rank 4, from three starts", loc="left")
axes.legend(frameon=False)
axes.margins(x=0.01)
show(figure, "2_three_starts")

# %% [markdown]
# - **A random, B zero** starts as the base model, because B A = 0, and learns. In its very first step only B
#   moves; from the second step on, A does too.
# - **Both zero** also starts as the base model, and stays there. Nothing crashes. The loss just never changes.
# - **Both random** learns too, in this toy. But it does not start as the base model: its loss begins higher, because
#   the random change comes first.
#
# **What breaks if** both are random in a real model? We put a fresh adapter on all attention layers of the pocket
# model, and draw a picture before any training.

# %%
pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT)
pipe.set_progress_bar_config(disable=True)
DRAW = {"num_inference_steps": 25, "guidance_scale": 5.0}
CAT = "a photo of an orange cat on the moon"

base = pipe(CAT, seed=0, **DRAW).images[0]
layers = inject(pipe.unet, rank=8)  # A random, B zero
fresh = pipe(CAT, seed=0, **DRAW).images[0]
assert fresh.tobytes() == base.tobytes()  # not nearly the base: the base, to the last bit
for name, layer in layers.items():
    nn.init.kaiming_uniform_(layer.lora_B["default"].data, a=5**0.5, generator=generator(0, "B", name))
broken = pipe(CAT, seed=0, **DRAW).images[0]
eject(pipe.unet)

labels = ["the base model", "A random, B zero", "both random"]
show(
    contact_sheet([[base, fresh, broken]], (), labels, "An adapter before its first training step", tile=256),
    "3_untrained",
)

# %% [markdown]
# ## Rank and alpha
#
# **How many parameters is that?** A has r · in numbers and B has out · r, so each layer costs **r · (in + out)**.
# Linear in r: twice the rank, twice the numbers.
#
# We count on SD 1.5 itself. On the `meta` device its U-Net has shapes and no memory, and the library can put an
# adapter on it all the same. The usual targets are the four projections of every attention layer, self and cross:
# 128 layers.

# %%
def naive_count(model, rank):
    layers = [m for name, m in model.named_modules() if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


with torch.device("meta"):
    sd15 = UNet2DConditionModel(SD15_UNET)

print("\nSD 1.5:  rank   layers   parameters of the adapter   share of the U-Net")
counts = {}
for rank in (1, 4, 8, 16):
    by_formula = naive_count(sd15, rank)
    layers = inject(sd15, rank)
    counts[rank] = sum(p.numel() for p in trainable(sd15).values())
    eject(sd15)
    assert counts[rank] == by_formula
    print(f"         {rank:4} {len(layers):8} {counts[rank]:27,} {counts[rank] / 859_520_964:20.4%}")

assert counts[4] == 797_184 and counts[8] == 1_594_368

# %% [markdown]
# **797,184 is rank 4.** You will meet this number in tutorials as "the parameters at rank 8". It was copied from
# one to the next. The formula says otherwise, and now you have counted it yourself: rank 8 is 1,594,368.
# (Exercise 1 finds a second number that is nearly the same, and not the same.)
#
# **And alpha?** It only sets how strong the detour is: α / r. The idea is that you find a good learning rate
# once, and then change r without finding it again, since a sum over twice as many directions is divided by twice
# as much. Some people write α = r (scale 1), others α = 2r (scale 2). Both are fine, as long as whoever *loads*
# the file uses the same α. Keep this in mind: we break it at the end.

# %% [markdown]
# ## Teaching the dog
#
# Five pictures, one prompt, "a photo of a sks dog". The word *sks* is a token that the model never saw in
# training: a name without a meaning, ready for one.

# %%
DOG = LESSONS / "data" / "dog"
five = [load_image(path) for path in sorted(DOG.glob("*.png"))]
show(contact_sheet([five], (), [path.stem for path in sorted(DOG.glob("*.png"))], "The dog", tile=200), "4_the_dog")

# %% [markdown]
# The training is the recipe behind `minidiff train lora`, with the same settings as its flags. It runs the loop
# of every diffusion model: add noise to the latents of a picture, ask the U-Net which noise it was, compare
# (DDPM, arXiv 2006.11239, eq. 14). Only A and B get a gradient.

# %%
workplace = tempfile.TemporaryDirectory(prefix="minidiff-lesson-11-")
settings = LoRASettings(
    pretrained_model_name_or_path=str(CHECKPOINT),
    instance_data_dir=str(DOG),
    instance_prompt="a photo of a sks dog",
    output_dir=str(Path(workplace.name) / "dog"),
    device="cpu",
    rank=8,
    lora_alpha=16,
    learning_rate=1e-3,
    train_batch_size=4,
    max_train_steps=300,
    checkpointing_steps=300,
    validation_steps=0,
)
print("\nTeaching the dog")
report = fit(recipes.lora(settings), settings)
adapter = Path(settings.output_dir) / FILE_NAME
print(f"  {report.done} updates; the adapter's file has {adapter.stat().st_size / 1000:,.0f} kB")

# %% [markdown]
# Now put the adapter on, and draw: the same prompts and the same seeds, before and after. The places are none of
# those in the five pictures. The last column is a question of another kind: what did the lesson cost?

# %%
PROMPTS = [
    "a photo of a sks dog on the moon",
    "a photo of a sks dog in the city",
    "a photo of a sks dog in the snow",
    "a photo of a blue car in the desert",
]
before = pipe(PROMPTS, seed=[0] * 4, **DRAW).images
latent, text = normal((1, 4, 16, 16), 0, "latent"), pipe.encode_prompt(PROMPTS[:1])
with torch.no_grad():
    untouched = pipe.unet(latent, 500, text)  # to compare with, later

print(" ", str(pipe.load_lora_weights(adapter, adapter_name="dog")).replace(workplace.name, "…"))
after = pipe(PROMPTS, seed=[0] * 4, **DRAW).images
columns = [prompt.removeprefix("a photo of ") for prompt in PROMPTS]
show(
    contact_sheet([before, after], ["before", "after"], columns, "The same prompts, the same seeds", tile=256),
    "5_before_after",
)

# %% [markdown]
# Before, *sks* means nothing, and the model draws some dog. After, it is the dog with the two colours and the
# scarf, in places where it never was. And look at the car: nobody spoke of a dog, and still it may have taken on
# a little of it. The adapter acts on every prompt. More steps teach more and forget more.
#
# ## Turning the knob
#
# **Experiment.** The adapted layer is a sum, W + strength · (α / r) B A, so the adapter can be put on at any
# strength: 0 is the base, 1 is as trained.

# %%
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
row = []
for strength in STRENGTHS:
    pipe.set_adapters(["dog"], [strength])
    row.append(pipe(PROMPTS[0], seed=0, **DRAW).images[0])
pipe.set_adapters(["dog"], [1.0])
labels = [f"strength {s:g}" for s in STRENGTHS]
show(contact_sheet([row], (), labels, PROMPTS[0], tile=256), "6_strength")

# %% [markdown]
# Between 0 and 1 lies everything between the base and the dog. Above 1 we leave what was trained: colours get
# louder, and the picture may fall apart.
#
# ## Merging
#
# **Is the detour slow?** A little. But it need not stay one. Since everything is linear, the change can be added
# into the weights: W′ = W + (α / r) B A (arXiv 2106.09685, section 4.1). The merged model has the shape of the
# base, needs no special code, and gives the same answers.

# %%
name, layer = next(iter(lora_layers(pipe.unet).items()))
W, A, B = layer.base.weight.detach().clone(), layer.lora_A["dog"].detach(), layer.lora_B["dog"].detach()
with torch.no_grad():
    detour = pipe.unet(latent, 500, text)
    merge(pipe.unet)
    merged = pipe.unet(latent, 500, text)
    torch.testing.assert_close(layer.base.weight.detach(), W + settings.lora_alpha / settings.rank * B @ A)  # by hand
    unmerge(pipe.unet)

torch.testing.assert_close(merged, detour, atol=1e-4, rtol=1e-4)
assert torch.equal(layer.base.weight, W)  # unmerged: the old weights, to the last bit
print("\nMerging")
print(f"  the U-Net with detours and with merged weights: the same to {(merged - detour).abs().max():.0e}")

# %% [markdown]
# Unmerging by subtraction would leave rounding errors. The library keeps the old W instead, so the base comes
# back to the last bit.
#
# ## What was learned?
#
# **Is ΔW really of rank 8?** The singular values tell: they are the strengths of the directions in which a matrix
# acts. An ordinary weight matrix uses all of its directions. A product B A can use r.

# %%
spectra = [torch.linalg.svdvals(layer.delta()) for layer in lora_layers(pipe.unet).values()]
for values in spectra:
    assert (values > 2e-6 * values[0]).sum() == settings.rank  # eight, and then nothing but rounding

needed = [int((values.square().cumsum(0) / values.square().sum() < 0.9).sum()) + 1 for values in spectra]
print("\nWhat was learned")
print(f"  {len(spectra)} layers; each ΔW has {settings.rank} singular values and then zeros")
print(
    f"  90 % of a change lies in {min(needed)} to {max(needed)} directions, {sum(needed) / len(needed):.1f} on average"
)

figure = Figure(figsize=(8, 4))
axes = figure.subplots()
for i, values in enumerate(spectra):
    line = values[:24].clamp(min=1e-9)
    axes.plot(
        range(1, len(line) + 1), line, color=PALE, linewidth=0.8, label="ΔW, each of the layers" if i == 0 else None
    )
axes.plot(
    range(1, 25), torch.linalg.svdvals(W)[:24], color=RUST, linewidth=2, label=f"W, {tuple(W.shape)}, of one layer"
)
axes.plot(range(1, 25), spectra[0][:24].clamp(min=1e-9), color=BLUE, linewidth=2, label="ΔW of the same layer")
axes.set(yscale="log", xlabel="number of the singular value", ylabel="singular value")
axes.set_xticks([1, 4, 8, 12, 16, 20, 24])
axes.set_title("A change of rank 8 ends after eight values", loc="left")
axes.legend(frameon=False)
axes.margins(x=0.01)
show(figure, "7_singular_values")

# %% [markdown]
# A few directions carry most of the change: the paper's section 7 finds the same in large language models. This
# is why an adapter can often be shrunk afterwards (exercise 2). It does not say that a smaller rank would have learned
# the same in as many steps.
#
# ## What breaks if alpha is lost
#
# A LoRA file holds A and B. Alpha is no tensor: it is a note beside them, and some programs do not write it, or
# do not read it. Then the loader has to guess, and the rule is α = r, scale 1. Ours was trained with α = 16 and r
# = 8, scale 2.

# %%
lost = Path(workplace.name) / "without_alpha.safetensors"
save_file(load_file(adapter), lost)  # the same tensors, to the bit; the note is gone

right = layer.delta()
eject(pipe.unet)
print("\nAlpha is lost")
print(" ", str(pipe.load_lora_weights(lost)).replace(workplace.name, "…"))
wrong = lora_layers(pipe.unet)[name].delta()
torch.testing.assert_close(wrong, right * settings.rank / settings.lora_alpha)  # half of it
half = pipe(PROMPTS[0], seed=0, **DRAW).images[0]

pipe.set_adapters(["default"], [4.0])  # scale 4 in place of 2: as if it had been trained with alpha = 4, and lost it
double = pipe(PROMPTS[0], seed=0, **DRAW).images[0]
labels = ["as trained", "alpha 16 lost: half as strong", "alpha 4 lost: twice as strong"]
show(
    contact_sheet([[row[2], half, double]], (), labels, "The same tensors at the wrong scale", tile=256), "8_alpha_lost"
)

# %% [markdown]
# No error, no warning in most programs: just a subject that is "not learned well", or a picture that is "burnt".
# minidiff writes alpha into the file's metadata, where diffusers reads it, and says so when a file has none.
#
# At last we take the adapter out. The model is what it was when we began, to the last bit:

# %%
pipe.unload_lora_weights()
with torch.no_grad():
    assert torch.equal(pipe.unet(latent, 500, text), untouched)
workplace.cleanup()

# %% [markdown]
# ## What to keep
#
# - y = W x + (α / r) B A x. W is frozen; A goes down to r numbers, B comes up again.
# - B starts at zero: the model starts as itself. Not both at zero: then it never moves.
# - r · (in + out) parameters a layer. On SD 1.5's attention: 797,184 at rank 4, 1,594,368 at rank 8.
# - The strength can be turned at will; merged weights give the same answers.
# - Alpha belongs to the file. Without it, A and B do not say how strong they are.
#
# ## Two exercises
#
# Write each function in a cell of its own, then call its check: `check_1(my_function)`. A wrong answer gets a
# hint. The solutions are in the last cell.
#
# **1. Count before you train.** Write `lora_count(model, rank, targets)`: how many numbers an adapter has. A
# target is the end of a layer's name, whole words between the dots: "to_q" is in every attention layer,
# "attn2.to_k" in every cross-attention layer. Then count SD 1.5's cross-attention alone, at rank 8: `attn2.to_q
# attn2.to_k attn2.to_v attn2.to_out.0`. How far is it from 797,184?

# %% tags=["check"]
def check_1(lora_count):
    cross = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    for rank, targets in (
        (2, DEFAULT_TARGETS),
        (4, ("to_q",)),
        (4, ("attn2.to_k", "attn2.to_v")),
        (1, ("ff.net.2",)),
    ):
        model = UNet2DConditionModel(UNetConfig(block_out_channels=(32, 64, 64, 64), cross_attention_dim=24))
        mine = lora_count(model, rank, targets)
        inject(model, rank, targets=targets)
        theirs = sum(p.numel() for p in trainable(model).values())
        assert mine == theirs, (
            f"rank {rank}, {' '.join(targets)}: {mine} is not it. A is (r, in), B is (out, r); add them up."
        )
    with torch.device("meta"):
        model = UNet2DConditionModel(SD15_UNET)
    assert lora_count(model, 8, cross) == 795_648, "SD 1.5, cross-attention, rank 8: some layers have in ≠ out"
    print("check 1: right. 795,648: close to 797,184, and something else entirely")


# %% [markdown]
# **2. Shrink an adapter.** Write `shrink(A, B, rank)`: a new pair, A′ (rank, in) and B′ (out, rank), whose
# product is as close to B A as any matrix of that rank can be. `torch.linalg.svd` gives you the directions and
# their strengths.

# %% tags=["check"]
def check_2(shrink):
    A, B = normal((8, 40), 0, "A"), normal((24, 8), 0, "B")
    strengths = torch.linalg.svdvals(B @ A)
    for rank in (1, 3, 8):
        small_A, small_B = shrink(A, B, rank)
        shapes = tuple(small_A.shape), tuple(small_B.shape)
        assert shapes == ((rank, 40), (24, rank)), f"rank {rank}: the shapes of A′ and B′ are {shapes}"
        error = (small_B @ small_A - B @ A).norm()
        best = strengths[rank:].square().sum().sqrt()  # Eckart and Young, 1936: what no matrix of this rank can beat
        assert error <= best + 1e-3, f"rank {rank}: the error is {error:.2f}, and {best:.2f} is possible"
    print("check 2: right")


# %% [markdown]
# ## Solutions

# %% tags=["solution", "hide-input"]
def lora_count(model, rank, targets):
    endings = tuple(f".{target}" for target in targets)
    layers = [module for name, module in model.named_modules() if f".{name}".endswith(endings)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def shrink(A, B, rank):
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


print()
check_1(lora_count)
check_2(shrink)
