"""One run of the benchmark. `minidiff bench` starts it; by hand: PYTHONPATH=tests:. python -m benchmarks '{"quick": true}'."""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import torch

from benchmarks import chart, models, peers, processes, training, work
from benchmarks.report import OURS, Row, counted_rows, free_memory, last_line, machine_facts, table, timed_rows
from benchmarks.timing import Deadline, measure, summaries
from minidiff.cli.flags import Bench, Group
from minidiff.draw.device import chosen_device

QUICK = 285.0  # seconds; what is not done by then is left out, and said to be
Found = tuple[list[Row], list[str], list[str]]  # rows, what failed, notes


class Session:
    """The settings of a run, and what depends on them."""

    def __init__(self, settings: Bench, scratch: Path) -> None:
        self.quick, self.scratch, self.output = settings.quick, scratch, Path(settings.output_dir)
        self.device = chosen_device(settings.device)
        self.gpu, self.why_no_peers = self.device.startswith("cuda"), peers.missing()
        self.peers = not self.why_no_peers
        self.compiled = not settings.quick and settings.compile
        self.half = torch.float16 if self.gpu else torch.bfloat16
        self.precision = "bf16" if self.gpu else "no"
        self.deadline = Deadline(QUICK if settings.quick else None)
        self.groups = settings.only or get_args(Group)

    def seconds(self, quick: float, full: float) -> float:
        """The time for one piece of work."""
        return min(quick, self.deadline.left() / 4) if self.quick else full

    def contenders(self) -> tuple[str, ...]:
        return (OURS, *peers.LEVELS) if self.peers else (OURS,)

    def sizes(self) -> list[training.Size]:
        """What is trained: the pocket checkpoint, and in a full run a model of SD 1.5's size."""
        pocket = [training.Size("pocket", models.POCKET, 128, 4)]
        if self.quick:
            return pocket
        return [*pocket, training.Size("SD 1.5 size", models.sd15_folder(self.output / "sd15-size"), 512, 1)]


# --- the groups, in the order of a run ---------------------------------------------------------------------------------


def saved(s: Session) -> Iterator[Callable[[], Found]]:
    yield lambda: (work.saved_rows(s.peers), [], [])


def unet(s: Session) -> Iterator[Callable[[], Found]]:
    def one(make: Callable[[], work.Work], seconds: float) -> Found:
        made = make()
        rows, failed = work.run(made, seconds)
        return rows, failed, made.notes

    def pocket() -> work.Work:
        ours = work.StableDiffusionPipeline.from_pretrained(models.POCKET).to(s.device).unet
        return work.unet_work(ours, "pocket", 2, s.device, s.compiled, s.peers)

    yield lambda: one(pocket, s.seconds(8, 20))
    for batch, dtype in ((1, torch.float32), (1, s.half), (2, s.half))[: 1 if s.quick else 3]:
        needed = models.SD15_BYTES * (2.6 if s.peers else 1.2) * (dtype.itemsize / 4)
        if not s.gpu and free_memory() < needed:
            yield lambda: ([], [], ["U-Net: SD 1.5 size: left out, there is too little free memory"])
            continue

        def large(batch: int = batch, dtype: torch.dtype = dtype) -> work.Work:
            ours = models.random_unet(device=s.device, dtype=dtype)
            return work.unet_work(ours, "SD 1.5 size", batch, s.device, s.compiled, s.peers, best=not s.quick)

        yield lambda large=large: one(large, s.seconds(20, 60))  # type: ignore[misc]


def picture(s: Session) -> Iterator[Callable[[], Found]]:
    for size in s.sizes():
        steps = 25 if size.name == "pocket" or s.gpu else 4  # on a CPU each step is like the others, and long

        def one(size: training.Size = size, steps: int = steps) -> Found:
            made = work.picture_work(str(size.folder), size.name, steps, s.device, s.compiled, s.peers)
            rows, failed = work.run(made, s.seconds(15, 60))
            return rows, failed, made.notes

        yield one


def train(s: Session) -> Iterator[Callable[[], Found]]:
    for size in s.sizes():
        for method, graph in product(training.METHODS[:: 2 if s.quick else 1], (False, True) if s.gpu else (False,)):
            if method == "dreambooth" and size.name != "pocket" and not s.gpu:
                yield lambda: ([], [], ["train: dreambooth, SD 1.5 size: 14 GB for each contender, on a GPU only"])
                continue

            def one(method: str = method, size: training.Size = size, graph: bool = graph) -> Found:
                asked = (method, size, s.scratch, s.device, s.precision, s.seconds(6, 60), s.compiled, s.peers, graph)
                return *training.training_rows(*asked), []

            yield one


def attention(s: Session) -> Iterator[Callable[[], Found]]:
    dtypes = (torch.float32,) if s.quick else (torch.float32, s.half)
    for dtype in dtypes:
        for made in work.attention_work(s.device, dtype, 1 if s.quick else 2, every=2 if s.quick else 1):
            yield lambda made=made: (*work.run(made, s.seconds(2, 10)), [])  # type: ignore[misc]


