"""Help, completion, and what the command line makes of words: groups, unquoted prompts, flags of other programs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minidiff.cli.draw_flags import Sample, Sheet
from minidiff.cli.flags import Bench, Completion, Join
from minidiff.cli.help import GROUPS
from minidiff.cli.main import COMMANDS, FIRST, found, main
from minidiff.cli.words import flags_of, settings_of, values_of
from minidiff.core.errors import SettingsError
from minidiff.files.values import ELSEWHERE, texts_of
from minidiff.trainer.settings import LoRASettings

README = Path(__file__).parents[2] / "README.md"
COMMON = "negative_prompt num_images_per_prompt num_inference_steps guidance_scale sampler seed width height lora output"


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    main([*name.split(), "--help"])
    return capsys.readouterr().out


# --- the help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_shown_once_with_a_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said, kind = help_of(name, capsys), found(COMMANDS[name][0])
    shown = [left.strip("-[").removeprefix("no_]").lower() for left in re.findall(r"^  (-\S+|[A-Z_]+)", said, re.MULTILINE)]
    assert [one for one in shown if one not in ("from", "config")] and sorted(shown) == sorted(
        [*flags_of(kind), *(["from"] if name == "sample" else ["config"] if name.startswith("train ") else [])]
    )
    assert set(texts_of(kind)) >= set(flags_of(kind)) and max(map(len, said.splitlines())) <= 120


def test_common_flags_stand_first_and_groups_follow(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of("sample", capsys).splitlines()
    flags = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert flags[:10] == COMMON.split()
    assert [line for line in lines if line in GROUPS] == [heading for heading in GROUPS if heading in lines]
    assert lines.index("Common") < lines.index("Sampler") < lines.index("Speed and memory")
    assert "(25)" in " ".join(lines) and "(outputs/picture.png)" in " ".join(lines)


def test_groups_and_other_names_name_flags_that_there_are() -> None:
    known = {flag for kind, _, _ in COMMANDS.values() for flag in flags_of(found(kind))} | {"resize"}
    assert set(" ".join([*GROUPS.values(), *ELSEWHERE.values()]).split()) <= known
    listed = " ".join(GROUPS.values()).split()
    assert len(listed) == len(set(listed))


def test_flags_of_the_readme_are_written_as_in_the_help() -> None:
    known = {flag for kind, _, _ in COMMANDS.values() for flag in flags_of(found(kind))}
    written = set(re.findall(r"minidiff [a-z]+ .*? --([a-z_]+)", README.read_text()))
    assert written - {"help", "from", "config"} <= known


def test_minidiff_alone_shows_five_things_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out.strip() == FIRST
    lines = [line.strip() for line in FIRST.splitlines() if line.startswith("  minidiff ") and "--help" not in line]
    assert len(lines) == 5
    for words in (re.sub(r'"[^"]*"', "TEXT", line).split()[1:] for line in lines):
        name = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
        settings_of(name, found(COMMANDS[name][0]), words[len(name.split()) :])


def test_lessons_are_listed_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    main(["lesson"])
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()]
    numbers = [int(number) for number, _ in listed]
    assert numbers == sorted(numbers) and len(numbers) >= 4 and ["5", "samplers"] in listed


# --- the words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["a", "red", "dog", "--seed", "3"], {"prompt": "a red dog", "seed": 3}),
        (["--seed", "3", "a", "red", "dog"], {"prompt": "a red dog", "seed": 3}),
        (["--plain", "a", "dog", "--seed=3"], {"prompt": "a dog", "plain": True, "seed": 3}),
        (["a red dog", "--lora", "x", "y"], {"prompt": "a red dog", "lora": ("x", "y")}),
        (["dog", "--seed", "-1"], {"prompt": "dog", "seed": -1}),
        (["dog", "--no-plain", "--width", "None", "--lora"], {"prompt": "dog", "plain": False, "width": None, "lora": ()}),
        (["dog", "--eta", "1e-1", "--use-karras-sigmas", "True"], {"prompt": "dog", "eta": 0.1, "use_karras_sigmas": True}),
        (["--seed=3", "--seed", "4", "--negative-prompt", "None"], {"seed": 4, "negative_prompt": "None"}),
    ],
)
def test_a_prompt_without_quotes_is_one_prompt(words: list[str], values: dict[str, object]) -> None:
    assert values_of("sample", Sample, words) == values


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        (Sample, ["a dog", "--steps", "3"], "--num_inference_steps?"),
        (Sample, ["a dog", "--stepps", "3"], "--num_inference_steps?"),
        (LoRASettings, ["--steps", "3"], "--max_train_steps?"),
        (Sample, ["a dog", "--cfg-scale", "3"], "--guidance_scale?"),
        (Sample, ["a dog", "--no_seed"], "--no_seed is no flag"),
        (Sample, ["a dog", "--seed", "x"], "--seed must be a whole number; it is 'x'."),
        (Sample, ["a dog", "--lora_weight", "1", "a"], "--lora_weight must be a number; it is 'a'."),
        (Sample, ["a dog", "--seed"], "--seed: expected one argument"),
        (Sample, ["a dog", "--no_plain=True"], "--plain: expected one argument"),
        (Sample, ["a", "dog", "-n", "3"], "-n is no flag of minidiff it; flags begin with two dashes"),
        (Sample, ["a dog", "--hint", "cany"], """--hint is one of canny; not 'cany'. Did you mean "canny"?"""),
        (Sample, ["a dog", "--prediction_type=v"], 'Did you mean "v_prediction"?'),
        (Sample, ["a dog", "--use_karras_sigmas", "true"], 'Did you mean "True"?'),
        (Bench, ["--only", "unett"], 'Did you mean "unet"?'),
        (Completion, ["zhs"], 'Did you mean "zsh"?'),
        (Sample, ["--seed", "3"], "needs a prompt, before its flags"),
        (Join, ["--rank", "3"], "needs --output and --lora. "),
        (Sample, ["--prompt", "a dog"], "stands alone"),
        (Sheet, ["a", "dog", "a", "cat"], "in quotes"),
        (Sample, ["a dog", "a cat"], "draws one prompt, and these are 2; minidiff sheet draws several"),
        (LoRASettings, ["--instance_prompt", "a", "sks", "dog"], "quotes"),
    ],
)
def test_words_that_do_not_fit(kind: type, words: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(says)):
        settings_of("it", kind, words)


def test_flags_that_are_on_or_off() -> None:
    """The word True or False belongs to such a flag; any other is the prompt's, and so is all behind two dashes."""
    assert values_of("sample", Sample, ["--plain", "dog"]) == {"plain": True, "prompt": "dog"}
    assert values_of("sample", Sample, ["a", "dog", "--plain", "False"]) == {"plain": False, "prompt": "a dog"}
    assert values_of("sample", Sample, ["--no_plain", "--", "--a", "-b"]) == {"plain": False, "prompt": "--a -b"}


