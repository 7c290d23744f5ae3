"""Less memory for more time or less exactness: which savings a run can switch on, in the order of what they cost.

--fit takes the cheapest set of them whose budget (memory.py) fits; a run that ran out of memory is told of those that it
has not tried.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.core.errors import MinidiffError, SettingsError, is_out_of_memory
from minidiff.core.unet import UNet2DConditionModel
from minidiff.fast.precision import HALF
from minidiff.trainer import checkpoint, distributed
from minidiff.trainer.memory import MIB, Budget, budget, measured
from minidiff.trainer.metering import Step, step_bytes
from minidiff.trainer.methods import AdapterSettings, FrozenSettings, FullSettings
from minidiff.trainer.settings import FineTuneSettings, size_in_bytes

if TYPE_CHECKING:
    from minidiff.core.train import Task


@dataclass(frozen=True)
class Saving:
    """A flag, and what it costs."""

    flag: str
    cost: str


# The cheapest first. Each costs more than all before it together: a dearer one never comes in where cheaper ones would do.
SAVINGS = (
    Saving("layerwise_casting", "about a tenth more time, the same result"),
    Saving("gradient_checkpointing", "a third more time, the same result"),
    Saving("use_8bit_adam", "rounded running means, other last digits"),
    Saving("optimizer_in_backward", "each tensor's gradient clipped by itself, not all together"),
    Saving("bf16_weights", "weights of 8 bits' precision, rounded by chance"),
)
OTHER_HINTS = "--train_batch_size 1 with more --gradient_accumulation_steps", "--mixed_precision bf16", "a smaller --resolution"
AS_STORED = "--layerwise_casting, if the model's file is in half precision"
UNRECORDED = "no --cuda_graph, which keeps the memory of a step; then the savings that do not go with it"
ADAPTERS = "a lower --rank, or fewer --lora_targets"
WHOLE = "minidiff train lora, which trains a hundredth of the weights"


@contextmanager
def budgeted(task: "Task", settings: FineTuneSettings) -> Iterator[FineTuneSettings]:
    """Choose what --fit asks for, print the budget, and, behind the run inside the `with`, what was measured.

    Gives the settings to train with. The first process prints. Running out of memory becomes a MinidiffError.
    """
    first = distributed.world().rank == 0
    settings, need, note = chosen(task, settings)
    if first:
        print(note + str(need))
    try:
        yield settings
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MinidiffError(after_running_out(task, settings, need)) from error
    if first:
        print(measured(str(next(iter(task.trainable.values())).device)))


def chosen(task: "Task", settings: FineTuneSettings) -> tuple[FineTuneSettings, Budget, str]:
    """The settings with the cheapest savings under which the run fits, its budget, and why, in words.

    A run that goes on keeps the savings it was begun with, but for those that change no result.
    SettingsError where nothing fits.
    """
    if settings.fit is None:
        return settings, budget(task, settings), ""
    limit = size_in_bytes(settings.fit) or 0
    counted: dict[tuple[object, ...], Step] = {}
    begun, free = as_begun(task, settings)
    plain = least = None
    for trial in trials(begun, free):
        need = trial_budget(task, trial, counted)
        plain, least = plain or need, need if least is None or need.together < least.together else least
        if need.together <= limit:
            if may_cast(trial) and not is_on(trial, "layerwise_casting"):
                task.modules["unet"].float()  # it was loaded as its file has it, and need not stay so
            return trial, need, why(settings, begun, trial, plain, need)
    assert least is not None
    raise SettingsError(nothing_fits(settings, least, limit))


def trials(settings: FineTuneSettings, free: list[str]) -> Iterator[FineTuneSettings]:
    """Every set of the `free` savings, the cheapest first; those that are on stay on."""
    for bits in product((False, True), repeat=len(free)):  # counts in binary: the last digit is the cheapest saving
        switches: dict[str, Any] = dict(zip(reversed(free), bits))
        yield replace(settings, **switches)


def trial_budget(task: "Task", settings: FineTuneSettings, counted: dict[tuple[object, ...], Step]) -> Budget:
    """The budget under these savings. Counting a step takes a second or more, and 8-bit moments are no part of one."""
    unet = task.modules["unet"]
    assert isinstance(unet, UNet2DConditionModel)
    unet.enable_gradient_checkpointing(settings.gradient_checkpointing)  # and the last trial is the one that is trained
    key = tuple(is_on(settings, saving.flag) for saving in SAVINGS if saving.flag != "use_8bit_adam")
    if key not in counted:
        counted[key] = step_bytes(task, settings)
    return budget(task, settings, counted[key])


def possible(task: "Task", settings: FineTuneSettings) -> list[str]:
    """The savings that this run could still switch on, the cheapest first."""
    ours = task.optimizer is None  # a task's own optimizer is made already
    once = not settings.cuda_graph  # it does not go with two of them
    rules = {
        "layerwise_casting": may_cast(settings) and any(p.dtype in HALF for p in task.modules["unet"].parameters()),
        "gradient_checkpointing": once,
        "use_8bit_adam": ours,
        "optimizer_in_backward": ours
        and once
        and settings.gradient_accumulation_steps == 1
        and settings.mixed_precision != "fp16"
        and distributed.world().size == 1,
        "bf16_weights": ours and settings.mixed_precision == "bf16" and not settings.use_ema and task.ema_decay is None,
    }
    return [saving.flag for saving in SAVINGS if rules[saving.flag] and not is_on(settings, saving.flag)]


def may_cast(settings: FineTuneSettings) -> bool:
    """Shall weights stay as the file has them, for each layer to widen? With --fit, `chosen` says so at last."""
    asked = isinstance(settings, FrozenSettings) and (settings.layerwise_casting or settings.fit is not None)
    return asked and settings.mixed_precision == "no"


def is_on(settings: FineTuneSettings, flag: str) -> bool:
    """Some methods do not know all of them."""
    return bool(getattr(settings, flag, False))


def as_begun(task: "Task", settings: FineTuneSettings) -> tuple[FineTuneSettings, list[str]]:
    """The settings with the savings of the run that is resumed, and those that may still be chosen."""
    free = possible(task, settings)
    if (path := checkpoint.find(settings)) is None:
        return settings, free
    begun = checkpoint.read_manifest(path)["made_of"]
    kept: dict[str, Any] = {flag: bool(begun.get(flag)) for flag in free if flag not in settings.HARMLESS}
    return replace(settings, **kept), [flag for flag in free if flag not in kept]


# --- in words ----------------------------------------------------------------------------------------------------------


def why(settings: FineTuneSettings, begun: FineTuneSettings, trial: FineTuneSettings, plain: Budget, need: Budget) -> str:
    """What was chosen, and why."""
    kept = "".join(f"\n  --{flag}: as the run was begun" for flag in switched_on(settings, begun))
    new = "".join(f"\n  --{saving.flag}: {saving.cost}" for saving in SAVINGS if saving.flag in switched_on(begun, trial))
    if not new:
        return f"--fit {settings.fit}: {mib(need)} fit {'with' if kept else 'as it is.'}{kept}\n"
    said = f"{mib(plain)} would not fit, {mib(need)} do, with the cheapest savings that suffice:"
    return f"--fit {settings.fit}: {said}{kept}{new}\n"


def switched_on(before: FineTuneSettings, after: FineTuneSettings) -> list[str]:
    """The savings that are on after and were not before."""
    return [saving.flag for saving in SAVINGS if is_on(after, saving.flag) and not is_on(before, saving.flag)]


def nothing_fits(settings: FineTuneSettings, least: Budget, limit: int) -> str:
    begun = " and with what the run was begun with" if settings.resume_from_checkpoint else ""
    hints = "; ".join(other_hints(settings))
    if limit < least.allowance[1]:
        hints = f"more memory alone: {least.allowance[1] / MIB:,.0f} MiB of it are there whatever is trained"
    return (
        f"--fit {settings.fit}: the run does not fit, with all the savings it can have{begun}; the least it takes:\n{least}\n"
        f"What else helps: {hints}."
    )


def other_hints(settings: FineTuneSettings) -> list[str]:
    """What is no saving but another run: fewer or smaller pictures at once, fewer weights; the cheapest first."""
    smaller, half, picture = OTHER_HINTS
    hints = [UNRECORDED] if settings.cuda_graph else []
    hints += [smaller] if settings.train_batch_size > 1 else []
    hints += [half] if settings.mixed_precision == "no" else []
    hints.append(picture)
    if isinstance(settings, AdapterSettings):
        hints.append(ADAPTERS)
    return [*hints, WHOLE] if isinstance(settings, FullSettings) else hints


def after_running_out(task: "Task", settings: FineTuneSettings, need: Budget) -> str:
    """The message of a run that ran out of memory: where it went, what helps, and what is saved."""
    casts = isinstance(settings, FrozenSettings) and settings.mixed_precision == "no" and not settings.layerwise_casting
    flags = [AS_STORED] if casts else []  # the weights were widened when they were loaded, or by `chosen`
    flags += [f"--{saving.flag} ({saving.cost})" for saving in SAVINGS if saving.flag in possible(task, settings)]
    hints = "".join(f"\n  {hint}" for hint in [*flags, *other_hints(settings)])
    good = checkpoint.latest(Path(settings.output_dir))
    change = "leaving out --cuda_graph" if settings.cuda_graph else "--gradient_checkpointing"
    change += " or --layerwise_casting" * casts
    goes_on = f"--resume_from_checkpoint latest goes on from it, with no other change than {change}"
    kept = f"The last whole checkpoint is {good}; {goes_on}." if good else "No checkpoint had been saved yet."
    return f"out of memory while training.\n{need}\nWhat helps, the cheapest first:{hints}\n{kept}"


def mib(need: Budget) -> str:
    return f"{need.together / MIB:,.0f} MiB"
