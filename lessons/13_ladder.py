# %% [markdown]
# # Lesson 13: Which rung?
#
# There are many ways to teach a model five pictures of a dog. They differ in what moves: every weight, a small
# change beside the weights, or one new word. Here you train all of them, on the same dog, and measure what each
# one costs and what it does.
#
# ```
#   what moves              numbers that are trained         what comes out
#
#   every weight            10,860,676  ################     a model folder      full, DreamBooth
#   W + B A                    143,360  #                    one small file      LoRA, DoRA
#   one word                       512                       a few kilobytes     textual inversion
# ```
#
# `minidiff ladder` runs this file too. Its flags choose the model, the pictures, the rungs and the folder.
#
# Time: a quarter of an hour on two cores, because eight models are trained. A rung that is finished is only
# measured the next time. Needs: lesson 11.

# %% tags=["setup"]
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from minidiff import StableDiffusionPipeline
from minidiff.core.errors import SettingsError, WeightsError, did_you_mean
from minidiff.draw.images import HAIRLINE, INK, PAPER, contact_sheet, load_image, save_png
from minidiff.files.folder import local_folder
from minidiff.files.lora_file import FILE_NAME as LORA_FILE
from minidiff.files.word_file import FILE_NAME as WORD_FILE
from minidiff.pocket import judge
from minidiff.pocket.judge import ImageTower, forgetting_score, subject_score
from minidiff.trainer.dataset import read_folder
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit, read_metrics
from minidiff.trainer.settings import (
    DreamBoothSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
)

LESSONS = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()  # a notebook has no __file__
ROOT = LESSONS.parent
FIGURES = Path("outputs") / "lessons" / "13_ladder"
BLUE, PALE, RUST = "#1d4f8f", "#8fb0d6", "#b3541e"
FLAGS = {  # the defaults; `minidiff ladder` puts its own in their place
    "pretrained_model_name_or_path": str(ROOT / "checkpoints" / "pocket"),
    "instance_data_dir": str(LESSONS / "data" / "dog"),
    "output_dir": "outputs/ladder",
    "rungs": (),
    "quick": False,  # two updates and rough pictures: to try the file itself
} | globals().get("FLAGS", {})
BASE, HOME, QUICK = FLAGS["pretrained_model_name_or_path"], Path(FLAGS["output_dir"]), FLAGS["quick"]


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
# ## A ruler
#
# **How good is a rung?** The training loss does not say: it is the loss on five pictures, and a model that has
# forgotten everything else can have the lowest one. We draw pictures, and look at them with CLIP's image tower. It
# turns a picture into a point on a sphere, where pictures of like things lie close together. From the same prompts
# and seeds we measure two numbers:
#
# - **subject**: do pictures of "a sks dog" show *this* dog? CLIP-I of DreamBooth (arXiv 2208.12242, section 5.2):
#   the mean cosine similarity of all pairs (drawn picture, training picture).
# - **forgetting**: did pictures *without* the dog change? 1 − the mean cosine similarity to what the base draws
#   from the same prompt and seed. 0: nothing was forgotten.
#
# **Shapes.** N pictures -> (N, 3, side, side) -> the tower -> (N, D), rows of length 1.

# %%
SUBJECT = [f"a photo of a sks dog{where}" for where in ("", " in the snow", " in the city", " on the moon")]
OTHERS = [
    "a photo of a red car on the beach",
    "a photo of a brown dog in the snow",
    "a drawing of a blue cat in a room",
    "a watercolor of a green house in a meadow",
]
SEEDS = [0] if QUICK else [0, 1]
STEPS = 2 if QUICK else 25

tower = ImageTower(local_folder(BASE) / "image_encoder")
dog = [load_image(example.path) for example in read_folder(Path(FLAGS["instance_data_dir"]), SUBJECT[0])]
real = tower.embed(dog)
print(f"{len(dog)} pictures of the dog -> {tuple(real.shape)}, each row of length {real.norm(dim=-1).mean():.3f}")

# %% [markdown]
# **Naive code.** Two loops and a dot product. The library's `subject_score` is one matrix product.


# %%
def naive_subject(drawn, real):
    pairs = [sum(x * y for x, y in zip(a.tolist(), b.tolist())) for a in drawn for b in real]
    return sum(pairs) / len(pairs)


same = naive_subject(real, real)
assert abs(same - subject_score(real, real)) < 1e-5
print(f"the training pictures with themselves: {same:.3f}; no drawing should be above that")


# %% [markdown]
# The same prompts and seeds for every model, so that only the model differs. A new word has a name of its own, so
# each rung says how it calls the dog.


# %%
def all_drawings(pipe, called):
    """SUBJECT's pictures, then OTHERS', each from every seed."""
    return judge.drawings(pipe, [prompt.replace(SUBJECT[0], called) for prompt in SUBJECT] + OTHERS, SEEDS, STEPS)

