"""A training run as a picture: the loss of each step and of validation, and the learning rate."""

import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minidiff.core.errors import DataError
from minidiff.draw.images import HAIRLINE, INK, PAPER, save_png

NO_LOSS = {"step", "lr", "grad_norm", "seconds", "moved"}  # columns of metrics.jsonl; all others are losses
VALIDATION_COLOURS = ["#7a2e6b", "#c78a1c", "#2e7d75", "#a33b3b", "#5a5a9c"]
BELOW = {"lr": ("learning rate", "#b3541e")}  # column -> label and colour
STYLE: dict[Any, Any] = {
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": HAIRLINE, "axes.xmargin": 0.01, "font.size": 9},
    **{"legend.frameon": False, "axes.formatter.limits": (-2, 3)},
}


def loss_curve(metrics: Path | str | Iterable[Mapping[str, float | None]], path: Path | str) -> None:
    """Draw `metrics` into a PNG: a metrics.jsonl, or records with `step` and perhaps `loss`, `lr`, validation losses.

    Pale: each step. Dark: the mean over a few hundredths of the run on either side. Dotted: the validation losses, which say
    more. Below: the learning rate. DataError for a file that is no metrics.jsonl.
    """
    from matplotlib import rc_context  # only now: it takes long to import
    from matplotlib.figure import Figure

    records = _read_metrics(Path(metrics)) if isinstance(metrics, (str, Path)) else list(metrics)
    by_step = {int(record["step"] or 0): record for record in records}  # a resumed run repeats steps: the last one counts
    if not by_step:
        raise DataError(f"{metrics}: no steps in it yet, so there is no curve to draw.")
    steps = np.array(sorted(by_step))
    names = sorted({name for record in records for name in record})
    columns = {name: np.array([by_step[step].get(name) for step in steps], dtype=np.float64) for name in [*names, "loss"]}
    below = [name for name in BELOW if name in names]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4 + 0.75 * len(below)), dpi=150, layout="constrained")
        axes, *others = figure.subplots(1 + len(below), sharex=True, height_ratios=(4, *[1] * len(below)), squeeze=False)[:, 0]
        losses, dots = columns.pop("loss"), "." if len(steps) < 30 else ""
        smooth = smoothed(losses, sigma=max(1.0, len(steps) / 60))
        axes.plot(steps, losses, color="#8fb0d6", linewidth=0.8, alpha=0.7, marker=dots, label="each step")
        axes.plot(steps, smooth, color="#1d4f8f", linewidth=2, label="smoothed")
        measured = [name for name in columns if name not in NO_LOSS]
        for name, colour in zip(measured, VALIDATION_COLOURS * len(measured)):
            label = re.sub(r"_(\d+)_(\d+)$", r", t \1–\2", name).replace("_", " ")  # val_loss_0_250: at timesteps 0 to 250
            known = np.isfinite(columns[name])
            axes.plot(steps[known], columns[name][known], color=colour, marker=".", label=label)
        for name, panel in zip(below, others):
            known, (label, colour) = np.isfinite(columns[name]), BELOW[name]
            panel.plot(steps[known], columns[name][known], color=colour, marker=dots if name == "lr" else ".")
            panel.set(ylabel=label.replace(" ", "\n"), ylim=(0, None))
        finite = [column[np.isfinite(column)] for column in (smooth, *(columns[name] for name in measured), losses)]
        tops = [np.percentile(column, 99.5 if column is finite[-1] else 100) for column in finite if column.size]
        axes.set(ylabel="loss", ylim=(0, 1.05 * max(tops)) if max(tops, default=0) > 0 else None)  # a single spike may be cut
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5)  # above the lines
        [axes, *others][-1].set_xlabel("step")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.2)
    save_png(Image.open(buffer).convert("RGB"), path)


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian mean around each value, so without the delay of a running mean; values that are not finite are skipped."""
    half = min(math.ceil(3 * sigma), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    known = np.isfinite(values)
    weight = np.convolve(known, kernel, mode="same")
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values), math.nan), where=weight > 0)


def _read_metrics(path: Path) -> list[dict[str, float | None]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give the metrics.jsonl of a training run.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({"step": float(record["step"]), **{k: v if v is None else float(v) for k, v in record.items()}})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: not a record of a step ({error}). Remove the line.") from error
    return records
