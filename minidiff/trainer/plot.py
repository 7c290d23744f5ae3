"""metrics.jsonl, and a picture of it: the loss of each step and of validation, and the learning rate."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from minidiff.draw.images import HAIRLINE, INK, PAPER, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
VALIDATION_COLOURS = ["#7a2e6b", "#c78a1c", "#2e7d75", "#a33b3b", "#5a5a9c"]
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": HAIRLINE, "font.size": 9, "axes.formatter.limits": (-2, 3)},
}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to a line that a killed process or a power cut left broken."""
    path, rows = folder / METRICS, []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def loss_curve(rows: Sequence[Mapping[str, float | None]], path: Path) -> None:
    """Draw rows of metrics.jsonl into a PNG: above the losses of training and of validation, below the learning rate.

    Pale: the loss of each step. Dark: its mean over a few hundredths of the run. Dotted: the validation losses, which say more.
    """
    from matplotlib import rc_context  # only now: it takes long to import
    from matplotlib.figure import Figure

    steps = np.array([row["step"] for row in rows])
    names = sorted({name for row in rows for name in row if "loss" in name} | {"loss", "lr"})
    columns = {name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in names}
    losses, dots = columns.pop("loss"), "." if len(steps) < 30 else ""
    smooth = smoothed(losses, sigma=max(1.0, len(steps) / 60))
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.75), dpi=150, layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
        above.plot(steps, losses, color="#8fb0d6", linewidth=0.8, alpha=0.7, marker=dots, label="each step")
        above.plot(steps, smooth, color="#1d4f8f", linewidth=2, label="smoothed")
        below.plot(steps, columns.pop("lr"), color="#b3541e", marker=dots)
        above.set_prop_cycle(color=VALIDATION_COLOURS)
        for name, column in columns.items():
            label = re.sub(r"_(\d+)_(\d+)$", r", t \1–\2", name).replace("_", " ")  # val_loss_0_250: at timesteps 0 to 250
            thin = 2.0 if name == "val_loss" else 0.8
            above.plot(steps[np.isfinite(column)], column[np.isfinite(column)], marker=".", linewidth=thin, label=label)
        shown = np.concatenate([smooth, *columns.values()])
        highest = shown.max(where=np.isfinite(shown), initial=1e-9)
        above.set(ylabel="loss", ylim=(0, 1.25 * highest))  # a single spike may be cut
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8)  # above the lines
        below.set(ylabel="learning rate", ylim=(0, None), xlabel="step")
        save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
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
