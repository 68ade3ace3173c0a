"""What keeps the code readable: layers that import downwards only, and names that are nouns of the field."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first; a prefix stands for all modules below it. A module imports from its line and from those
# before it.
LAYERS = [
    ["mlviews._version", "mlviews._moved", "mlviews.errors"],
    ["mlviews.checks", "mlviews.columns", "mlviews.documents"],
    ["mlviews.images", "mlviews.levels", "mlviews.sampling", "mlviews.runs", "mlviews.weights"],
    ["mlviews.generators", "mlviews.transforms"],
    ["mlviews.latents", "mlviews.perturb"],
    ["mlviews.identity", "mlviews.purify"],
    ["mlviews.codes"],
    ["mlviews.anchors", "mlviews.config"],
    ["mlviews.invert", "mlviews.step"],
    ["mlviews.reuse"],
    ["mlviews.source"],
    ["mlviews.mi", "mlviews.viz"],
    ["mlviews.evaluation", "mlviews.impact"],
    ["mlviews.sharing"],
    ["mlviews.zoo"],
    ["mlviews"],
    ["mlviews.explorer", "mlviews.integrations"],
    ["mlviews.cli"],
]

BANNED = {
    "found",
    "made",
    "own",
    "one",
    "each",
    "where",
    "there",
    "here",
    "kept",
    "wanted",
    "known",
    "done",
    "taken",
    "given",
    "several",
    "others",
    "both",
    "said",
    "shown",
    "apart",
}


def modules() -> dict[str, Path]:
    """The package's files by module name."""
    names = {}
    for folder, prefix in (("mlviews", "mlviews"), ("integrations", "mlviews.integrations")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(ROOT / "mlviews" / "integrations"):
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return names


def imports(name: str, path: Path, names: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if member in names else node.module


def layer(name: str) -> int:
    """The number of the layer with the longest prefix of the name."""
    prefixes = {prefix: index for index, prefixes in enumerate(LAYERS) for prefix in prefixes}
    while name not in prefixes:
        name = name.rpartition(".")[0]
    return prefixes[name]


def test_nothing_is_imported_from_a_higher_layer() -> None:
    names = modules()
    upward = [
        f"{name} imports {target}"
        for name, path in names.items()
        for target in imports(name, path, names)
        if layer(target) > layer(name)
    ]
    assert upward == []


def test_imports_make_no_circle() -> None:
    names = modules()
    edges = {
        name: {target for target in imports(name, path, names) if target != name}
        for name, path in names.items()
    }
    while free := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in free:
            del edges[name]
    assert edges == {}


def names_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a file binds: variables, arguments, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


@pytest.mark.parametrize("folder", ["mlviews", "integrations", "benchmarks"])
def test_names_are_nouns_of_the_field(folder: str) -> None:
    banned = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in names_of(ast.parse(path.read_text()))
        if name.strip("_") in BANNED
    ]
    assert banned == []


@pytest.mark.parametrize("folder", ["mlviews", "integrations", "benchmarks"])
def test_conditional_expressions_are_not_nested(folder: str) -> None:
    nested = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.IfExp)
        and any(isinstance(part, ast.IfExp) for part in (node.body, node.orelse))
    ]
    assert nested == []
