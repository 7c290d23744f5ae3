"""What `minidiff --help` says, in a file of its own: it is asked for often, and the settings take a while to import."""

SUMMARIES = {
    "sample": "Draw pictures from a prompt, or with --from PICTURE.png as that one was drawn; other flags win.",
    "sheet": "Draw a labelled contact sheet over any two settings; or prompts before and after what was learned.",
    "morph": "Draw a seamless loop through keyframes: prompts, seeds, or both.",
    "filmstrip": "Show how a picture comes out of the noise: what the network sees, and what it believes, step by step.",
    "attention": "Show where the network looks for each word of the prompt.",
    "tokens": "Show how CLIP splits a prompt: tokens, weights, chunks, and what training would cut off.",
    "train full": "Fine-tune every weight of the U-Net, and of the text encoder if asked.",
    "train dreambooth": "Teach the whole model a subject, while it rehearses the subject's class (DreamBooth).",
    "train lora": "Teach a frozen model a subject or a style through small additions to its layers (LoRA, DoRA).",
    "train textual_inversion": "Teach a frozen model one new word: only the word's vectors are learned (textual inversion).",
    "train pivotal": "Learn a new word and a LoRA together (pivotal tuning).",
    "data check": "Look over a folder of training pictures: list everything that is wrong with it, before training starts.",
    "inspect": "Say what a weight file is: its program and model family, ranks, trigger words, and what is odd about it.",
    "convert": "Write a file in another program's form, read it again, and say how far its numbers moved.",
    "merge bake": "Fold adapters into a model for good: a model folder or a single file that needs no LoRA any more.",
    "merge join": "Make one adapter of several, exactly; with --rank, as near as that rank comes.",
    "merge extract": "Get the adapter that leads from one model to a fine-tuned one.",
    "merge resize": "Cut an adapter to a lower rank, the best of that rank, and print what is lost.",
    "ladder": "Climb the whole ladder: train a subject by every method, and measure what each costs and does.",
    "lesson": "Run a lesson; its figures go into outputs/lessons.",
    "bench": 'Measure minidiff beside diffusers + peft on this machine; from a checkout, with pip install -e ".[bench]".',
    "pretrain": "Train the pocket checkpoint from nothing: a world is drawn, then VAE, CLIP and U-Net learn it.",
    "judge": "Score a pocket checkpoint: does it draw what held-out prompts say, and how sharp is its autoencoder?",
}  # the first lines of the commands' settings; a test holds them together


def usage(group: str = "") -> str:
    """All commands, or those of a `group` such as train, a line each."""
    names = [name for name in SUMMARIES if not group or name.startswith(f"{group} ")]
    lines = [f"  minidiff {name:<23} {SUMMARIES[name]}" for name in names]
    head = "minidiff: Stable Diffusion you can read, and fine-tune."
    return "\n".join([head, "", *lines, "", f"  minidiff {group and f'{group} '}COMMAND --help: its flags"])
