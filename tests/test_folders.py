"""The folders of safe_train have one order: none imports from a higher one, and no two modules import each other."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports_of(path, modules):
    """The modules of safe_train that a file imports, anywhere in it but for type checking."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in for_types:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import) and id(node) not in for_types:
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("safe_train.")}


def graph():
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "safe_train").rglob("*.py")}
    return {name: imports_of(path, paths) for name, path in paths.items() if not name.endswith("__init__")}


def folder_of(module):
    """A folder's name, or a module's beside the folders."""
    return module.split(".")[1]


def documented_order():
    """The rows of the table in docs/architecture.md, from the bottom of `safe_train` up."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", text[text.index("## The folders of safe_train") :], re.MULTILINE)
    return [re.findall(r"\w+", row) for row in reversed(rows)]


def test_no_modules_import_each_other():
    tuple(graphlib.TopologicalSorter(graph()).static_order())  # raises CycleError, with the circle


def test_no_folder_imports_from_a_higher_one():
    height = {name: i for i, names in enumerate(documented_order()) for name in names}
    used = {folder_of(module) for module in graph()}
    assert used == set(height)
    upward = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if height[folder_of(other)] > height[folder_of(module)]
    ]
    assert not upward
