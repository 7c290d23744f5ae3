"""The `minidiff` command: finds the command, has tyro read its flags, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 a bug (with a traceback), 2 bad input (with one message), 130 stopped by Ctrl-C.
Nothing is imported before it is needed, so that `minidiff --help` answers at once.
"""

import io
import os
import sys
import warnings
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from minidiff import __version__
from minidiff.cli.commands import COMMANDS, FIRST, usage
from minidiff.core.errors import MinidiffError, SettingsError, did_you_mean
from minidiff.trainer.signals import signals_call

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
        near = did_you_mean(name, [*COMMANDS, *(name.split()[0] for name in COMMANDS)])
        raise SettingsError(f'"{name}" is no command.{near} minidiff{f" {group}" if group else ""} --help lists them.')
    else:
        flags, *_ = COMMANDS[name]
        words = argv[len(name.split()) :]
        words = found("cli.habits:adapted")(words) if group == "train" else words
        if any(word in HELP for word in words):
            from minidiff.cli.help import help_text

            return print(help_text(name, found(flags)))
        settings = parse(name, found(flags), words)
        if group != "train" and getattr(settings, "seed", 0) == -1:  # several processes of a training would draw several
            from dataclasses import replace
            from secrets import randbelow

            settings = replace(settings, seed=randbelow(2**31))
            print(f"seed {settings.seed}")
        settings.check()
        settings = settings.settled() if hasattr(settings, "settled") else settings
        function_of(name)(settings)


def found(where: str) -> Any:
    """The object behind "file:name"."""
    module, _, name = where.partition(":")
    return getattr(import_module(f"minidiff.{module}"), name)


def function_of(name: str) -> Any:
    """The function of a command."""
    where = COMMANDS[name][1]
    return found(where if "." in where else f"cli.{where}")


def parse(name: str, kind: type, words: list[str]) -> Any:
    """The flags of a command, where `-` and `_` are the same. A default --output does not write over an earlier picture.

    --config TOML (training) and --from PICTURE (sample) give all other flags their defaults.
    """
    from dataclasses import replace

    import tyro

    from minidiff.cli.help import ready_words

    prog, default, origin = f"minidiff {name}", None, None
    if flag := "--from" if name == "sample" else "--config" if name.startswith("train ") else None:
        first = ArgumentParser(prog, add_help=False, allow_abbrev=False)
        first.add_argument(flag, dest="file")
        given, words = first.parse_known_args(words)
        if given.file and name == "sample":
            from minidiff.studio.recipe import read_origin

            origin = read_origin(given.file, kind)
            default = kind(output=str(Path.cwd() / f"{origin.path.stem}-again.png"), **origin.settings)
        elif given.file:
            from minidiff.files.values import from_toml

            default = from_toml(kind, Path(given.file))

    def read(default: Any) -> Any:
        return tyro.cli(kind, args=ready_words(name, kind, words, default), prog=prog, default=default)

    settings = read(default)
    if preset := getattr(settings, "preset", None):  # again: all flags but those of the command line have its values
        values = found("trainer.presets:preset_values")(preset, settings.pretrained_model_name_or_path)
        settings = read(replace(default or kind(), preset=preset, **values))
    if origin:
        from minidiff.cli.draw_commands import check_again

        check_again(settings, origin)
    elif hasattr(settings, "beside") and not any(word.partition("=")[0] == "--output" for word in words):
        return settings.beside()
    return settings


def main(argv: list[str] | None = None) -> None:
    """The entry point. Each error that a person can fix becomes a message and an exit code."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read when torch is imported: a Mac's CPU does what MPS lacks
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows only ASCII
    warnings.showwarning = lambda message, *_: say(f"Note: {message}")
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
