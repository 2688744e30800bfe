"""What imports what, by the sources: no circle but for type checking, and no package imports its users."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("safe_kernels", "safe_train")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports(statements, module: str, path: Path):
    """What a module imports while it is itself imported: not in a function, and not for type checking."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{origin}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else origin for name in found)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(node.orelse, module, path)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports([x for x in ast.iter_child_nodes(node) if isinstance(x, ast.stmt)], module, path)


GRAPH = {name: set(imports(ast.parse(path.read_text()).body, name, path)) - {name} for name, path in MODULES.items()}


def circle_from(start: str) -> list[str]:
    """A way back to the module, or none."""
    ways, seen = [[start]], set()
    while ways:
        way = ways.pop()
        for target in GRAPH[way[-1]] & GRAPH.keys():
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


def test_no_module_imports_itself_by_way_of_others():
    assert [circle for circle in map(circle_from, GRAPH) if circle] == []


@pytest.mark.parametrize(
    ("package", "others"),
    [("safe_kernels", {"safe_train", "bench", "tests"}), ("safe_train", {"bench", "tests"})],
)
def test_no_package_imports_its_users(package, others):
    for module, targets in GRAPH.items():
        if module.split(".")[0] == package:
            assert others.isdisjoint(target.split(".")[0] for target in targets), module


def test_the_kernels_import_torch_and_triton_alone():
    """`tests/test_contract.py` has a process that imports the package, and finds Triton not even loaded."""
    allowed = {"safe_kernels", "torch", "triton", *sys.stdlib_module_names}
    for module, targets in GRAPH.items():
        if module.startswith("safe_kernels") and not module.startswith("safe_kernels.integrations"):
            assert {target.split(".")[0] for target in targets} <= allowed, module
