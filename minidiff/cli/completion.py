"""`minidiff completion`: Tab completes commands and flags in bash and zsh; elsewhere in the line it completes files."""

import os
from pathlib import Path

from minidiff.cli.commands import COMMANDS
from minidiff.cli.flags import Completion
from minidiff.cli.help import EXTRA, flags_of
from minidiff.cli.main import found
from minidiff.core.errors import SettingsError

STARTUP = {"bash": ".bashrc", "zsh": ".zshrc"}
SCRIPT = """_minidiff() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words=
  case "${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _minidiff minidiff
"""
ZSH = "autoload -U compinit bashcompinit && compinit && bashcompinit\n"  # zsh reads bash's functions


def completion(s: Completion) -> None:
    """Write the script, and have the shell read it when it starts."""
    shell = s.shell or Path(os.environ.get("SHELL", "")).name
    if shell not in STARTUP:
        raise SettingsError(f'your shell is "{shell}"; say which one to complete in: minidiff completion bash, or zsh')
    script, startup = Path.home() / ".config" / "minidiff" / f"completion.{shell}", Path.home() / STARTUP[shell]
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(script_of(shell), encoding="utf-8")
    line = f'source "{script}"'
    if line not in (startup.read_text(encoding="utf-8") if startup.exists() else ""):
        with startup.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    print(f"{script}: written; {startup} reads it.\nIt works in each new terminal; in this one after: {line}")


def script_of(shell: str) -> str:
    """A line for each command with its flags, one for each group with its commands, and one for the first word."""
    cases, words = list[str](), {" ": ["--help", "--version"]}  # "train " -> what may follow
    for name, (kind, _, _) in COMMANDS.items():
        first, *second = name.split()
        words[" "] = list(dict.fromkeys([first, *words[" "]]))
        words.setdefault(f"{first} ", []).extend(second)
        flags = ["--help", EXTRA.get(first, ("",))[0].split(" ")[0]]
        flags += [f"--{flag}" for flag, (_, _, positional) in flags_of(found(kind)).items() if not positional]
        cases.append(f'    "{name} "*) if [[ $current == -* ]]; then words="{" ".join(flags)}"; fi ;;')
    cases += [f'    "{said}") words="{" ".join(follow)}" ;;' for said, follow in words.items()]
    return (ZSH if shell == "zsh" else "") + SCRIPT.format(cases="\n".join(cases))
