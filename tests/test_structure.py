"""How the package is built: who may import whom, what is never imported, and how long things may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minidiff

ROOT = Path(minidiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A file imports only from lines above its own. A folder's files may import each other, but never in a circle.
ORDER = """
    errors
    usage
    device
    rng
    nonfinite
    config
    layout
    models/*
    diffusion/*
    keymaps
    adapters/*
    graphs
    headers
    weights
    files/*
    images
    curves
    picture_input
    model_files
    call
    canvas
    pipeline
    train/sizes
    train/settings
    train/methods
    train/distributed
    pocket/settings
    flags
    studio/filmstrip
    studio/sheets
    studio/attention_maps
    studio/morph
    studio/previews
    studio/hashes
    studio/foreign
    studio/comfyui
    studio/provenance
    studio/replay
    file_flags
    tools
    train/tables
    train/folders
    train/buckets
    train/durable
    train/cache
    train/data
    train/check_data
    train/templates
    train/priors
    train/validation
    train/publish
    train/stochastic_rounding
    train/adam8bit_kernel
    train/adam8bit
    train/optim
    train/in_backward
    train/muon
    train/checkpoint
    train/guards
    train/run
    train/loop
    train/metering
    train/memory
    train/savings
    train/idle
    train/common
    train/recipes
    train/ladder
    pocket/*
    drawing
    commands
    cli
    __main__
""".split()
STRANGERS = [("models/*", "diffusion/*")]  # though one stands above the other
FOREIGN = {"diffusers", "peft", "accelerate", "xformers", "bitsandbytes"}
MAX_FILE, MAX_FUNCTION = 350, 60  # lines


def module_name(path: Path) -> str:
    """minidiff/train/loop.py -> train/loop; a package's __init__ is train/__init__."""
    return str(path.relative_to(ROOT).with_suffix(""))


def line_of(name: str) -> str:
    """The line of ORDER on which a module stands."""
    folder = name.rpartition("/")[0]
    return name if name in ORDER or f"{folder}/*" not in ORDER else f"{folder}/*"


def imported(name: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names that module `name` imports, in functions too, and the line; not those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(name, ast.Module(node.orelse, []))
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ["minidiff", *name.split("/")]
            source = [*here[: -node.level], node.module] if node.level else [node.module]  # `from .objects import …`
            yield from ((".".join(filter(None, [*source, alias.name])), node.lineno) for alias in node.names)
        else:
            yield from imported(name, node)


def own_module(dotted: str) -> str | None:
    """The file behind a dotted name of minidiff's: `minidiff.train.loop.fit` -> train/loop."""
    if dotted.partition(".")[0] != "minidiff":
        return None
    if (public := dotted.removeprefix("minidiff.")) in minidiff._HOMES:  # `from minidiff import attention`
        dotted = minidiff._HOMES[public]
    parts = dotted.split(".")[1:]
    while parts and not (ROOT / "/".join(parts)).with_suffix(".py").is_file():
        parts.pop()
    return "/".join(parts) or None


def offences(name: str, tree: ast.AST) -> list[str]:
    """What module `name` imports and may not."""
    mine = line_of(name)
    found = []
    for dotted, line in imported(name, tree):
        if dotted.partition(".")[0] in FOREIGN:
            found.append(f"minidiff/{name}.py:{line} imports {dotted}")
        other = own_module(dotted)
        theirs = line_of(other) if other else None
        if theirs is None or (theirs == mine and theirs.endswith("*")):
            continue
        if ORDER.index(theirs) >= ORDER.index(mine) or (theirs, mine) in STRANGERS:
            found.append(f"minidiff/{name}.py:{line} imports {other}, which does not stand above it")
    return found


def names_in(path: Path) -> list[str]:
    return [dotted for dotted, _ in imported(module_name(path), ast.parse(path.read_text()))]


MODULES = [path for path in FILES if path.name != "__init__.py"]
INITS = [path for path in FILES if path.name == "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    assert line_of(name) in ORDER, f"minidiff/{name}.py is new: give it a line in ORDER"
    assert not offences(name, ast.parse(path.read_text()))


def test_no_folder_imports_in_a_circle() -> None:
    graph = {module_name(path): set(map(own_module, names_in(path))) for path in MODULES}
    TopologicalSorter({name: others - {None} for name, others in graph.items()}).prepare()  # CycleError names a circle


@pytest.mark.parametrize("path", INITS, ids=module_name)
def test_packages_import_nothing_of_ours(path: Path) -> None:
    assert not [name for name in names_in(path) if own_module(name)]


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("models/unet", "from minidiff.diffusion.schedule import NoiseSchedule", 1),
        ("diffusion/losses", "from minidiff.models import attention", 1),
        ("diffusion/losses", "def f():\n    import minidiff.models.unet", 1),
        ("models/vae", "from minidiff.models.blocks import ResBlock", 0),
        ("config", "from minidiff.weights import save", 1),
        ("weights", "from minidiff import keymaps\nfrom minidiff.files import lora", 1),
        ("images", "from minidiff import StableDiffusionPipeline", 1),
        ("train/data", "from minidiff.train import loop, settings", 1),
        ("train/data", "from . import loop, settings\nfrom .loop import fit\nfrom ..cli import main", 3),
        ("train/data", "import diffusers.models, peft", 2),
        ("train/data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft", 0),
        ("cli", "import torch, json\nfrom minidiff import attention", 0),
    ],
)
def test_the_check_itself(name: str, source: str, count: int) -> None:
    assert len(offences(name, ast.parse(source))) == count


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
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= MAX_FILE, f"{path} has {len(text.splitlines())} lines; split it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_are_short(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION}
