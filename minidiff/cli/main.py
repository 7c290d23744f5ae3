"""The `minidiff` command: the table of all commands, their help, and errors as messages and exit codes.

Exit codes: 0 done, 1 a bug (with a traceback), 2 bad input (with one message), 130 stopped by Ctrl-C.
Nothing is imported before it is needed, so that `minidiff --help` answers at once.
"""

import io
import os
import sys
import warnings
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

from minidiff import __version__
from minidiff.core.errors import MinidiffError, SettingsError, did_you_mean
from minidiff.trainer.signals import signals_call

COMMANDS: dict[str, tuple[str, str, str]] = {  # typed -> flags (file:class), function; of cli/ where no room is named; help
    "sample": ("draw_flags:Sample", "draw_commands:sample", "Draw pictures from a prompt; or, with --from, one again."),
    "sheet": ("draw_flags:Sheet", "draw_commands:sheet", "Draw a labelled contact sheet over one or two settings."),
    "morph": ("draw_flags:Morph", "draw_commands:morph", "Draw a loop through prompts, seeds, or both."),
    "filmstrip": ("draw_flags:Filmstrip", "draw_commands:filmstrip", "Show how a picture appears from noise."),
    "attention": ("draw_flags:Attention", "draw_commands:attention", "Show where the U-Net looks for each word."),
    "tokens": ("draw_flags:Tokens", "draw_commands:tokens", "Show how CLIP splits a prompt."),
    "train full": ("trainer.settings:FullSettings", "train_commands:train", "Fine-tune all weights."),
    "train dreambooth": ("trainer.settings:DreamBoothSettings", "train_commands:train", "Teach all weights a subject."),
    "train lora": ("trainer.settings:LoRASettings", "train_commands:train", "Teach a subject or a style with a small adapter."),
    "train textual_inversion": ("trainer.settings:TextualInversionSettings", "train_commands:train", "Teach a new word."),
    "train pivotal": ("trainer.settings:PivotalSettings", "train_commands:train", "Teach a new word and a LoRA together."),
    "train controlnet": ("trainer.settings:ControlNetSettings", "train_commands:train", "Teach to follow edges, depth, …"),
    "train ip_adapter": ("trainer.settings:IPAdapterSettings", "train_commands:train", "Teach to draw what a picture shows."),
    "data check": ("flags:DataCheck", "train_commands:data_check", "List all problems of a folder of training pictures."),
    "watch": ("flags:Watch", "train_commands:watch", "Show the sheets and the loss curve of a training run as it goes."),
    "inspect": ("flags:Inspect", "files_commands:inspect", "Describe a weight file: program, family, ranks, problems."),
    "convert": ("flags:Convert", "files_commands:convert", "Write a weight file in another program's format."),
    "merge bake": ("flags:Bake", "files_commands:bake", "Add adapters to a model's weights."),
    "merge join": ("flags:Join", "files_commands:join", "Make one adapter from several."),
    "merge extract": ("flags:Extract", "files_commands:extract", "Make an adapter from the difference of two models."),
    "merge resize": ("flags:Resize", "files_commands:resize", "Reduce an adapter to a lower rank."),
    "ladder": ("pocket.settings:LadderSettings", "train_commands:ladder", "Train a subject with every method; compare them."),
    "forgetting": ("pocket.settings:ForgettingSettings", "train_commands:forgetting", "Plot what methods learn and forget."),
    "lesson": ("flags:Lesson", "train_commands:lesson", "List the lessons, or run one."),
    "bench": ("flags:Bench", "train_commands:bench", "Compare minidiff with diffusers + peft on this machine."),
    "pretrain": ("pocket.settings:PretrainSettings", "pocket.pretrain:pretrain", "Train the pocket checkpoint from scratch."),
    "judge": ("pocket.settings:JudgeSettings", "pocket.judge:judge", "Score a pocket checkpoint."),
    "completion": ("flags:Completion", "completion:completion", "Let Tab complete commands and flags in your shell."),
}
FIRST = """minidiff: Stable Diffusion you can read, and fine-tune. Five things to try:

  minidiff sample "a photo of a red dog on the beach"
  minidiff sheet "a red house in the snow" --columns guidance_scale=1,3,8 --rows seed=0..2
  minidiff morph "a photo of a red dog" "a photo of a blue cat"
  minidiff train lora --preset object --instance_data_dir lessons/data/dog --instance_prompt "a photo of a sks dog"
  minidiff lesson 0

  minidiff --help: all commands"""
