"""The house by its import graph: no layer imports a higher one, and no name stands for two things."""

import ast
import functools
from pathlib import Path

import pytest

import longroll

SOURCE = Path(longroll.__file__).parent
LAYERS = (
    ("errors",),
    ("launcher", "printable", "blocks", "stacks", "heads", "checkpoint"),
    ("files", "meeting", "ops", "sizes"),
    ("ranks",),
    ("state", "results", "history"),
    ("families", "interventions", "data"),
    ("locate",),
    ("model", "outline"),
    ("memory",),
    ("dry_run",),
    ("measure",),
    ("tasks", "training", "report"),
    ("conformance", "harness", "reproduce"),
    ("cli",),
    ("longroll",),
)
"""Packages and modules, lowest first: each imports from lower layers only; the last is the package itself."""

PARTS = {
    "_dry_functions": "dry_run",
    "_plugins": "model",
    "_self_check": "model",
    "harness_arguments": "harness",
    "__main__": "longroll",
}
"""Private modules, by what they are a part of."""

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCE.rglob("*.py")}


@functools.cache
def imports(name: str) -> set[str]:
    """All modules that a module imports, at its top, in functions and for types."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {each if each in MODULES else base for each in names}
    return found


def layer(name: str) -> str:
    part = name.split(".")[1] if "." in name else "longroll"
    return PARTS.get(part, part)


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES} == set(RANK)


@pytest.mark.parametrize("name", sorted(RANK))
def test_no_layer_imports_a_higher_one(name):
    upwards = {
        f"{module} imports {other}"
        for module in MODULES
        for other in imports(module)
        if layer(module) == name
        and other.split(".")[0] == "longroll"
        and layer(other) != name
        and RANK[layer(other)] >= RANK[name]
    }
    assert upwards == set()


def test_no_module_shares_the_name_of_what_its_package_exports():
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            modules = {other.rpartition(".")[2] for other in MODULES if other.rpartition(".")[0] == name}
            package = __import__(name, fromlist=["__all__"])
            exported = set(getattr(package, "__all__", ()))
            shared = {each for each in modules & exported if not hasattr(getattr(package, each), "__path__")}
            assert not shared, f"{name}: {shared} are modules and exported names"


def test_no_module_is_named_like_a_package_that_is_imported():
    foreign = {other.split(".")[0] for name in MODULES for other in imports(name)} - {"longroll"}
    assert {name for name in MODULES if name.rpartition(".")[2] in foreign} == set()
