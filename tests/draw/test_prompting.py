"""The prompt language: A1111's grammar, its warnings and their columns, and prompts that mean harm."""

import re
import warnings

import pytest
import torch

from minidiff.core.errors import SettingsError
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.draw.prompting import Part, Prompt, literal, parse_prompt


def quietly(prompt: str) -> Prompt:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parse_prompt(prompt)


def escape(text: str) -> str:
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def parts(prompt: str) -> list[tuple[str, float]]:
    (section,) = quietly(prompt).sections
    return [(part.text, part.weight) for part in section]


def notes(prompt: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parse_prompt(prompt)
    return [str(warning.message) for warning in caught]


A1111 = [  # the docstring of its parse_prompt_attention
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.5730000000000004),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641000000000006),
            (".", 1.1),
        ],
    ),
]
OURS = [
    ("[dog]", [("dog", 1 / 1.1)]),
    ("[[dog]]", [("dog", 1 / 1.21)]),
    ("a ([dog]) b", [("a dog b", 1.0)]),
    ("(dog:0)", [("dog", 0.0)]),
    ("(dog:+1.5)(cat:.5)(cow:2.)", [("dog", 1.5), ("cat", 0.5), ("cow", 2.0)]),
    ("(dog: 1.3 )", [("dog", 1.3)]),
    ("((red:1.2) dog:1.5)", [("red", 1.8), (" dog", 1.5)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),  # the two kinds are matched apart
    ("(style: oil paint)", [("style: oil paint", 1.1)]),
    (r"(\(red\) dog:1.2)", [("(red) dog", 1.2)]),
    (r"a \\(dog)", [("a \\", 1.0), ("dog", 1.1)]),
    (r"C:\new \o/", [("C:\\new \\o/", 1.0)]),  # A1111 drops these backslashes
    ("(<dog>:1.3) <my:cat>", [("<dog>", 1.3), (" <my:cat>", 1.0)]),
    ("()(dog)", [("dog", 1.1)]),
    ("a dog:1.2, 16:9 | at 10:30", [("a dog:1.2, 16:9 | at 10:30", 1.0)]),
    ("b:1.3) :)", [("b:1.3) :)", 1.0)]),
    ("a) b]", [("a) b]", 1.0)]),
    ("(dog:1.2.3)", [("dog:1.2.3", 1.1)]),  # A1111 crashes
    ("(dog:1,3) (cat:1e0)", [("dog:1,3", 1.1), (" ", 1.0), ("cat:1e0", 1.1)]),
    ("[red:blue:0.5] dog", [("red:blue:0.5", 1 / 1.1), (" dog", 1.0)]),  # A1111's prompt editing is not here
    ("[a|b] [d]", [("a|b", 1 / 1.1), (" ", 1.0), ("d", 1 / 1.1)]),
    ("cats AND dogs", [("cats AND dogs", 1.0)]),
    ("BREAKFAST, break, unBREAK", [("BREAKFAST, break, unBREAK", 1.0)]),
]


@pytest.mark.parametrize(("prompt", "want"), A1111 + OURS)
def test_weights(prompt: str, want: list[tuple[str, float]]) -> None:
    got = parts(prompt)
    assert [text for text, _ in got] == [text for text, _ in want]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in want], rel=1e-12, abs=0)


@pytest.mark.parametrize("text", ["a red dog, 1:2", " spaces\n and \t lines ", "Ünïcode 🐕 <dog> a\\b", "a|b {c} and -- d"])
def test_a_plain_prompt_is_untouched(text: str) -> None:
    assert parse_prompt(text) == Prompt(((Part(text, 1.0),),)) and not notes(text)


def test_an_empty_prompt_is_one_empty_section() -> None:
    assert parse_prompt("") == parse_prompt("()") == Prompt(((),))


def test_a_prompt_is_a_key() -> None:
    assert len({parse_prompt("a (b)"), parse_prompt("a (b:1.1)"), parse_prompt("a [b]")}) == 2


@pytest.mark.parametrize("text", ["a (b:1.3) c", r"\(a\)", "[a:b:0.5] [c|d] ((", "\\\\ \\o/ \\", "plain"])
@pytest.mark.parametrize("weight", [1.0, 0.5, 1.3])
def test_escape_comes_back_as_it_was(text: str, weight: float) -> None:
    assert parts(f"({escape(text)}:{weight})") == [(text, weight)]
    assert parts(escape(text)) == [(text, 1.0)] and not notes(escape(text))


# --- BREAK and LoRAs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("a red dog BREAK on a beach", [["a red dog"], ["on a beach"]]),
        ("a\nBREAK\nb   BREAK,c", [["a"], ["b"], [",c"]]),
        ("BREAK a", [[], ["a"]]),
        ("a BREAK", [["a"], []]),
        ("BREAK BREAK", [[], [], []]),
        ("(a BREAK b:1.3) c", [["a"], ["b", " c"]]),
        ("a (b) BREAK c", [["a ", "b"], ["c"]]),
        (r"a \(BREAK\) b", [["a ("], [") b"]]),
    ],
)
def test_break(prompt: str, want: list[list[str]]) -> None:
    assert [[part.text for part in section] for section in quietly(prompt).sections] == want


