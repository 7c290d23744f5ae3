"""Bad input, case by case: sampling and training. Each message says what is wrong, where, and what to do.

The cases are numbered 1 to 25; those about files are in test_bad_input_files.py.

    case                                             test here                also, from near
    11  --placeholder_token                          case_11                  test_textual_inversion: not_every_word_will_do
    12  long prompts, prompt weights                                          test_text: 75_tokens_pass_and_the_76th_is_quoted
    13  the size of weights                          not here
    14  sides, steps; strength                       case_14                  test_cli: wrong_sampling; test_grids: strength
    15  an unknown sampler; LCM, Karras, turbo       case_15                  test_grids: unknown_sampler, karras
    16  eps and v                                    case_16                  test_validation: predicts_something_else
    17  no pictures, small or damaged ones           case_17 (three)          test_latents: all_bad_pictures; test_check_data
    18  metadata.jsonl                               case_18                  test_dataset: bad_metadata, bad_folder
    19  prior preservation                           case_19 (two)            test_priors: bad_settings, bad_class_folders
    20  rank, targets, alpha, rates, accumulation    case_20                  test_inject: bad_settings; test_methods; test_cli
    21  resume with other things, folders in use     case_21 (two)            test_loop: resume_refuses; test_checkpoint
    22  no GPU, number formats, out of memory        case_22 (four)           test_loop; test_cli; test_savings: memory
    23  numbers that break                           case_23                  test_loop: three_broken_steps, culprit, not_saved
    24  several adapters, merging twice, DoRA        case_24 (three)          test_inject; test_merging: bake_of_dora
    25  ControlNet, IP-Adapter                       no such thing yet
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_bad_input_files import GOOD, TO_K, here, pipe, sample, written  # noqa: F401
from test_cli import refused
from tiny_recipes import draw_pictures

import minidiff.__main__
from minidiff.cli.main import main
from minidiff.core.errors import AdapterError, SettingsError
from minidiff.core.grids import SAMPLERS
from minidiff.core.recipes import DiffusionLoss
from minidiff.core.schedule import add_noise
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.weights import read_header, save
from minidiff.trainer import checkpoint
from minidiff.trainer.task import check_precision

Said = Callable[..., str]
WORD: dict[str, Any] = {"method": "textual_inversion", "data": "--instance_data_dir"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """picture-0.png, picture-1.png and picture-2.png."""
    return draw_pictures(tmp_path / "pictures")


def command(model: Path, pictures: Path, out: Path, *flags: object, method: str = "lora", data: str | None = None) -> list[str]:
    """A short training run of the tiny model; the pictures have one prompt, or only the flag `data` names them."""
    prompt = ["--instance_prompt", "a photo of a sks dog"] if data is None else []
    named = [data or "--instance_data_dir", str(pictures), *prompt]
    few = "--resolution 16 --max_train_steps 2 --train_batch_size 2 --validation_steps 0 --device cpu".split()
    where = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(out)]
    return ["train", method, *where, *named, *few, *map(str, flags)]


@pytest.fixture
def says(tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """What `minidiff train` says to some flags, where it must refuse; no checkpoint may be left."""

    def refuse(*flags: object, **other: Any) -> str:
        said = refused(capsys, command(tiny_folder, pictures, tmp_path / "out", *flags, **other))
        assert not list((tmp_path / "out").glob("*"))
        return said

    return refuse


# --- words, sides, samplers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("my dog", '--placeholder_token: "my dog" has a space in it; a new word is one word. Take a word of your own'),
        ("dog", '--placeholder_token: "dog" is in the model\'s vocabulary already, and its meaning would be overwritten'),
        ("", "--placeholder_token must be a new word such as <my-dog>; it is ''"),
    ],
)
def test_case_11_words_to_learn(says: Said, word: str, message: str) -> None:
    assert message in says("--placeholder_token", word, "--initializer_token", "dog", **WORD)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--width", "33", "width is 33; it must be a multiple of 2 up to 8192"),
        ("--width", "0", "--width must lie in 1 … 8192; it is 0"),
        ("--height", "-8", "--height must lie in 1 … 8192; it is -8"),
        ("--num_inference_steps", "0", "--num_inference_steps must lie in 1 … 1000; it is 0"),
        ("--num_inference_steps", "1001", "--num_inference_steps must lie in 1 … 1000; it is 1001"),
    ],
)
def test_case_14_sides_and_steps(
    flag: str, value: str, message: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, sample(tiny_folder, flag, value))


@pytest.mark.parametrize(("name", "hint"), [("eulera", ' Did you mean "euler_a"?'), ("karras", ""), ("", "")])
def test_case_15_unknown_samplers(name: str, hint: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, sample(tiny_folder, "--sampler", name))
    assert f'sampler "{name}" is unknown; it is one of ' in said and hint in said and all(one in said for one in SAMPLERS)


# --- the base and the pictures -------------------------------------------------------------------------------------------


def test_case_16_scheduler_of_another_prediction_type(says: Said, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny U-Net has learnt nothing; here it answers with v = √ᾱ ε - √(1 - ᾱ) x0, as far as the check can see."""
    v = lambda loss, b: [add_noise(loss.schedule, b["noise"], -b["latents"], b["t"])]  # noqa: E731
    monkeypatch.setattr(DiffusionLoss, "predict", v)
    message = says()
    assert 'scheduler_config.json says prediction_type "epsilon", but the U-Net answers with "v_prediction"' in message
    assert 'Set prediction_type to "v_prediction" there' in message


