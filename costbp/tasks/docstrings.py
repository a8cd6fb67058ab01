"""Which library does this paragraph document? 4 classes, read from installed packages.

Needs no download. Texts are first paragraphs of docstrings, with the libraries' names masked;
they change with the installed versions, which ``constraints.txt`` fixes.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from costbp.errors import UserError
from costbp.tasks.base import POOL, Row, text_task

NAMES = ("pandas", "scipy", "matplotlib", "sklearn")
PER_CLASS = 700
LENGTH = range(60, 400)  # characters
MASK = re.compile(r"\b(pandas|pd|scipy|matplotlib|mpl|plt|pyplot|sklearn|scikit-learn)\b", re.I)


def rows(folder: Path) -> Iterator[tuple[str, Row]]:
    """Up to 700 paragraphs of each library."""
    for name in NAMES:
        yield from ((POOL, {"text": text, "label": name}) for _, text in documented(name))


def documented(library: str) -> list[tuple[str, str]]:
    """Up to 700 objects of a library and the first paragraphs of their docstrings, all distinct.

    Raises:
        UserError: the library is not installed.
    """
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"reads docstrings of the package '{library}': pip install {library}")
    found: dict[str, str] = {}
    for path in _shuffled(Path(spec.submodule_search_locations[0])):
        for name, text in _paragraphs(path):
            found.setdefault(text, name)
        if len(found) >= PER_CLASS:
            break
    return [(name, text) for text, name in found.items()][:PER_CLASS]


def _shuffled(root: Path) -> list[Path]:
    """The package's modules in an order that mixes its parts and never changes."""
    files = [path for path in root.rglob("*.py") if "tests" not in path.parts]
    return sorted(files, key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            paragraph = " ".join(MASK.sub("_", text.split("\n\n")[0]).split())
            if len(paragraph) in LENGTH:
                yield getattr(node, "name", path.stem), paragraph


TASK = text_task(NAMES, f"Which library does this document: {', '.join(NAMES)}? Answer:", rows)
