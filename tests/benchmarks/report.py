"""What a run found: rows, the table that is printed, and the JSON on the last line."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Summary

OURS = "minidiff"
UNITS = {"s": (1e3, "ms"), "B": (2**-20, "MiB")}


@dataclass(frozen=True)
class Row:
    """One contender at one piece of work. `ratio`: its number over minidiff's, so above 1 minidiff needs less."""

    group: str
    work: str
    contender: str
    value: float  # the median, in `unit`
    unit: str  # s or B
    count: int
    ratio: float | None
    low: float | None = None
    high: float | None = None
    cpu_ratio: float | None = None  # the same of processor time, which neighbours on the machine disturb less
    error: float | None = None  # relative Frobenius distance to the reference, before anything was timed


def timed_rows(group: str, work: str, wall: dict[str, Summary], cpu: dict[str, Summary], errors: dict[str, float]) -> list[Row]:
    return [
        Row(group, work, name, s.median, "s", s.count, s.ratio, s.low, s.high, cpu[name].ratio, errors.get(name))
        for name, s in wall.items()
    ]


def counted_rows(group: str, work: str, numbers: dict[str, float]) -> list[Row]:
    """Bytes, which are counted once."""
    ours = numbers.get(OURS)
    return [Row(group, work, name, n, "B", 1, n / ours if ours else None) for name, n in numbers.items()]


def table(rows: Iterable[Row]) -> str:
    """As text, in columns: one block for each piece of work."""
    lines, before = [], None
    for row in rows:
        if (row.group, row.work) != before:
            lines += ["", f"{row.group}: {row.work}"]
            before = row.group, row.work
        factor, unit = UNITS[row.unit]
        ratio = "" if row.ratio is None or row.contender == OURS else f"{row.ratio:8.2f}x"
        interval = "" if row.low is None or not ratio else f"  [{row.low:.2f}, {row.high:.2f}]"
        cpu = "" if row.cpu_ratio is None or not ratio else f"  processor {row.cpu_ratio:.2f}x"
        lines.append(f"  {row.contender:<34}{row.value * factor:12.2f} {unit:<4}n {row.count:<4}{ratio}{interval}{cpu}")
    return "\n".join(lines)


def last_line(rows: Sequence[Row], machine: dict[str, Any], notes: Sequence[str], failed: Sequence[str]) -> str:
    """All of it in one line of JSON."""
    found = {"machine": machine, "rows": [rounded(asdict(row)) for row in rows], "notes": list(notes), "failed": list(failed)}
    return json.dumps(found)


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Six digits, and no field that says nothing."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items() if v is not None}


def machine_facts(device: str) -> dict[str, Any]:
    """Where this was measured, and with what."""
    names = ("minidiff", "torch", "diffusers", "peft", "transformers", "triton", "numpy")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "versions": {name: found for name in names if (found := version_of(name))},
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": load,
        "busy": bool(load and cores and load > 0.5 * cores),
        "memory_gib": round(total_memory() / 2**30, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def version_of(name: str) -> str | None:
    if name == "minidiff":
        from minidiff import __version__

        return __version__
    if name == "torch":
        return torch.__version__  # the package's own metadata leave out "+cpu" and the like
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.is_file())
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def free_memory() -> int:
    """Bytes that can be taken without swapping; where the system does not say, half of all."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return free[0] if free else total_memory() // 2
