# %% [markdown]
# # Lesson 14: When does a model forget?
#
# Lesson 13 measured each method once, at its end. But learning and forgetting have their own speeds: a method that
# forgets much at its end may have known the dog long before. Here you measure while it trains, and draw two curves.
#
# ```
#   update     0 ---- 50 ---- 100 ---- 150 ---- 200
#              |      |        |        |        |
#           measure  measure  measure  measure  measure:   the same prompts, the same seeds
#              |
#              +-- "a photo of a sks dog"   how like the five pictures?    subject
#              +-- four probes              how far from the base's?       forgetting
# ```
#
# `minidiff forgetting` runs this file too. Its flags choose the model, the pictures, the methods and the probes.
#
# Time: a quarter of an hour on two cores, because four models are trained and measured five times each. What is
# trained and measured stays: the next time takes a minute. Needs: lesson 13.

# %% tags=["setup"]
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from minidiff.draw.device import chosen_device
from minidiff.draw.images import HAIRLINE, PAPER, contact_sheet, load_image
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.prompting import literal
from minidiff.files.atomic import write_bytes
from minidiff.files.folder import local_folder
from minidiff.pocket import judge
from minidiff.pocket.judge import ImageTower, forgetting_score, subject_score
from minidiff.pocket.settings import ForgettingSettings
from minidiff.trainer.dataset import read_folder
from minidiff.trainer.plot import STYLE, save_figure
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit, read_metrics
from minidiff.trainer.settings import DreamBoothSettings, FullSettings, LoRASettings
from minidiff.trainer.validation import without_dropout

FIGURES = Path("outputs") / "lessons" / "14_forgetting"
FLAGS = ForgettingSettings(**globals().get("FLAGS", {}))  # the defaults, or what `minidiff forgetting` was given
HOME, EACH = Path(FLAGS.output_dir), FLAGS.num_images_per_prompt


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
# ## The methods
#
# What differs between them, in numbers that suit the pocket model; lesson 13 explains them. Two rehearse "a photo of
# a dog": DreamBooth from pictures that the base drew, the LoRA from what the base itself predicts. A rehearsing
# method's curve is pale.

# %%
prior = {"with_prior_preservation": True, "prior_from_base": True}
layers = {"lora_targets": ("attention", "resnets", "samplers")}
methods = {  # name -> label, colour, kind of settings, what is its own
    "full": ("full", "#1d4f8f", FullSettings, {"learning_rate": 1e-4}),
    "dreambooth": ("DreamBooth", "#8fb0d6", DreamBoothSettings, {"learning_rate": 1e-4, "prior_loss_weight": 0.3}),
    "lora": ("LoRA", "#b3541e", LoRASettings, {"learning_rate": 1e-3, "rank": 8}),
    "lora-prior": ("LoRA with prior", "#e0a77f", LoRASettings, {"learning_rate": 1e-3, "rank": 8, **prior}),
    "dora": ("DoRA", "#7a2e6b", LoRASettings, {"learning_rate": 1e-3, "rank": 8, "use_dora": True}),
    "locon": ("LoRA, convolutions too", "#2e7d75", LoRASettings, {"learning_rate": 1e-3, "rank": 8, **layers}),
}


def training_of(method):
    """The settings of one training run, as `minidiff train` would have them."""
    _, _, kind, own = methods[method]
    if kind is DreamBoothSettings:
        own = own | {"class_data_dir": str(HOME / "class"), "num_class_images": FLAGS.num_class_images}
    if kind is DreamBoothSettings or "prior_from_base" in own:
        own = own | {"class_prompt": FLAGS.class_prompt}
    return kind(
        pretrained_model_name_or_path=FLAGS.pretrained_model_name_or_path,
        instance_data_dir=FLAGS.instance_data_dir,
        instance_prompt=FLAGS.instance_prompt,
        output_dir=str(HOME / method),
        resume_from_checkpoint="latest",
        max_train_steps=FLAGS.max_train_steps,
        checkpointing_steps=FLAGS.every,
        checkpoints_total_limit=1,
        validation_steps=FLAGS.every,
        validation_share=0.0,
        validation_inference_steps=FLAGS.num_inference_steps,
        **own,
    )


runs = {method: training_of(method) for method in FLAGS.methods}
for settings in runs.values():
    settings.check()  # of all, before the first is trained