# %% [markdown]
# ## The rungs
#
# From the heaviest to the lightest. Read what differs: that is the whole difference between the methods. The
# numbers suit the pocket model, whose training was a hundred times shorter than that of Stable Diffusion 1.5.
#
# | rung | answers which failure of the rung before |
# |---|---|
# | full | – |
# | DreamBooth | full forgets other dogs: half of each batch now rehearses "a dog" |
# | LoRA | both move ten million weights: now W stays, and B A learns |
# | LoRA with prior | even a LoRA forgets a little: it rehearses too, from what the base itself predicts |
# | DoRA | a LoRA cannot change length and direction apart |
# | LoRA, convolutions too | attention alone cannot learn a new shape well |
# | textual inversion | nothing at all may be forgotten: only a new word moves |
# | pivotal | a word alone cannot learn what the model cannot draw: a word and a LoRA |


# %%
def rung(kind, folder, updates, rate, **others):
    """The settings of one training run, as `minidiff train` would have them."""
    return kind(
        pretrained_model_name_or_path=BASE,
        instance_data_dir=FLAGS["instance_data_dir"],
        output_dir=str(HOME / folder),
        resume_from_checkpoint="latest",
        max_train_steps=2 if QUICK else updates,
        checkpointing_steps=2 if QUICK else updates,
        validation_steps=0,
        learning_rate=rate,
        **others,
    )


sks = {"instance_prompt": SUBJECT[0]}
rehearsal = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}
drawn = {"num_class_images": 2 if QUICK else 40, "class_data_dir": str(HOME / "class-dog"), "prior_loss_weight": 0.3}
everywhere = {"lora_targets": ("attention", "resnets", "samplers")}
word = {"placeholder_token": "<my-dog>", "initializer_token": "dog"}
rungs = {
    "full": rung(FullSettings, "full", 200, 1e-4, **sks),
    "DreamBooth": rung(DreamBoothSettings, "dreambooth", 480, 2e-4, **sks, **rehearsal, **drawn),
    "LoRA": rung(LoRASettings, "lora", 300, 1e-3, **sks, rank=8),
    "LoRA with prior": rung(LoRASettings, "lora-prior", 300, 1e-3, **sks, **rehearsal, prior_from_base=True, rank=8),
    "DoRA": rung(LoRASettings, "dora", 300, 1e-3, **sks, rank=8, use_dora=True),
    "LoRA, convolutions too": rung(LoRASettings, "locon", 300, 1e-3, **sks, rank=8, **everywhere),
    "textual inversion": rung(TextualInversionSettings, "textual-inversion", 300, 5e-2, **word, num_vectors=4),
    "pivotal": rung(
        PivotalSettings, "pivotal", 300, 1e-3, **word, num_vectors=2, learning_rate_embedding=1e-2, rank=8
    ),
}
for name in FLAGS["rungs"]:
    if name not in rungs:
        raise SettingsError(f'--rungs "{name}": there are {", ".join(rungs)}.{did_you_mean(name, rungs)}')
chosen = {name: rungs[name] for name in FLAGS["rungs"] or rungs}


# %% [markdown]
# ## The climb
#
# Train, load the result, draw, measure. A result is a whole model, or a LoRA, or a word, or the last two together.


# %%
def load_result(settings):
    """The base with what a finished run made of it; or the whole model that it wrote."""
    home = Path(settings.output_dir)
    whole, lora, word = ((home / name).is_file() for name in ("model_index.json", LORA_FILE, WORD_FILE))
    if not (whole or lora or word):
        raise WeightsError(f"{home} holds no result of a training run; remove the folder, and climb again.")
    pipe = StableDiffusionPipeline.from_pretrained(home if whole else BASE)
    if lora:
        pipe.load_lora_weights(home)
    if word:
        pipe.load_textual_inversion(home)
    return pipe


def megabytes(home):
    """All weight files of the result, without the checkpoints."""
    files = [p for p in home.rglob("*.safetensors") if not p.relative_to(home).parts[0].startswith(("checkpoint-", "."))]
    return sum(path.stat().st_size for path in files) / 1e6


def table_row(name, images, trained=0, size=0.0, seconds=0.0):
    """One row of the table."""
    count, seen = len(SUBJECT) * len(SEEDS), tower.embed(images)
    forgotten = forgetting_score(seen[count:], tower.embed(base_images[count:]))
    scores = {"subject": subject_score(seen[:count], real), "forgetting": forgotten}
    return {"rung": name, "trained": trained, "megabytes": size, "seconds": seconds, **scores}


base_images = all_drawings(StableDiffusionPipeline.from_pretrained(BASE), SUBJECT[0])
show(contact_sheet([base_images[:: len(SEEDS)]], ["the base"], [*SUBJECT, *OTHERS], tile=160), "1_base")
rows, sheet = [table_row("the base", base_images)], [base_images]
for name, settings in chosen.items():
    print(f"== {name}", file=sys.stderr)
    job = RECIPES[type(settings)](settings)
    if not fit(job, settings).finished:
        raise KeyboardInterrupt  # asked to stop: a half-trained rung has no place in the table
    home = Path(settings.output_dir)
    called = settings.instance_prompt or f"a photo of {settings.placeholder_token}"
    images = all_drawings(load_result(settings), called)
    trained = sum(p.numel() for p in job.trainable.values())
    seconds = sum(row.get("seconds") or 0.0 for row in read_metrics(home))  # of all updates
    rows.append(table_row(name, images, trained, megabytes(home), seconds))
    sheet.append(images)

