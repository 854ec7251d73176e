"""The house's plan: what may import what, and how long a function may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mnist_flax"
# In reading order: a module imports those above it only, and no wing.
CORE = [
    "errors",
    "compat",
    "checks",
    "metrics",
    "data",
    "augment",
    "moments",
    "ops",
    "model",
    "weights",
    "steps",
    "optimizer",
    "stopping",
    "recipe",
    "replicas",
    "progress",
    "programs",
    "feed",
    "hosts",
    "workdir",
    "checkpoint",
    "loop",
]
# Each stands on the core and on the wings above it.
WINGS = ("kernels", "models", "recipes", "datasets", "views", "evaluation")
WINGS += ("reports", "studies", "launch")
# `for_platform` chooses a kernel, and goes without them; kernels stand on the operations.
EXCEPT = {("ops", "kernels")}
MAX_LINES = 50  # of a function, without its docstring


def parsed():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def imported(tree):
    """Returns the package's modules that a file imports, by the first part of their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "mnist_flax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mnist_flax."):
            yield node.module.split(".")[1]


def test_every_module_has_its_place():
    found = {path.parts[0].removesuffix(".py") for path, _ in parsed()} - {"__init__"}
    assert found == {*CORE, *WINGS}


@pytest.mark.parametrize("place", range(len(CORE)), ids=CORE)
def test_the_core_imports_what_is_above(place):
    tree = ast.parse((PACKAGE / f"{CORE[place]}.py").read_text())
    below = {name for name in imported(tree) if name not in CORE[:place]}
    assert {(CORE[place], name) for name in below} <= EXCEPT


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_the_core_and_wings_above_it(wing):
    known = {*CORE, *WINGS[: WINGS.index(wing) + 1]}
    for path, tree in parsed():
        if path.parts[0].removesuffix(".py") == wing:
            assert set(imported(tree)) <= known, path


def test_functions_are_short():
    for path, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                doc = node.body[0] if ast.get_docstring(node) else None
                own = doc.end_lineno - doc.lineno + 1 if doc else 0
                assert node.end_lineno - node.lineno + 1 - own <= MAX_LINES, f"{path}: {node.name}"
