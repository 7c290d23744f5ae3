"""Flags that save memory for some time or some precision. --fit switches on the cheapest ones that are enough."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.core.errors import MinidiffError, SettingsError
from minidiff.draw.device import is_out_of_memory
from minidiff.trainer import checkpoint, distributed
from minidiff.trainer.memory import HALF, MIB, Budget, budget, measured
from minidiff.trainer.settings import AdapterSettings, FineTuneSettings, FrozenSettings, FullSettings, size_in_bytes

if TYPE_CHECKING:
    from minidiff.trainer.job import Job

SAVINGS = {  # flag -> its cost; the cheapest first. Each costs more than all flags before it together
    "layerwise_casting": "about a tenth more time, the same result",
    "gradient_checkpointing": "a third more time, the same result",
    "use_8bit_adam": "AdamW's running means are rounded, so the last digits differ",
    "optimizer_in_backward": "each gradient is limited separately, not all together",
    "bf16_weights": "trained weights have 8 bits of precision, with stochastic rounding",
}


@contextmanager
def budgeted(task: "Job", settings: FineTuneSettings) -> Iterator[FineTuneSettings]:
    """Choose the savings of --fit and print the budget before the run, and the measured peak after it.

    Gives the settings to train with. Running out of memory becomes a MinidiffError that says what helps.
    """
    settings, need, note = chosen(task, settings)
    prints = distributed.world().rank == 0
    if prints:
        print(f"{note}{need}")
    try:
        yield settings
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MinidiffError(after_running_out(task, settings, need)) from error
    if prints:
        print(measured(next(iter(task.trainable.values())).device.type))


def chosen(task: "Job", settings: FineTuneSettings) -> tuple[FineTuneSettings, Budget, str]:
    """The settings with the cheapest savings under which the run fits, its budget, and an explanation.

    A resumed run keeps the savings that it began with, except those that do not change the result. SettingsError if the run
    does not fit with all savings.
    """
    if settings.fit is None:
        return settings, budget(task, settings), ""
    begun, free = as_begun(task, settings)
    limit, on = size_in_bytes(settings.fit) or 0, set[str]()

    def need(flags: set[str]) -> Budget:
        return budget(task, replace(begun, **dict.fromkeys(flags, True)))  # type: ignore[arg-type]

    plain = best = need(on)
    for flag in free:  # the cheapest first, until it fits
        if best.together <= limit:
            break
        on.add(flag)
        best = need(on)
    if best.together > limit:
        raise SettingsError(nothing_fits(settings, best, limit))
    for flag in [flag for flag in reversed(free) if flag in on]:  # leave out what is not needed beside the last one
        if need(on - {flag}).together <= limit:
            on.remove(flag)
    trained = replace(begun, **dict.fromkeys(on, True))  # type: ignore[arg-type]
    best = budget(task, trained)
    if may_cast(trained) and not is_on(trained, "layerwise_casting"):
        task.modules["unet"].float()  # it was loaded in half precision, in case that it had to stay so
    return trained, best, why(settings, begun, trained, plain, best)


def possible(task: "Job", settings: FineTuneSettings) -> list[str]:
    """The savings that this run can still switch on, the cheapest first."""
    ours = task.optimizer is None  # a task's own optimizer exists already
    early = settings.gradient_accumulation_steps == 1 and settings.mixed_precision != "fp16" and distributed.world().size == 1
    rules = {
        "layerwise_casting": may_cast(settings) and any(p.dtype in HALF for p in task.modules["unet"].parameters()),
        "gradient_checkpointing": True,
        "use_8bit_adam": ours,
        "optimizer_in_backward": ours and early,
        "bf16_weights": ours and settings.mixed_precision == "bf16" and not settings.use_ema and task.ema_decay is None,
    }
    return [flag for flag in SAVINGS if rules[flag] and not is_on(settings, flag)]


def as_begun(task: "Job", settings: FineTuneSettings) -> tuple[FineTuneSettings, list[str]]:
    """The settings with the savings that a resumed run began with, and the flags that are still free."""
    free = possible(task, settings)
    if (path := checkpoint.find(settings)) is None:
        return settings, free
    begun = checkpoint.read_manifest(path)["made_of"]
    kept: dict[str, Any] = {flag: bool(begun.get(flag)) for flag in free if flag not in settings.HARMLESS}
    return replace(settings, **kept), [flag for flag in free if flag not in kept]


def may_cast(settings: FineTuneSettings) -> bool:
    """Load the U-Net in the half precision of its file, to cast it layer by layer? With --fit, `chosen` decides later."""
    asked = isinstance(settings, FrozenSettings) and (settings.layerwise_casting or settings.fit is not None)
    return asked and settings.mixed_precision == "no"


def is_on(settings: FineTuneSettings, flag: str) -> bool:
    return bool(getattr(settings, flag, False))  # not every method has every flag


# --- messages ------------------------------------------------------------------------------------------------------------


def why(settings: FineTuneSettings, begun: FineTuneSettings, trained: FineTuneSettings, plain: Budget, need: Budget) -> str:
    old = "".join(f"\n  --{flag}: as the run began" for flag in SAVINGS if is_on(begun, flag) and not is_on(settings, flag))
    new = "".join(f"\n  --{flag}: {SAVINGS[flag]}" for flag in SAVINGS if is_on(trained, flag) and not is_on(begun, flag))
    if not new:
        return f"--fit {settings.fit}: {mib(need)} fit {'with' if old else 'as it is.'}{old}\n"
    return f"--fit {settings.fit}: {mib(plain)} do not fit, {mib(need)} do, with the cheapest savings:{old}{new}\n"


def nothing_fits(settings: FineTuneSettings, least: Budget, limit: int) -> str:
    begun = " and those that it began with" if settings.resume_from_checkpoint else ""
    hints = "; ".join(other_hints(settings))
    if limit < least.allowance[1]:
        hints = f"only a higher limit: {mib(least.allowance[1])} are needed for any training"
    return f"--fit {settings.fit}: the run does not fit with all savings{begun}. It needs:\n{least}\nWhat else helps: {hints}."


def other_hints(settings: FineTuneSettings) -> list[str]:
    """Ways to save memory by training something else: fewer or smaller pictures at once, or fewer weights."""
    hints = ["--train_batch_size 1 with more --gradient_accumulation_steps"] if settings.train_batch_size > 1 else []
    hints += ["--mixed_precision bf16"] if settings.mixed_precision == "no" else []
    hints.append("a smaller --resolution")
    hints += ["a lower --rank, or fewer --lora_targets"] if isinstance(settings, AdapterSettings) else []
    return hints + ["minidiff train lora, which trains a hundredth of the weights"] * isinstance(settings, FullSettings)


def after_running_out(task: "Job", settings: FineTuneSettings, need: Budget) -> str:
    casts = isinstance(settings, FrozenSettings) and settings.mixed_precision == "no" and not settings.layerwise_casting
    hints = ["--layerwise_casting, if the model's file is in half precision"] * casts  # the U-Net is in fp32 by now
    hints += [f"--{flag} ({SAVINGS[flag]})" for flag in possible(task, settings)]
    helps = "".join(f"\n  {hint}" for hint in [*hints, *other_hints(settings)])
    good, kept = checkpoint.latest(Path(settings.output_dir)), "No checkpoint had been saved yet."
    if good:
        change = "add --gradient_checkpointing" + " or --layerwise_casting" * casts
        kept = f"The last checkpoint is {good}. --resume_from_checkpoint latest continues from it; you may {change}."
    return f"out of memory while training.\n{need}\nWhat helps, the cheapest first:{helps}\n{kept}"


def mib(need: Budget | int) -> str:
    return f"{(need if isinstance(need, int) else need.together) / MIB:,.0f} MiB"