def test_one_word_prompts_are_several() -> None:
    assert values_of("sheet", Sheet, ["dog", "cat"]) == {"prompts": ("dog", "cat")}


# --- completion --------------------------------------------------------------------------------------------------------


def test_completion_is_installed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("SHELL", "/usr/bin/bash")
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'\n")
    for _ in range(2):
        main(["completion"])
    rc = (tmp_path / ".bashrc").read_text()
    assert rc.startswith("alias ll='ls -l'\n") and rc.count("source ") == 1
    main(["completion", "zsh"])
    assert "bashcompinit" in (tmp_path / ".config" / "minidiff" / "completion.zsh").read_text()
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(SystemExit):
        main(["completion"])
    assert "tcsh" in capsys.readouterr().err
    main(["completion", "bash"])
    monkeypatch.setenv("PYTHONPATH", str(README.parent))
    monkeypatch.setenv("HOME", str(tmp_path))
    for shell, as_completion_does in {"bash": "", "zsh": "emulate ksh; "}.items():
        for line, wanted in {
            "minidiff tr": ["train"],
            "minidiff train p": ["pivotal"],
            "minidiff sample --num_i": ["--num_images_per_prompt", "--num_inference_steps"],
            "minidiff train lora --con": ["--config"],
            "minidiff sample dog": [],
        }.items():
            script = f"source {tmp_path}/.config/minidiff/completion.{shell}; {as_completion_does}"
            script += f'minidiff() {{ {sys.executable} -m minidiff "$@"; }}; COMP_WORDS=({line}); '
            script += f'COMP_CWORD={len(line.split()) - 1}; _minidiff; printf "%s\\n" "${{COMPREPLY[@]}}"'
            if shutil.which(shell):
                done = subprocess.run([shell, "-c", script], capture_output=True, text=True)
                fitting = [word for word in done.stdout.split() if word.startswith(line.split()[-1])]  # zsh leaves it to Tab
                assert fitting == wanted and not done.stderr, (shell, line, done.stderr)


# --- where pictures go -------------------------------------------------------------------------------------------------


def test_the_default_output_takes_the_next_free_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = ["sample", "a", "dog", "--num_inference_steps", "1", "--pretrained_model_name_or_path", str(tiny_folder)]
    main(draw)
    first = (tmp_path / "outputs" / "picture.png").read_bytes()
    main([*draw, "--seed", "1"])
    main([*draw, "--num_images_per_prompt", "2"])
    main([*draw, "--seed", "2", "--output", "outputs/picture-0002.png"])  # a name that is given is taken
    assert (tmp_path / "outputs" / "picture.png").read_bytes() == first
    names = ["picture.png", "picture-0002.png", "picture-0003-0.png", "picture-0003-1.png", "picture-0002.png"]
    assert capsys.readouterr().out.split() == [f"outputs/{name}" for name in names]


def test_help_of_a_command_needs_no_torch() -> None:
    code = "import sys; from minidiff.cli.main import main; main(['train', 'lora', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "False"
