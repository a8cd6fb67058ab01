"""The house: imports point down and run in no circle, files are short, the whole stays small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from costbp.config import load_plan
from tests.conftest import ROOT

PACKAGE = ROOT / "costbp"
ROOMS = (  # bottom to top; what stands in one line does not import each other
    {"errors"},
    {"files", "console", "objective", "meter"},
    {"device"},
    {"device_pool"},
    {"config", "theory"},
    {"estimators", "tasks", "assets"},
    {"models"},
    {"data"},
    {"cost"},
    {"train"},
    {"analysis", "tracking", "own_loop"},
    {"insight"},
    {"cli", "hf_trainer"},
    {"__init__", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
SPECS = ("config.methods", "config.parts")  # their lazy `build` imports what they describe
LONGEST = 400  # lines of a file
WHOLE = 22_950  # lines of the package; the plan says 11,000: whoever adds, deletes elsewhere


def modules() -> dict[str, Path]:
    """Dotted name below ``costbp`` -> file."""
    files = {p: p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): p for p, name in files.items()}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of the package that a file imports, and whether as soon as it is imported itself."""
    tree = ast.parse(path.read_text())
    late = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef)
        or (isinstance(scope, ast.If) and ast.unparse(scope.test) == "TYPE_CHECKING")
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("costbp"):
            module = node.module.removeprefix("costbp").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                yield (inner if inner in modules() else module or "__init__"), id(node) not in late


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_its_floor():
    assert {room(module) for module in modules()} == set(FLOOR)


def test_imports_point_down():
    """A spec's lazy ``build`` is the one import that points up."""
    wrong = []
    for name, path in modules().items():
        for other, at_once in imports(path):
            ours, theirs = FLOOR[room(name)], FLOOR[room(other)]
            builds = not at_once and name in SPECS and room(other) == "estimators"
            light = name == "__init__" or other == "__init__"  # the version, a lazy function
            if room(other) != room(name) and theirs >= ours and not (builds or light):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_modules_import_each_other_in_no_circle():
    graph = {
        name: {other for other, _ in imports(path) if other != name}
        for name, path in modules().items()
        if name not in (*SPECS, "__init__")
    }
    TopologicalSorter(graph).prepare()  # raises where there is one


def test_files_are_short_and_the_package_is_small():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
    assert sum(lines.values()) <= WHOLE


def test_no_code_asks_for_a_method_by_its_name():
    names = set(load_plan(base=ROOT / "config/config.yaml").catalog.methods)
    found = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
                found += [
                    f"{name}:{node.lineno}"
                    for part in parts
                    if isinstance(part, ast.Constant) and part.value in names
                ]
    assert found == []
