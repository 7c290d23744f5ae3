"""How much does a fine-tuned model forget? Several methods learn one subject, and are measured every few updates.

CLIP's image tower (judge.py) gives two numbers: how like the subject the drawings of its prompt are, and how far the drawings
of other prompts, the probes, have moved from the base's. The training loop writes both into metrics.jsonl, as it writes the
validation loss, so that a run that was stopped goes on with the numbers that it has.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from minidiff.draw.device import chosen_device
from minidiff.draw.images import contact_sheet, load_image
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.prompting import literal
from minidiff.files.atomic import write_bytes
from minidiff.files.folder import local_folder
from minidiff.pocket.judge import ImageTower, drawings, forgetting_score, subject_score
from minidiff.pocket.settings import ForgettingSettings
from minidiff.trainer.dataset import read_folder
from minidiff.trainer.plot import STYLE, read_metrics, save_figure
from minidiff.trainer.recipes import RECIPES
from minidiff.trainer.run import fit
from minidiff.trainer.settings import DreamBoothSettings, FineTuneSettings, FullSettings, LoRASettings
from minidiff.trainer.sheets import without_dropout
from minidiff.trainer.task import Job

# What differs between the methods, in numbers that suit the pocket model; lesson 13 explains them. A pale curve rehearses.
PRIOR = {"with_prior_preservation": True, "prior_from_base": True}
LAYERS = {"lora_targets": ("attention", "resnets", "samplers")}
METHODS: dict[str, tuple[str, str, type[FineTuneSettings], dict[str, Any]]] = {  # name -> label, colour, settings
    "full": ("full", "#1d4f8f", FullSettings, {"learning_rate": 1e-4}),
    "dreambooth": ("DreamBooth", "#8fb0d6", DreamBoothSettings, {"learning_rate": 1e-4, "prior_loss_weight": 0.3}),
    "lora": ("LoRA", "#b3541e", LoRASettings, {"learning_rate": 1e-3, "rank": 8}),
    "lora-prior": ("LoRA with prior", "#e0a77f", LoRASettings, {"learning_rate": 1e-3, "rank": 8, **PRIOR}),
    "dora": ("DoRA", "#7a2e6b", LoRASettings, {"learning_rate": 1e-3, "rank": 8, "use_dora": True}),
    "locon": ("LoRA, convolutions too", "#2e7d75", LoRASettings, {"learning_rate": 1e-3, "rank": 8, **LAYERS}),
}


def compare(s: ForgettingSettings) -> None:
    """Train and measure each method; after each one write forgetting.md and forgetting.png. MinidiffError for bad input."""
    home, curves = Path(s.output_dir), dict[str, list[dict[str, Any]]]()
    runs = {method: settings_of(s, method) for method in s.methods}
    for settings in runs.values():
        settings.check()  # of all, before the first is trained
    ruler = Ruler(s)
    for method, settings in runs.items():
        print(f"== {METHODS[method][0]}", file=sys.stderr)
        if not fit(ruler.measuring(RECIPES[type(settings)](settings)), settings).finished:
            raise KeyboardInterrupt  # asked to stop: half a curve has no place beside whole ones
        curves[method] = [row for row in read_metrics(home / method) if "forgetting" in row]
        write_bytes(home / "forgetting.md", as_table(curves).encode())
        draw_curves(curves, home / "forgetting.png")
    print(f"{as_table(curves)}\n{home}: forgetting.md, forgetting.png, and in a folder for each method samples/ and the result")


def settings_of(s: ForgettingSettings, method: str) -> FineTuneSettings:
    """The settings of one training run, as `minidiff train` would have them."""
    home, (_, _, kind, own) = Path(s.output_dir), METHODS[method]
    names = "pretrained_model_name_or_path instance_data_dir instance_prompt max_train_steps".split()
    values = own | {name: getattr(s, name) for name in names} | {"validation_inference_steps": s.num_inference_steps}
    if kind is DreamBoothSettings or "prior_from_base" in own:
        values["class_prompt"] = s.class_prompt
    if kind is DreamBoothSettings:
        values |= {"class_data_dir": str(home / "class"), "num_class_images": s.num_class_images}
    values |= {"checkpointing_steps": s.every, "checkpoints_total_limit": 1, "validation_steps": s.every}
    return kind(output_dir=str(home / method), resume_from_checkpoint="latest", validation_share=0.0, **values)


class Ruler:
    """Measures every model by the same prompts and seeds, so that only the model differs."""

    def __init__(self, s: ForgettingSettings) -> None:
        self.s, self.prompts = s, [literal(s.instance_prompt), *s.probes]
        self.tower = ImageTower(local_folder(s.pretrained_model_name_or_path) / "image_encoder")
        examples = read_folder(Path(s.instance_data_dir), s.instance_prompt)
        self.real = self.tower.embed([load_image(example.path) for example in examples])  # (M, D)
        self.pipe = StableDiffusionPipeline.from_pretrained(s.pretrained_model_name_or_path).to(chosen_device(None))
        self.base = self.drawn()
        self.seen = self.tower.embed(self.base)  # (N, D)

    def drawn(self) -> list[Image.Image]:
        """The subject's pictures, then the probes', each from every seed."""
        with without_dropout(self.pipe):
            return drawings(self.pipe, self.prompts, range(self.s.num_images_per_prompt), self.s.num_inference_steps)

    def scores(self, images: list[Image.Image]) -> dict[str, float]:
        count, seen = self.s.num_images_per_prompt, self.tower.embed(images)
        forgotten = forgetting_score(seen[count:], self.seen[count:])
        return {"subject": subject_score(seen[:count], self.real), "forgetting": forgotten}

    def measuring(self, job: Job) -> Job:
        """The job with the two numbers beside its validation loss, and sheets of the probes."""
        self.pipe.unet = cast(Any, job.modules["unet"])  # the only network that these methods train
        latest: list[Image.Image] = []

        def validate() -> dict[str, float]:
            latest[:] = self.drawn()
            return (job.validate() if job.validate else {}) | self.scores(latest)

        def sheet(done: int) -> Image.Image:
            rows, each = (self.base, latest or self.drawn()), self.s.num_images_per_prompt
            columns = [f"{prompt}, seed {seed}" for prompt in self.prompts for seed in range(each)]
            return contact_sheet(rows, ["the base", f"step {done}"], columns, tile=160)

        names = ("probes", "num_images_per_prompt", "num_inference_steps")  # other ones would measure something else
        facts = job.facts | {name: getattr(self.s, name) for name in names}
        return replace(job, validate=validate, preview=sheet, facts=facts)


def as_table(curves: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| method | step | subject | forgetting |", "|---|---:|---:|---:|"]
    for method, rows in curves.items():
        lines += [f"| {METHODS[method][0]} | {r['step']} | {r['subject']:.3f} | {abs(r['forgetting']):.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


def draw_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Two panels over the updates: what is learnt, and what is forgotten."""
    from matplotlib import rc_context  # only now: it takes long to import
    from matplotlib.figure import Figure

    panels = {"subject": "Subject: likeness to the pictures", "forgetting": "Forgetting: how far the probes moved"}
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, 2), panels.items()):
            for method, rows in curves.items():
                label, colour, *_ = METHODS[method]
                steps, values = [row["step"] for row in rows], [row[key] for row in rows]
                axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=5, label=label)
            axes.set_title(title, loc="left")
            ticks = sorted({row["step"] for rows in curves.values() for row in rows})
            axes.set(xlabel="updates", xticks=ticks[:: 1 + len(ticks) // 9])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(curves))
        save_figure(figure, path)
