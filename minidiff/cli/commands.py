"""What each command does, given its flags. cli.py turns words into flags, and errors into messages."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minidiff.cli.file_flags import Bake, Convert, Extract, Inspect, Join, Resize
from minidiff.cli.flags import (
    Attention,
    Bench,
    DataCheck,
    Filmstrip,
    Judge,
    Ladder,
    Lesson,
    Morph,
    Sample,
    Sampling,
    Sheet,
    Tokens,
)
from minidiff.core.errors import DataError, SettingsError
from minidiff.pocket.settings import PretrainSettings
from minidiff.trainer.methods import (
    DreamBoothSettings,
    FullSettings,
    LoRASettings,
    PivotalSettings,
    TextualInversionSettings,
)
from minidiff.trainer.settings import FineTuneSettings

# --- the commands --------------------------------------------------------------------------------------------------------


def drawing(s: Sampling | Tokens) -> None:
    s.check()
    from minidiff.cli.draw_commands import DRAWING
    from minidiff.fast.memory import keep_memory

    keep_memory()
    DRAWING[type(s)](s)


def train(s: FineTuneSettings) -> None:
    from minidiff.fast.memory import keep_memory, return_memory
    from minidiff.trainer import savings
    from minidiff.trainer.distributed import joined
    from minidiff.trainer.recipes import RECIPES
    from minidiff.trainer.run import fit

    if s.fit:
        return_memory()
    else:
        keep_memory()
    with joined(s.device):
        task = RECIPES[type(s)](s)
        with savings.budgeted(task, s) as chosen:
            report = fit(task, chosen)
        if report.finished:
            print(f"{s.output_dir}: the result and its card, loss.png, and samples/ with a sheet for each stage")
    if not report.finished:
        sys.exit(130)  # asked to stop: not a failure, and not the result that a script waits for


def ladder(s: Ladder) -> None:
    s.check()
    from minidiff.pocket.ladder import run

    print(run(s))


def data_check(s: DataCheck) -> None:
    s.check()
    from minidiff.core.text import token_ids
    from minidiff.files.text_files import load_tokenizer
    from minidiff.trainer.buckets import bucket_sizes
    from minidiff.trainer.check_data import as_table, check_dataset

    folder, tokenizer = Path(s.folder), load_tokenizer(Path(s.tokenizer)) if s.tokenizer else None
    problems = check_dataset(
        folder,
        s.instance_prompt,
        s.caption_column,
        s.resolution,
        masks=s.masked_loss,
        buckets=bucket_sizes(s.resolution, 64) if s.aspect_ratio_buckets else [],
        trigger=s.trigger,
        count_tokens=(lambda text: len(token_ids(tokenizer, text))) if tokenizer else None,
    )
    print(as_table(problems, folder))
    if errors := [problem for problem in problems if problem.kind == "error"]:
        skip = ", or train with --skip_bad" if all(problem.can_be_skipped for problem in errors) else ""
        raise DataError(f"{folder}: mend what is marked as an error above{skip}.")


def lesson(s: Lesson) -> None:
    folder = Path(__file__).parents[2] / "lessons"
    found = sorted(folder.glob(f"{s.number:02d}_*.py"))
    if not found:
        known = ", ".join(sorted(str(int(path.name[:2])) for path in folder.glob("[0-9][0-9]_*.py")))
        raise SettingsError(f"there is no lesson {s.number}; there are {known or 'none beside this installation'}.")
    if code := subprocess.run([sys.executable, str(found[0])], check=False).returncode:
        sys.exit(code)


def bench(s: Bench) -> None:
    s.check()
    import json
    import os
    from dataclasses import asdict

    root = Path(__file__).parents[2]
    if not (root / "tests" / "benchmarks" / "__main__.py").is_file():
        raise SettingsError(
            f"the benchmark is not beside this installation ({root}): it lives in a checkout's tests/benchmarks. "
            'Clone the repository, and install it with pip install -e ".[bench]".'
        )
    places = os.pathsep.join(filter(None, (str(root / "tests"), str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", json.dumps(asdict(s))]
    if code := subprocess.run(command, env=os.environ | {"PYTHONPATH": places}, check=False).returncode:
        sys.exit(code)


def pretrain(s: PretrainSettings) -> None:
    s.check()
    from minidiff.pocket.pretrain import pretrain as run

    run(s)


def judge(s: Judge) -> None:
    s.check()
    import json

    from minidiff.pocket.judge import judge_checkpoint

    print(json.dumps(judge_checkpoint(s.folder, Path(s.judge), s.count), indent=2))


def tool(s: Inspect | Convert | Bake | Join | Extract | Resize) -> None:
    s.check()
    from minidiff.cli.files_commands import TOOLS

    TOOLS[type(s)](s)


COMMANDS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "sample": (Sample, drawing),
    "sheet": (Sheet, drawing),
    "morph": (Morph, drawing),
    "filmstrip": (Filmstrip, drawing),
    "attention": (Attention, drawing),
    "tokens": (Tokens, drawing),
    "train full": (FullSettings, train),
    "train dreambooth": (DreamBoothSettings, train),
    "train lora": (LoRASettings, train),
    "train textual_inversion": (TextualInversionSettings, train),
    "train pivotal": (PivotalSettings, train),
    "data check": (DataCheck, data_check),
    "inspect": (Inspect, tool),
    "convert": (Convert, tool),
    "merge bake": (Bake, tool),
    "merge join": (Join, tool),
    "merge extract": (Extract, tool),
    "merge resize": (Resize, tool),
    "ladder": (Ladder, ladder),
    "lesson": (Lesson, lesson),
    "bench": (Bench, bench),
    "pretrain": (PretrainSettings, pretrain),
    "judge": (Judge, judge),
}
