"""Imports point one way (FORBIDDEN has which), and files and functions stay short."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "awm_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
LOW = {"types", "validate", "masks", "losses", "projections", "models", "bilevel", "metrics",
       "sweep", "explain", "warps", "whole_files"}
# Rooms above; explain looks at triggered images, so that no defence may import it.
TOP = {"detection", "command", "programs", "explain"}
# Room: rooms of awm_jax that it must not import.
FORBIDDEN = {
    **{room: {"attacks", "defences", "data", "report", "training", *TOP} for room in LOW},
    "attacks": {"defences", "data", "report", *TOP},
    "defences": {"attacks", "report", *TOP},
    "data": {"attacks", "defences", "models", "report", "training", "metrics", *TOP},
    "report": {"attacks", "defences", "models", "data", "training", "metrics", *TOP},
    "training": {"attacks", "defences", "report", *TOP},
    "detection": {"attacks", "data", "report", "training", "command", "programs"},
    "programs": {"attacks", "defences", "report", "training", "models", "detection", "command"},
    "command": {"attacks", "training"},
}


def _imports(source, package):
    """Every module that source imports, wherever in it; relative names resolved in its package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _faults(parts, source):
    """What a file (its path without the suffix, in parts) imports and must not."""
    found = set(_imports(source, parts[:-1]))
    tops = {name.split(".")[0] for name in found}
    rooms = {name.split(".")[1] for name in found if name.startswith("awm_jax.")}
    faults = set()
    if parts[0] == "awm_jax":
        faults |= tops & {"experiments"}
        faults |= rooms & FORBIDDEN.get(parts[1], set())
    if parts[1:2] != ("torch_files",) and parts not in (
            ("experiments", "benchmark_torch"), ("experiments", "benchmark")):
        faults |= tops & {"torch"}
    if parts[:2] != ("awm_jax", "data"):
        faults |= tops & {"tensorflow_datasets"}
    return faults


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms(path):
    assert not _faults(path.relative_to(ROOT).with_suffix("").parts, path.read_text())


@pytest.mark.parametrize("file, source, faults", [
    ("awm_jax/defences/x", "def f():\n    from awm_jax.attacks import base", {"attacks"}),
    ("awm_jax/attacks/x", "from awm_jax import defences, models, training", {"defences"}),
    ("awm_jax/attacks/x", "from ..defences import awm", {"defences"}),
    ("awm_jax/attacks/x", "from .. import data", {"data"}),
    ("awm_jax/attacks/x", "from . import base", set()),
    ("awm_jax/losses", "from . import report", {"report"}),
    ("awm_jax/models/vgg", "import awm_jax.data.splits as s", {"data"}),
    ("awm_jax/report/x", "import awm_jax.models", {"models"}),
    ("awm_jax/report/x", "import torch.nn", {"torch"}),
    ("awm_jax/training", "import tensorflow_datasets as tfds", {"tensorflow_datasets"}),
    ("awm_jax/data/x", "import tensorflow_datasets as tfds", set()),
    ("awm_jax/torch_files", "import torch", set()),
    ("awm_jax/masks", "from experiments import cli", {"experiments"}),
    ("awm_jax/defences/x", "from awm_jax import detection", {"detection"}),
    ("awm_jax/defences/x", "from awm_jax import explain", {"explain"}),
    ("awm_jax/detection", "from awm_jax import command", {"command"}),
    ("experiments/x", "from awm_jax import attacks, defences, data, report", set()),
])
def test_the_rule_finds(file, source, faults):
    assert _faults(tuple(file.split("/")), source) == faults


def _lines(node):
    """How many lines a function has beside its docstring."""
    first, told = node.body[0], ast.get_docstring(node) is not None
    return node.end_lineno - node.lineno + 1 - told * (first.end_lineno - first.lineno + 1)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_too_long(path):
    source = path.read_text()
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    assert {node.name: _lines(node) for node in functions if _lines(node) >= 60} == {}
    assert source.count("\n") <= 400


def test_import_is_light():
    import subprocess
    import sys

    code = ("import sys, awm_jax; heavy = {'torch', 'tensorflow_datasets', 'orbax', 'matplotlib', "
            "'sklearn', 'safetensors'} & set(sys.modules); sys.exit(','.join(heavy) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