OUT_OF_MEMORY = (
    "out of memory. What helps, the cheapest first: --train_batch_size 1 with more --gradient_accumulation_steps, "
    "--mixed_precision bf16, a smaller --resolution (or --width and --height), a lower --rank. Checkpoints already written are "
    "whole."
)
HELP = ("-h", "--help")


def run(argv: list[str]) -> None:
    """Do what the command line asks for."""
    if broken := [word for word in argv if any("\ud800" <= letter <= "\udfff" for letter in word)]:
        raise SettingsError(f"{broken[0]!r} is not UTF-8 text; is the terminal set to UTF-8?")
    first, second = [*argv[:2], "", ""][:2]
    group = first if any(name.startswith(f"{first} ") for name in COMMANDS) else ""  # such as train
    name = f"{first} {second}".strip() if group else first
    if first == "--version":
        print(f"minidiff {__version__}")
    elif not first:
        print(FIRST)
    elif first in HELP or (group and second in HELP):
        print(usage(group))
    elif name not in COMMANDS:
        near = "" if name == group else did_you_mean(name, [*COMMANDS, *(name.split()[0] for name in COMMANDS)])
        raise SettingsError(f'"{name}" is no command.{near} minidiff{f" {group}" if group else ""} --help lists them.')
    else:
        flags, function, _ = COMMANDS[name]
        words = argv[len(name.split()) :]
        if any(word in HELP for word in words):
            print(found("help:help_text")(name, found(flags)))
            return
        settings = found("words:settings_of")(name, found(flags), words)
        settings.check()
        settings = settings.settled() if hasattr(settings, "settled") else settings
        found(function)(settings)


def usage(group: str = "") -> str:
    """All commands, or those of a `group` such as train."""
    first = f"{group} " if group else ""
    lines = [f"  minidiff {name:<23} {about}" for name, (_, _, about) in COMMANDS.items() if name.startswith(first)]
    head = "minidiff: Stable Diffusion you can read, and fine-tune."
    return "\n".join([head, "", *lines, "", f"  minidiff {first}COMMAND --help: its flags"])


def found(where: str) -> Any:
    """The object behind "file:name" of cli/, or "room.file:name"."""
    module, _, name = where.partition(":")
    return getattr(import_module(f"minidiff.{module}" if "." in module else f"minidiff.cli.{module}"), name)


def main(argv: list[str] | None = None) -> None:
    """The entry point. Each error that a person can fix becomes a message and an exit code."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read when torch is imported: a Mac's CPU does what MPS lacks
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows only ASCII
    note = cache(lambda text: say(f"Note: {text}"))  # once, though measuring and drawing both give it
    warnings.showwarning = lambda message, *_: note(str(message))
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        """Leave through all `finally` blocks, so that no partial file and no child process is left."""
        asked.append(number)
        raise KeyboardInterrupt

    try:
        try:
            with signals_call(stop):  # during training, trainer/run.py takes them, and saves the state first
                run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout:  # None where it is closed
                sys.stdout.flush()  # here, where a broken pipe can still be caught
    except BaseException as error:
        if asked or isinstance(error, KeyboardInterrupt):  # a library that is being imported can make another error of it
            print("\nStopped.", file=sys.stderr)
            sys.exit(128 + asked[0] if asked else 130)
        leave(error)


def leave(error: BaseException) -> NoReturn:
    """Exit with the message of an error that a person can fix; raise any other error again."""
    if isinstance(error, BrokenPipeError):  # the reader of our output has left, as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its end
        sys.exit(128 + 13)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        say(f"minidiff: {where}{error.strerror or error}. Check path, permissions and free space.")
    elif isinstance(error, MinidiffError):
        say(f"minidiff: {error}")
    elif isinstance(error, (MemoryError, RuntimeError)) and found("draw.device:is_out_of_memory")(error):  # it imports torch
        say(f"minidiff: {OUT_OF_MEMORY}")
    else:
        raise error
    sys.exit(2)


def say(text: str) -> None:
    """A line on stderr, in which control characters are written out."""
    from minidiff.files.values import printable

    print(printable(text), file=sys.stderr)
