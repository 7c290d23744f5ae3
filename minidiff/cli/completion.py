"""`minidiff completion`: Tab completes commands and flags in bash and zsh, as --help lists them; elsewhere files."""

import os
from pathlib import Path

from minidiff.cli.flags import Completion
from minidiff.core.errors import SettingsError

STARTUP = {"bash": ".bashrc", "zsh": ".zshrc"}
SCRIPT = r"""_minidiff() {
  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[*]:1:$((COMP_CWORD - 1))}" names=
  [[ $COMP_CWORD -lt 3 ]] && names="s/^  minidiff ${before:+$before }([a-z_]+) .*/\1/p"
  [[ $current == -* ]] && names='s/^  --(\[no_\])?([a-z0-9_]+).*/--\2/p'
  COMPREPLY=($([[ $names ]] && compgen -W "--help $(minidiff $before --help | sed -nE "$names" | uniq)" -- "$current"))
}
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
    script.write_text(ZSH * (shell == "zsh") + SCRIPT, encoding="utf-8")
    line = f'source "{script}"'
    if line not in (startup.read_text(encoding="utf-8") if startup.exists() else ""):
        with startup.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    print(f"{script}: written; {startup} reads it.\nIt works in each new terminal; in this one after: {line}")