# %% [markdown]
# ## The ruler
#
# **How far has a model moved?** The ruler is that of lesson 13, CLIP's image tower: a picture becomes a point on a
# sphere, and like pictures lie close together. The probes are prompts without the subject. The base draws them once;
# the model in training draws them again, from the same seeds:
#
#     forgetting = 1 - mean over i of cos(e_i, base_i)
#
# **Shapes.** N pictures -> (N, D), rows of length 1. Row i of both has the same prompt and the same seed.

# %%
prompts = [literal(FLAGS.instance_prompt), *FLAGS.probes]
tower = ImageTower(local_folder(FLAGS.pretrained_model_name_or_path) / "image_encoder")
examples = read_folder(Path(FLAGS.instance_data_dir), FLAGS.instance_prompt)
real = tower.embed([load_image(example.path) for example in examples])
pipe = StableDiffusionPipeline.from_pretrained(FLAGS.pretrained_model_name_or_path).to(chosen_device(None))


def drawings_now():
    """The subject's pictures, then the probes', each from every seed."""
    with without_dropout(pipe):
        return judge.drawings(pipe, prompts, range(EACH), FLAGS.num_inference_steps)


base_images = drawings_now()
base = tower.embed(base_images)


def scores(images):
    """The two numbers of the model that drew these."""
    e = tower.embed(images)
    return {"subject": subject_score(e[:EACH], real), "forgetting": forgetting_score(e[EACH:], base[EACH:])}


at_start = scores(base_images)
print(f"{len(prompts)} prompts, {EACH} seeds -> {tuple(base.shape)}")
print(f"the base: subject {at_start['subject']:.3f}, forgetting {abs(at_start['forgetting']):.3f}")

# %% [markdown]
# **Naive code.** One picture after the other. The probes' own order, turned by one, stands for a model that draws
# the wrong thing.


# %%
def naive_forgetting(tuned, base):
    return 1 - sum(sum(x * y for x, y in zip(a.tolist(), b.tolist())) for a, b in zip(tuned, base)) / len(base)


wrong = base.roll(1, 0)
assert abs(naive_forgetting(wrong, base) - forgetting_score(wrong, base)) < 1e-5
print(f"a model that draws another prompt's picture: forgetting {forgetting_score(wrong, base):.3f}")


# %% [markdown]
# ## Measure while it trains
#
# The training loop writes each validation loss into `metrics.jsonl`. A job is a dataclass: `replace` gives it another
# `validate`, whose numbers go into the same file. So a run that was stopped goes on with the numbers that it has.
# `facts` are what a resumed run must agree with: curves of other probes must not be mixed with these.


# %%
def measuring(job):
    """The job with the two numbers beside its validation loss, and sheets of the probes."""
    pipe.unet = job.modules["unet"]  # the only network that these methods train
    latest = []

    def validate():
        latest[:] = drawings_now()
        return job.validate() | scores(latest)

    def sheet(done):
        columns = [f"{prompt}, seed {seed}" for prompt in prompts for seed in range(EACH)]
        return contact_sheet([base_images, latest or drawings_now()], ["the base", f"step {done}"], columns, tile=160)

    names = ("probes", "num_images_per_prompt", "num_inference_steps")
    facts = {name: getattr(FLAGS, name) for name in names}
    return replace(job, validate=validate, preview=sheet, facts=job.facts | facts)