# %%
lines = ["| rung | trainable parameters | file, MB | seconds | subject | forgetting |", "|---|---:|---:|---:|---:|---:|"]
formats = {"rung": "", "trained": ",", "megabytes": ".2f", "seconds": ".0f", "subject": ".3f", "forgetting": ".3f"}
lines += ["| " + " | ".join(format(r[key], form) for key, form in formats.items()) + " |" for r in rows]
(HOME / "ladder.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
print("\n".join(lines))
ladder = contact_sheet([images[:: len(SEEDS)] for images in sheet], [r["rung"] for r in rows], [*SUBJECT, *OTHERS], tile=160)
save_png(ladder, HOME / "ladder.png")
show(ladder, "2_ladder")

# %% [markdown]
# **Experiment: what does subject cost?** Right is good, low is good: in the corner at the lower right is a model
# that draws the dog and has forgotten nothing.

# %%
figure = Figure(figsize=(9, 5))
axes = figure.subplots()
for r in rows:
    axes.scatter(r["subject"], r["forgetting"], s=60, color=RUST if r["rung"] == "the base" else BLUE, zorder=3)
    axes.annotate(r["rung"], (r["subject"], r["forgetting"]), (6, 6), textcoords="offset points", color=INK, fontsize=9)
axes.set(xlabel="subject: similarity to the five pictures", ylabel="forgetting", title="What each rung learns and forgets")
axes.margins(0.15)
show(figure, "3_subject_and_forgetting")

# %%
figure = Figure(figsize=(9, 4))
titles = {"trained": "numbers that are trained", "seconds": "seconds of training"}
for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
    axes.barh([r["rung"] for r in rows[1:]], [r[key] for r in rows[1:]], color=PALE)
    axes.set_title(title)
figure.axes[0].set_xscale("log")
figure.axes[0].invert_yaxis()  # the heaviest at the top
show(figure, "4_cost")

# %% [markdown]
# Read the table before you go on. In our run the two rungs that learned the dog best without a prior, full fine-tuning
# and LoRA with convolutions, also forgot most. DreamBooth learned nearly as well, and its prior left a quarter of the
# forgetting. The word forgot nothing, because nothing but its vectors moved, and it had 512 numbers to do it with.
#
# **Honest limits.** One dog, one learning rate for each rung, two seeds: a difference of 0.05 is noise. The judge is
# the pocket's own image tower; a look at the sheet is still the better judge.
#
# **What breaks if** you judge by the loss? The rung with the lowest loss may draw the dog everywhere, also where you
# asked for a cat. Look at the right half of the sheet: that is where forgetting shows.

# %% [markdown]
# ## Exercises
#
# **1.** Write `forgot(tuned, base)`: both are (N, D) with rows of length 1. Return 1 − the mean cosine similarity of
# row i of one and row i of the other, as a number.


# %% tags=["check"]
def check_1(forgot):
    rows = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert forgot(rows, rows) is not None, "it returns nothing"
    assert abs(float(forgot(rows, rows))) < 1e-5, "of a model that has not changed it must be 0"
    other = rows.roll(1, 0)
    want = 1 - sum(float(a @ b) for a, b in zip(other, rows)) / 6
    got = float(forgot(other, rows))
    assert abs(got - want) < 1e-5, f"of other pictures it is {got:.3f}, not {want:.3f}: compare row i with row i alone"
    print("check 1: right")


# %% [markdown]
# **2.** Write `choose(rows, most_megabytes, most_forgetting)`: the name of the rung with the highest subject among
# those that keep both limits; `None` if there is none.


# %% tags=["check"]
def check_2(choose):
    keys = ("rung", "megabytes", "subject", "forgetting")
    table = [("full", 58.7, 0.56, 0.115), ("LoRA", 0.6, 0.48, 0.079), ("word", 0.0, 0.51, 0.0), ("pivotal", 0.6, 0.58, 0.081)]
    rows = [dict(zip(keys, row)) for row in table]
    limits = {(100, 1): "pivotal", (100, 0.08): "word", (0, 1): "word", (0.6, 0.081): "pivotal", (-1, 1): None}
    for (most, forgetting), want in limits.items():
        got = choose(rows, most, forgetting)
        assert got == want, f"at most {most} MB and {forgetting} forgotten: that is {want}, not {got}"
    heavy = [{"rung": "full", "megabytes": 58.7, "subject": 0.9, "forgetting": 0.1}, rows[1]]
    assert choose(heavy, 1, 1) == "LoRA", "the file of full is above the limit"
    print("check 2: right")


# %% [markdown]
# ## Solutions

# %% tags=["solution", "hide-input"]
def forgot(tuned, base):
    return 1 - (tuned * base).sum(dim=-1).mean().item()


def choose(rows, most_megabytes, most_forgetting):
    good = [row for row in rows if row["megabytes"] <= most_megabytes and row["forgetting"] <= most_forgetting]
    return max(good, key=lambda row: row["subject"])["rung"] if good else None


print()
check_1(forgot)
check_2(choose)
