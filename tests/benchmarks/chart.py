"""The ratios of a run as bars, in the colours of minidiff's sheets."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.report import OURS, UNITS, Row
from minidiff.draw.images import HAIRLINE, INK, PAPER, save_png

QUICKER, SLOWER, FAINT = "#1d4f8f", "#b3541e", "#6d7079"
FLOORS = ("torch alone", "Python alone")  # in the table only: nobody can need less


def draw(rows: Sequence[Row], path: Path | str, title: str, subtitle: str = "") -> None:
    """A bar for each contender: how many times minidiff's time, or memory, it needs, on a logarithmic axis.

    To the right of 1 (blue) minidiff needs less, to the left (brown) more; the whisker is the 95 % interval.
    """
    from matplotlib.figure import Figure

    lines = layout(rows)
    depth = lines[-1][0] + 1 if lines else 1
    height = 0.25 * depth + 1.6
    figure = Figure(figsize=(10, height), dpi=130, facecolor=PAPER)
    axes = figure.add_axes((0.42, 0.55 / height, 0.5, 1 - 1.5 / height), facecolor=PAPER)
    for place, line in lines:
        if isinstance(line, str):
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}  # over the grid's lines
            at = {"transform": axes.get_yaxis_transform(), "va": "center", "bbox": box}
            axes.text(-0.77, place, line, color=INK, weight="bold", size=9, **at)
        else:
            bar(axes, place, line)
    limits(axes, [line for _, line in lines if isinstance(line, Row)])
    axes.set_ylim(depth - 0.4, -0.6)
    figure.text(0.035, 1 - 0.35 / height, title, color=INK, size=13, weight="bold", va="center")
    figure.text(0.035, 1 - 0.65 / height, subtitle, color=FAINT, size=8, va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAPER)
    save_png(Image.open(buffer).convert("RGB"), path)


def layout(rows: Sequence[Row]) -> list[tuple[float, str | Row]]:
    """What stands at which height, from top to bottom: each piece of work with minidiff's own number, then its contenders."""
    lines: list[tuple[float, str | Row]] = []
    place = -1.0
    for group, work in dict.fromkeys((row.group, row.work) for row in rows):
        same = [row for row in rows if (row.group, row.work) == (group, work)]
        others = [row for row in same if row.ratio and row.contender not in (OURS, *FLOORS)]
        if not others:
            continue
        own = next(row for row in same if row.contender == OURS)
        for line in (f"{group}: {work}   {amount(own)}", *others):
            place += 1.4 if isinstance(line, str) and lines else 1.0
            lines.append((place, line))
    return lines


def amount(row: Row) -> str:
    """Such as "12.3 ms"."""
    factor, unit = UNITS[row.unit]
    return f"{row.value * factor:,.3g} {unit}" if row.value * factor < 1000 else f"{row.value * factor:,.0f} {unit}"


def bar(axes: "object", place: float, row: Row) -> None:
    import matplotlib.axes

    assert isinstance(axes, matplotlib.axes.Axes) and row.ratio
    colour = QUICKER if row.ratio >= 1 else SLOWER
    axes.barh(place, row.ratio - 1, left=1, height=0.62, color=colour)
    if row.low and row.high:
        axes.plot([row.low, row.high], [place, place], color=INK, linewidth=1)
    axes.text(-0.02, place, row.contender, transform=axes.get_yaxis_transform(), va="center", ha="right", color=INK, size=8)
    axes.text(1.02, place, f"{row.ratio:.2f}×", transform=axes.get_yaxis_transform(), va="center", color=INK, size=8)


def limits(axes: "object", rows: Sequence[Row]) -> None:
    """From a half to two at least, in powers of two."""
    import matplotlib.axes

    assert isinstance(axes, matplotlib.axes.Axes)
    ratios = [x for row in rows for x in (row.ratio, row.low, row.high) if x]
    low, high = math.floor(math.log2(min([0.5, *ratios]))), math.ceil(math.log2(max([2.0, *ratios])))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0**low, 2.0**high)
    axes.set_xticks([2.0**power for power in range(low, high + 1)])
    axes.set_xticklabels([f"{2.0**power:g}×" for power in range(low, high + 1)], color=INK, size=8)
    axes.minorticks_off()
    axes.set_yticks([])
    axes.grid(axis="x", color=HAIRLINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axvline(1, color=INK, linewidth=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