def table_of(curves):
    lines = ["| method | step | subject | forgetting |", "|---|---:|---:|---:|"]
    for method, rows in curves.items():
        lines += [f"| {methods[method][0]} | {r['step']} | {r['subject']:.3f} | {abs(r['forgetting']):.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


def figure_of(curves):
    """Two panels over the updates: what is learnt, and what is forgotten."""
    panels = {"subject": "Subject: likeness to the pictures", "forgetting": "Forgetting: how far the probes moved"}
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items()):
        for method, rows in curves.items():
            label, colour, *_ = methods[method]
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=5, label=label)
        axes.set_title(title, loc="left")
        ticks = sorted({row["step"] for rows in curves.values() for row in rows})
        axes.set(xlabel="updates", xticks=ticks[:: 1 + len(ticks) // 9])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(curves))
    return figure


# %% [markdown]
# **Experiment: the curves.** The table and the figure are written after each method.

# %%
curves = {}
for method, settings in runs.items():
    print(f"== {methods[method][0]}", file=sys.stderr)
    if not fit(measuring(RECIPES[type(settings)](settings)), settings).finished:
        raise KeyboardInterrupt  # asked to stop: half a curve has no place beside whole ones
    curves[method] = [row for row in read_metrics(HOME / method) if "forgetting" in row]
    write_bytes(HOME / "forgetting.md", table_of(curves).encode())
    with rc_context(STYLE):
        figure = figure_of(curves)
        save_figure(figure, HOME / "forgetting.png")
print(f"{table_of(curves)}\n{HOME}: forgetting.md, forgetting.png, and in a folder for each method samples/ and the result")
show(figure, "1_curves")

# %% [markdown]
# **Experiment: what does subject cost?** The same numbers without the clock: each curve begins at the base and goes on
# to the right, where the dog is. Of two methods at the same x, the lower one is the better teacher.

# %%
figure = Figure(figsize=(9, 5))
axes = figure.subplots()
for method, rows in curves.items():
    label, colour, *_ = methods[method]
    subject, forgetting = ([row[key] for row in rows] for key in ("subject", "forgetting"))
    axes.plot(subject, forgetting, color=colour, linewidth=2, marker="o", markersize=5, label=label)
axes.set(xlabel="subject: likeness to the pictures", ylabel="forgetting", title="What each update buys, and its price")
axes.legend(frameon=False)
show(figure, "2_price")

# %% [markdown]
# Read the curves before you go on. In our run the full fine-tune knew the dog after 100 updates (subject 0.76). From
# there it only forgot: 0.12, then 0.15. DreamBooth needed 200 updates for the same subject, and had then forgotten a
# quarter of that, 0.04, nearly all of it in its first 50 updates, before it knew anything of the dog. So a prior costs
# time, and the first updates are the expensive ones. Where the subject is 0.5, the four have forgotten 0.09, 0.04, 0.05
# and 0.02.
#
# **Honest limits.** One dog, one learning rate for each method, two seeds: a difference of 0.05 is noise. The ruler is
# the pocket's own image tower. And it sees only what you ask for: if no probe showed a dog, no curve would tell that a
# model has forgotten other dogs.
#
# **What breaks if** you compare two methods after the same number of updates? The slower learner looks as if it
# forgot less. Compare them where they know the subject equally well: exercise 2.

# %% [markdown]
# ## Exercises
#
# A curve is a list of rows such as `{"step": 50, "subject": 0.31, "forgetting": 0.02}`, in the order of the steps.
#
# **1.** Write `stop_at(rows, most)`: the step with the highest subject among those whose forgetting is at most `most`;
# the earlier of two that are equal; `None` if there is none.


# %% tags=["check"]
def check_1(stop_at):
    keys = ("step", "subject", "forgetting")
    table = [(0, 0.1, 0.0), (50, 0.5, 0.05), (100, 0.6, 0.2), (150, 0.6, 0.1), (200, 0.6, 0.1), (250, 0.4, 0.02)]
    rows = [dict(zip(keys, row)) for row in table]
    for most, want in {0.01: 0, 0.05: 50, 0.1: 150, 1.0: 100, -1.0: None}.items():
        got = stop_at(rows, most)
        assert got == want, f"with at most {most} forgotten: stop at {want}, not at {got}"
    print("check 1: right")


# %% [markdown]
# **2.** Write `price(rows, subject)`: how much is forgotten where the curve first reaches this subject? Between two
# measurements take the straight line; `None` if the curve never gets there.


# %% tags=["check"]
def check_2(price):
    keys = ("step", "subject", "forgetting")
    rows = [dict(zip(keys, row)) for row in [(0, 0.2, 0.0), (50, 0.4, 0.1), (100, 0.3, 0.3), (150, 0.6, 0.6)]]
    for subject, want in {0.2: 0.0, 0.3: 0.05, 0.4: 0.1, 0.5: 0.5, 0.6: 0.6, 0.7: None}.items():
        got = price(rows, subject)
        if want is None:
            assert got is None, f"no row comes up to {subject}: there is no price, and not {got}"
        else:
            assert got is not None and abs(float(got) - want) < 1e-6, f"the price of {subject} is {want}, not {got}"
    print("check 2: right")


# %% [markdown]
# ## Solutions

# %% tags=["solution", "hide-input"]
def stop_at(rows, most):
    good = [row for row in rows if row["forgetting"] <= most]
    return max(good, key=lambda row: row["subject"])["step"] if good else None


def price(rows, subject):
    for a, b in zip([rows[0], *rows], rows):
        if b["subject"] >= subject:
            span = b["subject"] - a["subject"]  # 0: at the first row
            share = (subject - a["subject"]) / span if span else 0.0
            return a["forgetting"] + share * (b["forgetting"] - a["forgetting"])
    return None


print()
check_1(stop_at)
check_2(price)
