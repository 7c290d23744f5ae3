"""The `minidiff` command: finds the command, has tyro read its flags, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 a bug (with a traceback), 2 bad input (with one message), 130 stopped by Ctrl-C.
Nothing is imported before it is needed, so that `minidiff --help` answers at once.
"""

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from minidiff.core.errors import MinidiffError, SettingsError, did_you_mean
from minidiff.files.values import printable


def run(argv: list[str]) -> None:
    """Do what the command line asks for."""
    if broken := [word for word in argv if any("\ud800" <= letter <= "\udfff" for letter in word)]:
        raise SettingsError(f"{broken[0]!r} is not UTF-8 text; is the terminal set to UTF-8?")
    if argv[:1] == ["--version"]:
        from minidiff import __version__

        print(f"minidiff {__version__}")
        return
    from minidiff.cli.flags import COMMANDS

    groups = {name.split()[0] for name in COMMANDS if " " in name}
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
    elif argv[0] in groups and argv[1:2] in (["-h"], ["--help"]):
        print(usage(argv[0]))
    else:
        name = command_named(argv, list(COMMANDS))
        kind, function = COMMANDS[name]
        settings = parse(name, kind, argv[len(name.split()) :])
        settings.check()
        module, _, function = function.partition(":")
        getattr(import_module(f"minidiff.cli.{module}"), function)(settings)


def usage(group: str = "") -> str:
    """All commands, or those of a `group` such as train, with the first lines of their docstrings."""
    from minidiff.cli.flags import COMMANDS

    table = {name: (kind.__doc__ or "").partition("\n")[0] for name, (kind, _) in COMMANDS.items()}
    lines = [f"  minidiff {name:<23} {about}" for name, about in table.items() if not group or name.startswith(f"{group} ")]
    head = "minidiff: Stable Diffusion you can read, and fine-tune."
    return "\n".join([head, "", *lines, "", f"  minidiff {group + ' ' if group else ''}COMMAND --help: its flags"])


def command_named(argv: list[str], names: list[str]) -> str:
    """The command at the start of the command line; SettingsError with the nearest name if there is none."""
    for name in names:
        if argv[: len(name.split())] == name.split():
            return name
    if known := [name.split()[1] for name in names if name.startswith(f"{argv[0]} ")]:
        hint = did_you_mean(" ".join(argv[1:2]), known)
        raise SettingsError(f"minidiff {argv[0]} needs one of {', '.join(known)}.{hint}")
    near = did_you_mean(argv[0], [*names, *(name.split()[0] for name in names)])
    raise SettingsError(f'"{argv[0]}" is no command.{near}\n\n{usage()}')


def parse(name: str, kind: type, words: list[str]) -> Any:
    """The flags of a command. tyro takes `-` and `_` alike; for an unknown flag it names the nearest and exits with 2.

    --config and --from name a file that gives all other flags their defaults.
    """
    import tyro

    from minidiff.cli.flags import Sample
    from minidiff.trainer.settings import FineTuneSettings, from_toml

    default: Any = None
    origin = None
    if issubclass(kind, FineTuneSettings):
        path, words = taken_out("--config", words, "a TOML file, such as the train_config.toml of an earlier run")
        default = from_toml(kind, Path(path)) if path else None
    if kind is Sample:
        path, words = taken_out("--from", words, "a picture that minidiff or A1111 drew")
        if path:
            from minidiff.studio.recipe import read_origin

            origin = read_origin(path, Sample)
            default = Sample(output=f"{origin.path.stem}-again.png", **origin.settings)
    settings = tyro.cli(kind, args=words, prog=f"minidiff {name}", default=default)
    if origin:
        from minidiff.cli.draw_commands import check_again

        check_again(settings, origin)
    return settings


def taken_out(flag: str, words: list[str], what: str) -> tuple[str | None, list[str]]:
    """The value of a flag, and the words without it."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    if flag not in words:
        return None, words
    at = words.index(flag)
    if at + 1 == len(words):
        raise SettingsError(f"{flag} needs {what}.")
    return words[at + 1], words[:at] + words[at + 2 :]


def main(argv: list[str] | None = None) -> None:
    """The entry point. Each error that a person can fix becomes a message and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows only ASCII
    warnings.showwarning = lambda message, *_: print(f"Note: {printable(str(message))}", file=sys.stderr)
    try:
        try:
            with stopped_cleanly():
                run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout:  # None where it is closed
                sys.stdout.flush()  # here, where a broken pipe can still be caught
    except BrokenPipeError:  # the reader of our output has left, as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its end
        sys.exit(128 + 13)
    except OSError as error:
        where = f"{printable(str(error.filename))}: " if error.filename else ""
        print(f"minidiff: {where}{error.strerror or error}. Check path, permissions and free space.", file=sys.stderr)
        sys.exit(2)
    except MinidiffError as error:
        print(f"minidiff: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        from minidiff.draw.device import is_out_of_memory  # it imports torch, which is there by now

        if not is_out_of_memory(error):
            raise
        print(f"minidiff: out of memory. {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def stopped_cleanly() -> Iterator[None]:
    """On Ctrl-C and SIGTERM leave through all `finally` blocks, so that no partial file and no child process is left.

    (During training they save the state first: trainer/run.py.) After a signal any error counts as the signal's, because a
    library that is being imported can turn the interruption into another error.
    """
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python handles signals only in the main thread
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException:
        if not asked:
            raise
        print("\nStopped.", file=sys.stderr)
        sys.exit(128 + asked[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


OUT_OF_MEMORY = (
    "What helps, the cheapest first: --train_batch_size 1 with more --gradient_accumulation_steps, --mixed_precision bf16, "
    "a smaller --resolution (or --width and --height), a lower --rank. Checkpoints already written are whole."
)
