"""A training run as a picture: the losses of each step and of validation, how far the weights moved, the learning rate."""

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
from minidiff.draw.images import HAIRLINE, PAPER, save_png


def loss_curve(metrics: Path | str | Iterable[Mapping[str, float | None]], path: Path | str) -> None:
    """Draw `metrics` into a PNG: a metrics.jsonl, or records with `step`, and perhaps `loss`, `lr`, `moved`, validation losses.

    Pale: each step. Dark: the mean over a few hundredths of the run on either side. Dotted: what validation measured, which
    says more. Below: how far the weights have moved, and the learning rate.
    """
    from matplotlib.figure import Figure  # heavy, and nothing else here wants it

    records = _read_metrics(Path(metrics)) if isinstance(metrics, (str, Path)) else list(metrics)
    by_step = {int(record["step"] or 0): record for record in records}  # a resumed run repeats steps: the last one counts
    if not by_step:
        raise DataError(f"{metrics}: no steps in it yet, so there is no curve to draw.")
    steps = sorted(by_step)
    columns = {name: _column(by_step, name) for name in sorted({name for record in records for name in record})}
    losses = columns.get("loss", np.full(len(steps), math.nan))
    smooth = smoothed(losses, sigma=max(1.0, len(steps) / 60))
    measured = [name for name in columns if name not in KNOWN_COLUMNS]
    below = [name for name in ("moved", "lr") if name in columns]
    figure = Figure(figsize=(8, 4 + 0.75 * len(below)), dpi=150, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1 + len(below), 1, sharex=True, height_ratios=(4, *[1] * len(below)), squeeze=False)[:, 0]
    dots = "." if len(steps) < 30 else ""
    panels[0].plot(steps, losses, color="#8fb0d6", linewidth=0.8, alpha=0.7, marker=dots, label="each step")
    panels[0].plot(steps, smooth, color="#1d4f8f", linewidth=2, label="smoothed")
    for name, colour in zip(measured, VALIDATION_COLOURS * len(measured)):
        label = re.sub(r"_(\d+)_(\d+)$", r", t \1–\2", name)  # val_loss_0_250: at timesteps 0 to 250
        _plot(panels[0], steps, columns[name], colour, label.replace("_", " "))
    for name, axes in zip(below, panels[1:]):
        _plot(axes, steps, columns[name], "#b3541e" if name == "lr" else "#4d7a3a", marker=dots if name == "lr" else ".")
        axes.set_ylabel("learning rate" if name == "lr" else name)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    tops = [np.nanmax(c) for c in (smooth, *(columns[name] for name in measured)) if np.isfinite(c).any()]
    tops += [np.percentile(losses[np.isfinite(losses)], 99.5)] if np.isfinite(losses).any() else []
    if tops and max(tops) > 0:
        panels[0].set_ylim(0, 1.05 * max(tops))  # a lone spike runs off the top
    panels[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)  # above, where no line runs
    panels[0].set_ylabel("loss")
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.set_facecolor(PAPER)
        axes.margins(x=0.01)
        axes.grid(axis="y", color=HAIRLINE, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.2)
    save_png(Image.open(buffer).convert("RGB"), path)


KNOWN_COLUMNS = {"step", "loss", "lr", "grad_norm", "seconds", "moved"}  # of metrics.jsonl; all others are validation losses
VALIDATION_COLOURS = ["#7a2e6b", "#c78a1c", "#2e7d75", "#a33b3b", "#5a5a9c"]


def _column(by_step: Mapping[int, Mapping[str, float | None]], name: str) -> np.ndarray:
    """One value for each step; NaN where it was not measured or is not a number."""
    return np.array([by_step[step].get(name) for step in sorted(by_step)], dtype=np.float64)


def _plot(axes: Any, steps: list[int], values: np.ndarray, colour: str, label: str | None = None, marker: str = ".") -> None:
    """A line through what is known, across the steps at which nothing was measured."""
    known = np.isfinite(values)
    axes.plot(np.array(steps)[known], values[known], color=colour, linewidth=1.5, marker=marker, label=label)


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian mean around each value, so without the lag of a running mean; skips what is not finite."""
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
