"""How the package is built: which room may import which, what is never imported, and how long things may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minidiff

ROOT = Path(minidiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]
NAMES = {str(path.relative_to(ROOT).with_suffix("")) for path in MODULES}

# A room imports only rooms with a smaller number. Rooms of the same number do not import each other.
FLOOR = {"core": 0, "fast": 1, "files": 1, "draw": 2, "trainer": 3, "studio": 3, "pocket": 4, "cli": 5, "__main__": 6}
FOREIGN = {"diffusers", "peft", "accelerate", "xformers", "bitsandbytes"}
MAX_FILE, MAX_FUNCTION, MAX_CORE_IMPORTS = 350, 60, 4
LINES = {"core": 2350, "": 18178}  # of a room; of the whole package. The goal of the package is 11,500 (issue of the house)

# Imports that break the rule, from before the rooms were built. This list may only become shorter.
DEBT: set[tuple[str, str]] = set()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    """minidiff/core/train.py -> core/train; a package's __init__ is core/__init__."""
    return str(path.relative_to(ROOT).with_suffix(""))


def imported(name: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names that module `name` imports, in functions and for type checkers too, and the line."""
    here = ["minidiff", *name.split("/")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = [*here[: -node.level], node.module] if node.level else [node.module]  # `from .objects import …`
            yield from ((".".join(filter(None, [*source, alias.name])), node.lineno) for alias in node.names)


def own_module(dotted: str) -> str | None:
    """The file behind a dotted name of minidiff's: `minidiff.core.train.train` -> core/train."""
    if dotted.partition(".")[0] != "minidiff":
        return None
    if (public := dotted.removeprefix("minidiff.")) in minidiff._HOMES:  # `from minidiff import attention`
        dotted = minidiff._HOMES[public]
    parts = dotted.split(".")[1:]
    while parts and "/".join(parts) not in NAMES:
        if (ROOT.joinpath(*parts) / "__init__.py").is_file():
            return "/".join([*parts, "__init__"])
        parts.pop()
    return "/".join(parts) or None


def room(name: str) -> str:
    return name.partition("/")[0]


def offences(name: str, tree: ast.AST) -> list[tuple[str, str]]:
    """The imports of module `name` that the rule forbids."""
    found = []
    for dotted, _ in imported(name, tree):
        if dotted.partition(".")[0] in FOREIGN:
            found.append((name, dotted))
        other = own_module(dotted)
        if other and "/" in other and room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]:
            found.append((name, other))
    return found


def names_in(path: Path) -> set[str]:
    """The modules of minidiff that a file imports."""
    found = {own_module(dotted) for dotted, _ in imported(module_name(path), tree_of(path))}
    return {name for name in found if name}


def test_a_room_imports_only_rooms_to_its_left() -> None:
    found = {offence for path in MODULES for offence in offences(module_name(path), tree_of(path))}
    assert found == DEBT, f"new: {sorted(found - DEBT)}; mended, take it out of DEBT: {sorted(DEBT - found)}"


def test_no_file_imports_in_a_circle() -> None:
    graph = {module_name(path): names_in(path) - {module_name(path)} for path in MODULES}
    TopologicalSorter({name: {o for o in others if (name, o) not in CIRCLES} for name, others in graph.items()}).prepare()


# Imports for type checkers alone that close a circle, from before the rooms were built. This list may only become shorter.
CIRCLES: set[tuple[str, str]] = set()


def test_every_file_stands_in_a_room() -> None:
    assert {room(name) for name in NAMES} == set(FLOOR)


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("core/unet", "from minidiff.draw.pipeline import StableDiffusionPipeline", 1),
        ("core/losses", "from minidiff.core import schedule", 0),
        ("core/losses", "def f():\n    import minidiff.files.weights", 1),
        ("fast/conv", "from minidiff.files import weights", 1),
        ("draw/images", "from minidiff import StableDiffusionPipeline", 0),
        ("files/weights", "from minidiff import StableDiffusionPipeline", 1),
        ("trainer/run", "from minidiff.studio import sheet, morph", 2),
        ("pocket/judge", "from . import world\nfrom .world import draw\nfrom ..cli import main", 1),
        ("trainer/run", "import diffusers.models, peft", 2),
        ("core/text", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minidiff.draw import pipeline", 1),
        ("cli/main", "import torch, json\nfrom minidiff import attention", 0),
    ],
)
def test_the_check_itself(name: str, source: str, count: int) -> None:
    assert len(offences(name, ast.parse(source))) == count


def test_core_files_import_few_others() -> None:
    """`generate` is the place where all meet; the errors count for nothing."""
    few = {name: names_in(ROOT / f"{name}.py") - {"core/errors"} for name in NAMES if room(name) == "core"}
    assert not {name: others for name, others in few.items() if len(others) > MAX_CORE_IMPORTS and name not in CROWDED}


CROWDED = {"core/generate"}  # the others: from before the rooms were built


@pytest.mark.parametrize("where", LINES)
def test_budget_of_lines(where: str) -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / where).rglob("*.py"))
    assert lines <= LINES[where], f"minidiff/{where} has {lines} lines; its budget is {LINES[where]}"


def test_import_minidiff_is_light() -> None:
    code = "import sys, minidiff; print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert set(minidiff.__all__) == set(minidiff._HOMES)
    for name in minidiff.__all__:
        assert getattr(minidiff, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = minidiff.nothing_like_it


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_docstring_and_length(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(tree_of(path)), f"{path} has no docstring"
    assert len(text.splitlines()) <= MAX_FILE, f"{path} has {len(text.splitlines())} lines; split it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_are_short(path: Path) -> None:
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION}


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def test_no_docstring_begins_with_what() -> None:
    """A docstring names its own subject."""
    nodes = (node for path in FILES for node in ast.walk(tree_of(path)) if isinstance(node, DOCUMENTED))
    assert not [text for text in map(ast.get_docstring, nodes) if text and text.startswith("What ")]
