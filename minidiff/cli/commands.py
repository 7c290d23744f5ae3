"""The table of all commands: text alone, so that `minidiff --help` imports nothing else."""

COMMANDS: dict[str, tuple[str, str, str]] = {  # typed -> flags (file:class), function (of cli/, or with its room), help
    "sample": ("cli.draw_flags:Sample", "draw_commands:sample", "Draw pictures from a prompt; or, with --from, one again."),
    "sheet": ("cli.draw_flags:Sheet", "draw_commands:sheet", "Draw a labelled contact sheet over one or two settings."),
    "morph": ("cli.draw_flags:Morph", "draw_commands:morph", "Draw a loop through prompts, seeds, or both."),
    "filmstrip": ("cli.draw_flags:Filmstrip", "draw_commands:filmstrip", "Show how a picture appears from noise."),
    "attention": ("cli.draw_flags:Attention", "draw_commands:attention", "Show where the U-Net looks for each word."),
    "tokens": ("cli.draw_flags:Tokens", "draw_commands:tokens", "Show how CLIP splits a prompt."),
    "train full": ("trainer.settings:FullSettings", "train_commands:train", "Fine-tune all weights."),
    "train dreambooth": ("trainer.settings:DreamBoothSettings", "train_commands:train", "Teach all weights a subject."),
    "train lora": ("trainer.settings:LoRASettings", "train_commands:train", "Teach a subject or a style with a small adapter."),
    "train textual_inversion": ("trainer.settings:TextualInversionSettings", "train_commands:train", "Teach a new word."),
    "train pivotal": ("trainer.settings:PivotalSettings", "train_commands:train", "Teach a new word and a LoRA together."),
    "train controlnet": ("trainer.settings:ControlNetSettings", "train_commands:train", "Teach to follow edges, depth, …"),
    "train ip_adapter": ("trainer.settings:IPAdapterSettings", "train_commands:train", "Teach to draw what a picture shows."),
    "data check": ("cli.flags:DataCheck", "train_commands:data_check", "List all problems of a folder of training pictures."),
    "watch": ("cli.flags:Watch", "train_commands:watch", "Show the sheets and the loss curve of a training run as it goes."),
    "inspect": ("cli.flags:Inspect", "files_commands:inspect", "Describe a weight file: program, family, ranks, problems."),
    "convert": ("cli.flags:Convert", "files_commands:convert", "Write a weight file in another program's format."),
    "merge bake": ("cli.flags:Bake", "files_commands:bake", "Add adapters to a model's weights."),
    "merge join": ("cli.flags:Join", "files_commands:join", "Make one adapter from several."),
    "merge extract": ("cli.flags:Extract", "files_commands:extract", "Make an adapter from the difference of two models."),
    "merge resize": ("cli.flags:Resize", "files_commands:resize", "Reduce an adapter to a lower rank."),
    "ladder": ("pocket.settings:LadderSettings", "train_commands:ladder", "Train a subject with every method; compare them."),
    "forgetting": ("pocket.settings:ForgettingSettings", "train_commands:forgetting", "Plot what methods learn and forget."),
    "lesson": ("cli.flags:Lesson", "train_commands:lesson", "List the lessons, or run one."),
    "bench": ("cli.flags:Bench", "train_commands:bench", "Compare minidiff with diffusers + peft on this machine."),
    "pretrain": ("pocket.settings:PretrainSettings", "pocket.pretrain:pretrain", "Train the pocket checkpoint from scratch."),
    "judge": ("pocket.settings:JudgeSettings", "pocket.judge:judge", "Score a pocket checkpoint."),
    "completion": ("cli.flags:Completion", "completion:completion", "Let Tab complete commands and flags in your shell."),
}


FIRST = """minidiff: Stable Diffusion you can read, and fine-tune. Five things to try:

  minidiff sample "a photo of a red dog on the beach"
  minidiff sheet "a red house in the snow" --columns guidance_scale=1,3,8 --rows seed=0..2
  minidiff morph "a photo of a red dog" "a photo of a blue cat"
  minidiff train lora --preset object --instance_data_dir lessons/data/dog --instance_prompt "a photo of a sks dog"
  minidiff lesson 0

  minidiff --help: all commands"""


def usage(group: str = "") -> str:
    """All commands, or those of a `group` such as train."""
    first = f"{group} " if group else ""
    lines = [f"  minidiff {name:<23} {about}" for name, (_, _, about) in COMMANDS.items() if name.startswith(first)]
    head = "minidiff: Stable Diffusion you can read, and fine-tune."
    return "\n".join([head, "", *lines, "", f"  minidiff {first}COMMAND --help: its flags"])