def test_case_17_no_pictures(says: Said, pictures: Path, tmp_path: Path) -> None:
    for path in pictures.iterdir():
        path.rename(path.with_suffix(".heic"))
    assert f"{pictures} has no pictures (.png, .jpg" in (said := says()) and "it holds .heic" in said
    shutil.rmtree(pictures)
    assert f"{pictures}: there is no such folder. Give that of the pictures" in says()


def test_case_17_bad_pictures_are_all_listed(says: Said, pictures: Path) -> None:
    Image.new("RGB", (4, 4)).save(pictures / "picture-0.png")
    (pictures / "picture-1.png").write_bytes((pictures / "picture-1.png").read_bytes()[:60])
    said = says()
    assert "2 of 3 pictures cannot be used" in said and "or leave them out with --skip_bad" in said
    assert f"{pictures}/picture-0.png: 4 x 4 pixels are too few for --resolution 16" in said
    assert f"{pictures}/picture-1.png: damaged or cut short" in said
    (pictures / "picture-2.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    said = says("--skip_bad")  # of no use where none is left
    assert "3 of 3 pictures" in said and "leave them out" not in said
    assert "picture-2.png: not a picture" in said and "A git-LFS pointer: run `git lfs pull`" in said


def test_case_17_skip_bad_goes_on_with_the_others(
    tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "picture-1.png").write_bytes(b"no picture")
    main(command(tiny_folder, pictures, tmp_path / "out", "--skip_bad"))
    assert f"Note: 1 of 3 pictures cannot be used:\n  {pictures}/picture-1.png" in capsys.readouterr().err
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


ROW = {"file_name": "picture-0.png", "text": "a dog"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{json.dumps(ROW)}\n{{oops", "line 2: not JSON"),
        (json.dumps(ROW, indent=1), "Write one object per line, such as"),
        ('{"text": "a dog"}', 'line 1: no "file_name" that names a file in'),
        ('{"file_name": null, "text": "a dog"}', 'line 1: no "file_name" that names a file in'),
        ('{"file_name": "pictur-0.png", "text": "a"}', "line 1: there is no file 'pictur-0.png' in"),
        (f"{json.dumps(ROW)}\n{json.dumps(ROW)}", "line 2: 'picture-0.png' was already on line 1"),
        ('{"file_name": "picture-0.png", "a": "x", "b": "y"}', "Say so with --caption_column; it has file_name, a, b"),
        (json.dumps(ROW | {"text": " "}), 'line 1: "text" is empty. For samples without a prompt'),
        (json.dumps(ROW | {"text": 3}), 'line 1: "text" is 3, not a text in quotes'),
        (json.dumps(ROW | {"text": None}), 'line 1: "text" is None, not a text in quotes'),
    ],
)
def test_case_18_metadata(says: Said, pictures: Path, text: str, message: str) -> None:
    (pictures / "metadata.jsonl").write_text(f"{text}\n")
    said = says(data="--train_data_dir")
    assert f"{pictures / 'metadata.jsonl'}" in said and message in said


# --- settings ------------------------------------------------------------------------------------------------------------

PRIOR = ("--with_prior_preservation", "--class_prompt", "a photo of a dog", "--class_data_dir")


def test_case_19_prior_preservation(says: Said, pictures: Path, tmp_path: Path) -> None:
    assert '--with_prior_preservation needs --class_prompt, such as "a photo of a dog"' in says(PRIOR[0])
    said = says(*PRIOR[:3])
    assert "needs --class_data_dir, where the base draws missing pictures" in said and "--prior_from_base" in said
    said = says(*PRIOR, tmp_path / "class", "--prior_loss_weight", "-1")
    assert "--prior_loss_weight must not be negative; it is -1.0" in said
    assert "--class_data_dir is the folder of the training pictures, too: give another" in says(*PRIOR, pictures)


def test_case_19_class_pictures_among_the_results(says: Said, tmp_path: Path) -> None:
    """Refused before they are drawn, not after."""
    said = says(*PRIOR, tmp_path / "out" / "class")
    assert "--class_data_dir lies in --output_dir, which is for what minidiff writes; it is" in said


def test_case_19_no_class_pictures_and_none_drawn(says: Said, tmp_path: Path) -> None:
    said = says(*PRIOR, tmp_path / "class", "--num_class_images", "0")
    assert f"{tmp_path / 'class'} has no class pictures, and --num_class_images 0 draws none; give a number" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rank", "0"), "--rank must be at least 1; it is 0"),
        (("--rank", "999"), "rank 999 is not possible for down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        (("--rank", "999"), "it can be 1 to 16"),
        (("--lora_targets", "to_out"), 'Did you mean "to_out.0"?'),
        (("--lora_targets", "atention"), 'target "atention" matches no linear layer or convolution of UNet2D'),
        (("--lora_targets", "atention"), 'Did you mean "attention"?'),
        (("--lora_alpha", "0"), "--lora_alpha must be a number above 0; it is 0.0"),
        (("--learning_rate", "0"), "--learning_rate must be a number above 0; it is 0.0"),
        (("--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps must lie in 1 … 4096; it is 0"),
        (("--gradient_accumulation_steps", "1" + "0" * 30), "--gradient_accumulation_steps must lie in 1 … 4096; it is 1000"),
    ],
)
def test_case_20_numbers_and_targets(says: Said, flags: tuple[str, str], message: str) -> None:
    assert message in says(*flags)


def test_a_word_of_so_many_vectors_that_it_is_cut_off(says: Said) -> None:
    """75 tokens is all that CLIP reads; the sentences of the templates have some of their own."""
    said = says("--initializer_token", "dog", "--num_vectors", "75", **WORD)
    assert "--num_vectors 75: in \"" in said and "the new word itself is cut off, as CLIP reads 75 tokens" in said


# --- runs ----------------------------------------------------------------------------------------------------------------


def test_case_21_resume_lists_everything_that_differs(
    tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    main(command(tiny_folder, pictures, out))
    before = (out / "pytorch_lora_weights.safetensors").read_bytes()
    unet = other / "unet" / "diffusion_pytorch_model.safetensors"
    save(read_header(unet).read() | {"conv_in.bias": torch.ones(16)}, unet)
    (pictures / "picture-2.png").unlink()
    flags = ("--resume_from_checkpoint", "latest", "--rank", "3", "--lora_targets", "to_q")
    said = refused(capsys, command(other, pictures, out, *flags))
    assert f"{out / 'checkpoint-2'} was made with other settings or data:" in said
    settings = ("rank: was 4, is now 3", 'lora_targets: was ["attention"], is now ["to_q"]')
    assert all(f"\n  {what}" in said for what in (*settings, "base: was", "pictures: was 3, is now 2", "data: was"))
    assert "Set these back, or start in another --output_dir" in said
    said = refused(capsys, command(tiny_folder, pictures, out))
    assert f"--output_dir {out} holds an earlier run. Go on with --resume_from_checkpoint latest, start over with" in said
    assert (out / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_case_21_a_foreign_folder_is_not_even_overwritten_on_demand(
    tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir(), (tmp_path / "mine" / "thesis.tex").write_text("x")
    said = refused(capsys, command(tiny_folder, pictures, tmp_path / "mine", "--overwrite_output_dir"))
    assert "holds other files (thesis.tex) and no train_config.toml of an earlier run; choose a new or an empty folder" in said
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_case_22_no_gpu(says: Said, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "--device cuda: there is no GPU that torch can use here; leave the flag out, or say cpu"
    assert message in says("--device", "cuda")
    assert message in refused(capsys, sample(tiny_folder, "--device", "cuda"))


def test_case_22_fp16_on_the_cpu(says: Said) -> None:
    assert "--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no" in says("--mixed_precision", "fp16")


def test_case_22_bf16_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(SettingsError, match="--mixed_precision bf16 is more than this GPU can do; use fp16"):
        check_precision("bf16", "cuda")


def test_case_22_out_of_memory(says: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest remedy comes first."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", full)
    said = says()
    hints = ["--train_batch_size 1", "--gradient_accumulation_steps", "--mixed_precision bf16", "--resolution", "--rank"]
    assert "out of memory. What helps, the cheapest first" in said and "Checkpoints already written are whole" in said
    assert [said.index(hint) for hint in hints] == sorted(said.index(hint) for hint in hints)


def test_case_23_numbers_that_break(
    tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--learning_rate", "1e30", "--max_train_steps", "9", "--checkpointing_steps", "1")
    said = refused(capsys, command(tiny_folder, pictures, tmp_path / "out", *flags))
    assert "3 updates in a row without a finite loss and gradient (step 4: loss nan, learning rate 1e+30)" in said
    assert "The first broken gradient is that of unet." in said
    assert "Nothing was saved over. The last good checkpoint is" in said and "Try a lower --learning_rate" in said
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    for path in checkpoint.checkpoints(tmp_path / "out"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.load(path)[1]["weights"].values())


@pytest.mark.parametrize("flag", ["--noise_offset", "--lora_alpha"])
def test_case_23_numbers_that_break_every_update(
    flag: str, tiny_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, command(tiny_folder, pictures, tmp_path / "out", flag, "1e300"))
    assert "2 updates in a row without a finite loss and gradient (step 2: loss" in said
    assert "No checkpoint had been saved yet" in said and not list((tmp_path / "out").rglob("*.safetensors"))


# --- several adapters ----------------------------------------------------------------------------------------------------


def test_case_24_names_and_weights(
    pipe: StableDiffusionPipeline,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(tmp_path / "dog.safetensors", GOOD)
    pipe.load_lora_weights(path, adapter_name="dog")
    with pytest.raises(AdapterError, match='an adapter called "dog" is there already; choose another name'):
        pipe.load_lora_weights(path, adapter_name="dog")
    with pytest.raises(AdapterError, match=r"adapters \['dog'\], weights \[1.0, 0.5\]: each adapter needs one"):
        pipe.set_adapters(["dog"], [1.0, 0.5])
    for argv in (["merge", "join", "--output", "new.safetensors"], ["merge", "bake", "--output", "new"]):
        said = refused(capsys, [*argv, "--lora", str(path), "--lora_weight", "1", "2"])
        assert "--lora_weight has 2 numbers for 1 LoRAs; give one for each" in said


def test_case_24_merging_twice(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:  # noqa: F811
    pipe.load_lora_weights(written(tmp_path / "dog.safetensors", GOOD))
    pipe.fuse_lora()
    with pytest.raises(AdapterError, match=r"the adapters are merged already; unmerge \(unfuse_lora\) first"):
        pipe.fuse_lora()
    pipe.unfuse_lora()
    with pytest.raises(AdapterError, match="nothing is merged, so there is nothing to unmerge"):
        pipe.unfuse_lora()


def test_case_24_dora_at_another_weight(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dora = str(written(tmp_path / "dora.safetensors", GOOD | {f"unet.{TO_K}.lora_magnitude_vector": (16,)}))
    main(["merge", "bake", "--pretrained_model_name_or_path", str(tiny_folder), "--lora", dora]
         + ["--lora_weight", "0.5", "--output", "baked"])  # fmt: skip
    assert Path("baked").is_dir()
    said = refused(capsys, ["merge", "join", "--lora", dora, dora, "--output", "joined.safetensors"])
    assert "is DoRA, whose change is no product B A; it cannot be joined or cut. Bake it into the model" in said
    assert not Path("joined.safetensors").exists()


# --- being stopped (while it trains: test_loop) --------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_class_pictures_are_drawn(
    number: signal.Signals, code: int, tiny_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a file: it is removed, and the one before it stays."""
    plain, count = Image.Image.save, iter(range(9))

    def save_half(image: Image.Image, file: Any, **how: Any) -> None:
        if next(count) == 1:
            file.write(b"half of")
            os.kill(os.getpid(), number)
        plain(image, file, **how)

    monkeypatch.setattr(Image.Image, "save", save_half)
    before = signal.signal(number, signal.SIG_IGN)  # else a mistake here would end pytest
    try:
        with pytest.raises(SystemExit) as leave:
            main(command(tiny_folder, pictures, tmp_path / "out", *PRIOR, tmp_path / "class"))
        assert signal.getsignal(number) == signal.SIG_IGN  # as it was
    finally:
        signal.signal(number, before)
    assert leave.value.code == code and not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "class").iterdir()] == ["class-00000.png"]


def test_stopped_while_a_library_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """numpy and transformers make other errors of it, and these are no bugs of minidiff's."""

    def interrupted(argv: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module 'CLIPTextModel'") from None

    monkeypatch.setattr("minidiff.cli.main.run", interrupted)
    with pytest.raises(SystemExit) as leave:
        main([])
    assert leave.value.code == 130 and capsys.readouterr().err == "\nStopped.\n"


def test_stopped_before_anything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while minidiff.cli.main itself is imported."""

    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "minidiff.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "minidiff.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as leave:
        minidiff.__main__.main()
    assert leave.value.code == 130