def memory(s: Session) -> Iterator[Callable[[], Found]]:
    sizes = s.sizes()
    if not (s.quick or s.gpu):  # the peers compute in fp32 whatever the file has
        sizes.append(training.Size("SD 1.5 size, file in fp16", models.in_fp16(sizes[-1].folder), 512, 1))
    for size in sizes:
        for method in ("lora",) if s.quick or "fp16" in size.name else training.METHODS:
            if method == "dreambooth" and size.name != "pocket" and not s.gpu:
                continue

            def one(method: str = method, size: training.Size = size) -> Found:
                task = {"task": method, "folder": str(size.folder), "side": size.side, "batch": size.batch}
                task |= {"device": s.device, "precision": s.precision}
                contenders = s.contenders()[: 2 if s.quick else None]
                lean = () if s.gpu else (processes.LEAN,)
                peaks = {name: processes.child(**task, contender=name) for name in (*contenders, *lean)}
                called = {name: peers.NAMES.get(name, name) for name in peaks}
                what, rows = f"{method.replace('_', ' ')} step, {size.name}, batch {size.batch}", []
                for key, said in (("peak", "at the peak"), ("held", "without mapped files")):
                    found = {called[name]: float(peak[key]) for name, peak in peaks.items() if peak[key]}
                    rows += counted_rows("memory", f"{what}, {said}", found)
                return rows, [], []

            yield one


def start(s: Session) -> Iterator[Callable[[], Found]]:
    def one(name: str, contenders: dict[str, Callable[[], Any]], seconds: float) -> Found:
        times = measure(contenders, seconds, hopeless=float("inf"))
        wall = summaries({name: [t.wall for t in found] for name, found in times.items()}, OURS)
        cpu = summaries({name: [t.cpu for t in found] for name, found in times.items()}, OURS)
        return timed_rows("start", name, wall, cpu, {}), [], []

    yield lambda: one("--help", processes.helps(), s.seconds(3, 10))
    yield lambda: one("import", processes.imports(s.peers), s.seconds(15, 60))
    for size in s.sizes():
        folder = str(size.folder)
        yield lambda size=size, folder=folder: one(  # type: ignore[misc]
            f"load {size.name}", processes.loads(folder, s.peers), s.seconds(10, 60)
        )


GROUPS: dict[str, Callable[[Session], Iterator[Callable[[], Found]]]] = {
    "saved": saved,
    "train": train,
    "picture": picture,
    "start": start,
    "memory": memory,
    "unet": unet,
    "attention": attention,
}


def main(settings: Bench) -> int:
    """The whole run; 1 if a result was wrong."""
    rows: list[Row] = []
    failed: list[str] = []
    notes: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        s = Session(settings, Path(scratch))
        machine = machine_facts(s.device)
        print(json.dumps(machine, indent=2), flush=True)
        if s.why_no_peers:
            notes.append(f"only minidiff's own rows: {s.why_no_peers}")
        if s.peers and not s.compiled:
            notes.append("P2 is without torch.compile: that takes minutes, and belongs to a full run")
        for group in s.groups:
            collect(group, s, rows, failed, notes)
    notes += [f"took {time.perf_counter() - began:.0f} s"]
    notes += ["the machine was busy with other work, so the intervals are wide"] if machine["busy"] else []
    finish(s.output, rows, machine, notes, failed)
    return int(bool(failed))


def collect(group: str, s: Session, rows: list[Row], failed: list[str], notes: list[str]) -> None:
    """All the work of a group, printed as it is done; what breaks is noted, and the rest goes on."""
    tasks = GROUPS[group](s)
    while True:
        try:
            task = next(tasks, None)
            if task is None:
                return
            if s.deadline.spent():
                notes.append(f"{group}: cut short, the time of a quick run is over")
                return
            new, wrong, said = task()
        except Exception as error:  # one piece of work must not take all others with it
            traceback.print_exc(limit=3)
            new, wrong, said = [], [f"{group}: {type(error).__name__}: {str(error)[:300]}"], []
        rows += new
        failed += wrong
        notes += said
        print("\n".join([table(new), *wrong, *said]), flush=True)


def finish(output: Path, rows: list[Row], machine: dict[str, Any], notes: list[str], failed: list[str]) -> None:
    """The chart, the files, and the last line."""
    output.mkdir(parents=True, exist_ok=True)
    line = last_line(rows, machine, notes, failed)
    (output / "bench.json").write_text(line + "\n", encoding="utf-8")
    if any(row.contender != OURS and row.ratio for row in rows):
        versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if name != "numpy")
        chart.draw(
            rows,
            output / "bench.png",
            "How many times minidiff's time or memory the others need",
            f"{machine['device']}, {versions}",
        )
        print(f"\n{output / 'bench.png'}")
    print("\n" + "\n".join([*notes, *failed]))
    print(line)


if __name__ == "__main__":
    sys.exit(main(Bench(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()})))
