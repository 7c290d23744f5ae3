"""The `minidiff` command. Flags, help texts and checks come from dataclasses; here they only meet the code.

Nothing is imported before it is needed: `minidiff --help` answers at once. Bad input ends with one message and exit
code 2; a traceback is a bug.
"""

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.core.errors import MinidiffError, SettingsError, did_you_mean, is_out_of_memory, printable

if TYPE_CHECKING:
    from minidiff.cli.flags import Sample

# --- the command line ----------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[Any, Callable[[Any], None]]:
    """The command's settings and its function. tyro itself leaves with code 2 for unknown flags, and names the nearest."""
    if broken := [word for word in argv if any("\ud800" <= letter <= "\udfff" for letter in word)]:
        raise SettingsError(f"{broken[0]!r} is not UTF-8 text; is the terminal set to UTF-8?")
    import tyro

    from minidiff.cli.commands import COMMANDS

    name = next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), None)
    if name is None:
        if known := [name.split()[1] for name in COMMANDS if name.startswith(f"{argv[0]} ")]:
            given = " ".join(argv[1:2])
            raise SettingsError(f"minidiff {argv[0]} needs one of {', '.join(known)}.{did_you_mean(given, known)}")
        near = did_you_mean(argv[0], [*COMMANDS, *(name.split()[0] for name in COMMANDS)])
        raise SettingsError(f'"{argv[0]}" is no command.{near}\n\n{usage()}')
    from minidiff.cli.flags import Sample
    from minidiff.trainer.settings import FineTuneSettings, from_toml

    kind, function = COMMANDS[name]
    rest, default = argv[len(name.split()) :], None
    if issubclass(kind, FineTuneSettings):
        path, rest = taken_out("--config", rest, "a TOML file, such as the train_config.toml of an earlier run")
        default = from_toml(kind, Path(path)) if path else None
    if kind is Sample:
        path, rest = taken_out("--from", rest, "a picture that minidiff or A1111 drew")
        if path:
            return drawn_again(path, rest), function
    return tyro.cli(kind, args=rest, prog=f"minidiff {name}", default=default), function


def taken_out(flag: str, words: list[str], what: str) -> tuple[str | None, list[str]]:
    """The value of a flag that gives all others their defaults, and the words without it."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    if flag not in words:
        return None, words
    at = words.index(flag)
    if at + 1 == len(words):
        raise SettingsError(f"{flag} needs {what}.")
    return words[at + 1], words[:at] + words[at + 2 :]


def drawn_again(path: str, rest: list[str]) -> "Sample":
    """The settings of a picture, and over them the flags that were given; notes on what differs here go to stderr."""
    import tyro

    from minidiff.cli.draw_commands import output_files
    from minidiff.cli.flags import Sample
    from minidiff.studio.recipe import check_origin, read_origin

    origin = read_origin(path, Sample)
    default = Sample(output=f"{origin.path.stem}-again.png", **origin.settings)
    settings = tyro.cli(Sample, args=rest, prog="minidiff sample", default=default)
    settings.check()
    output_files(settings, origin.path)
    for note in check_origin(origin, vars(settings)):
        warnings.warn(note, stacklevel=1)
    return settings


def run(argv: list[str]) -> None:
    """What the command line asks for."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
    elif argv[1:2] in (["-h"], ["--help"]) and argv[0] in ("train", "data", "merge"):
        print(usage(argv[0]))
    elif argv[0] == "--version":
        from minidiff import __version__

        print(f"minidiff {__version__}")
    else:
        settings, function = parse(argv)
        function(settings)


def usage(group: str = "") -> str:
    """All commands, or those of a `group` such as train: a line for each, with the first line of its settings' docstring."""
    from minidiff.cli.commands import COMMANDS

    table = {name: (kind.__doc__ or "").partition("\n")[0] for name, (kind, _) in COMMANDS.items()}
    lines = [f"  minidiff {name:<23} {about}" for name, about in table.items() if name.startswith(f"{group} ".lstrip())]
    head = "minidiff: Stable Diffusion you can read, and fine-tune."
    return "\n".join([head, "", *lines, "", f"  minidiff {group} COMMAND --help: its flags".replace("  C", " C")])


def main(argv: list[str] | None = None) -> None:
    """The entry point: every error a person can mend becomes a message, and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
    warnings.showwarning = lambda message, *_: print(f"Note: {printable(str(message))}", file=sys.stderr)
    try:
        try:
            with stopped_cleanly():
                run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout:  # None where it is closed
                sys.stdout.flush()  # here, where a broken pipe can still be caught
    except BrokenPipeError:  # whoever read our output has left, as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        sys.exit(128 + 13)
    except OSError as error:
        where = f"{printable(str(error.filename))}: " if error.filename else ""
        print(f"minidiff: {where}{error.strerror or error}. Check the path, the rights and the room there.", file=sys.stderr)
        sys.exit(2)
    except MinidiffError as error:
        print(f"minidiff: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"minidiff: out of memory. {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def stopped_cleanly() -> Iterator[None]:
    """Ctrl-C and SIGTERM leave through every clean-up, so that no half of a file and no child process stays.

    (While it trains they save the state: trainer/guards.py.) What is raised on the way does not matter: a library that is
    being imported can make any error of an interruption.
    """
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread only
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