def test_weights_go_on_over_a_break() -> None:
    assert [section[0].weight for section in parse_prompt("(a BREAK b:1.3)").sections] == [1.3, 1.3]


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a dog <lora:chalk:0.8>", "a dog ", [("chalk", 0.8)]),
        ("<lora:chalk>a dog", "a dog", [("chalk", 1.0)]),
        ("<LoRA:my style(v2).safetensors:-1> a", " a", [("my style(v2).safetensors", -1.0)]),
        ("a<lora:a:1><lyco:b:2> <lora:a:.5>b", "a b", [("a", 1.0), ("b", 2.0), ("a", 0.5)]),
        ("a <lora : x>", "a <lora : x>", []),
    ],
)
def test_loras_are_taken_out(prompt: str, text: str, loras: list[tuple[str, float]]) -> None:
    prompt_ = quietly(prompt)
    assert "".join(part.text for part in prompt_.sections[0]) == text
    assert list(prompt_.loras) == loras


def test_a_lora_inside_brackets_leaves_them_alone() -> None:
    assert parts("(a <lora:x[1]:2>dog:1.3)") == [("a dog", 1.3)]


# --- what is not meant -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "columns", "says"),
    [
        ("a (red dog", '3 ("(red dog")', r"opening bracket without.*write \\\( or"),
        ("(a [b", '1 ("(a [b")', "opening bracket without"),
        ("a red) dog", '6 (") dog")', r"closing bracket without.*write \\\)"),
        ("a [dog:0.5]", '3 ("[dog:0.5]")', r"prompt editing.*written \(word:0.5\)"),
        ("a [b|c|d]", '3 ("[b|c|d]")', "alternation"),
        ("cats AND dogs", '6 ("AND dogs")', "AND are A1111's"),
        (")" * 9, '1 (")))))))))")', "closing bracket"),
        ("x" * 30 + "\n\n   ) " + "y" * 30, '36 (") yyyyyyyyyyyyyy")', "closing bracket"),
    ],
)
def test_warnings_name_the_column_and_what_to_do(prompt: str, columns: str, says: str) -> None:
    (note,) = notes(prompt)
    assert note.startswith(f"prompt, column {columns}: ")
    with pytest.warns(UserWarning, match=says):
        parse_prompt(prompt)


def test_a_warning_is_said_once_whoever_parses() -> None:
    """A command and the pipeline both parse what they are given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        parse_prompt("a (dog said once")
        parse_prompt("a (dog said once")
    assert len(caught) == 1


@pytest.mark.parametrize("prompt", [prompt for prompt, _ in A1111 if prompt.count("(") == prompt.count(")")] + ["(a :)"])
def test_nothing_is_said_of_good_prompts(prompt: str) -> None:
    assert not notes(prompt)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a <lora:x", "column 3: a LoRA tag has a name"),
        ("<lora:" * 20_000, "column 1: a LoRA tag"),
        ("(" * 10000 + "dog", "column 10001.*multiply to inf; use fewer"),
        ("a <lora:x:heavy>", "column 3: a LoRA tag has a name and one weight"),
        ("a <lora:x:nan>", "one weight"),
        ("a <lora:x:>", "one weight"),
        ("a <lora:x:0.8:0.5>", "one weight"),
        ("a <lora:x:te=0.8:unet=0.5>", "one weight"),
        ("a <lora::0.8>", "has a name"),
        ("a <lora: >", "has a name"),
    ],
)
def test_what_cannot_be_followed_is_refused(prompt: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        quietly(prompt)


def test_a_number_that_is_none_is_text_outside_brackets() -> None:
    assert parts("dog (nan) (x:1e999)") == [("dog ", 1.0), ("nan", 1.1), (" ", 1.0), ("x:1e999", 1.1)]


# --- prompts that mean harm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hostile", "count"),
    [
        ("[" * 100_000, 0),
        ("[" * 50_000 + "dog" + "]" * 50_000, 1),
        (")" * 100_000, 1),
        ("([" * 25_000 + ")]" * 25_000, 0),
        ("[(" * 25_000 + "])" * 25_000, 0),
        ("\\" * 100_000, 1),
        (" " * 1_000_000, 1),
        (": " * 50_000, 1),
        ("(:" + "1" * 1_000_000, 1),
        ("(a:" + "1" * 500_000 + " " * 500_000, 1),
        ("[" + "|" * 100_000 + "]", 1),
        ("[a:1]" * 20_000, 1),
        ("x" * 1_000_000, 1),
        ("AND " * 50_000, 1),
        ("\n" * 500_000 + "BREA" + "\n" * 500_000, 1),
    ],
    ids=lambda value: f"{value[:8]!r}" if isinstance(value, str) else None,
)
def test_hostile_prompts_are_read_at_once(hostile: str, count: int) -> None:
    """Each would take minutes if it were walked again for each bracket, or would overflow the stack."""
    sections = quietly(hostile).sections
    assert [len(section) for section in sections] == [count]


def test_ten_thousand_breaks() -> None:
    assert len(parse_prompt("BREAK " * 10_000).sections) == 10_001


# --- captions ----------------------------------------------------------------------------------------------------------

CAPTIONS = [
    "a photo of [V] dog", "a dog (sks)", "mika (blue archive), \\o/", "(((", "x:1.3)", "a \\( b",
    "[a|b] AND [c:d:0.5] BREAK <lora:x:1> e",
]  # fmt: skip


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_drawn_means_what_it_meant_in_training(caption: str) -> None:
    """To the bit, and without a warning; while the caption as it stands would be read as the prompt language."""
    pipe = StableDiffusionPipeline.from_pretrained("checkpoints/pocket")
    assert not notes(literal(caption))
    assert torch.equal(pipe.encode_prompt([literal(caption)]), pipe.encode_captions([caption])[0])
