"""Reads Python source without running it: which files a folder has, and what each of them imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "shoal"


@dataclass(frozen=True)
class Import:
    """One imported name, with its full dotted path: `from a import b` gives `a.b`."""

    name: str
    line: int
    at_top: bool
    """False inside a function, where it runs only when the function is called."""
    for_types: bool
    """True below `if TYPE_CHECKING:`, where it never runs."""


def python_files(*folders: Path) -> list[Path]:
    """Every Python file under the folders that exist, sorted."""
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imports_of(path: Path, package: Path) -> list[Import]:
    """Every import of a file, wherever it stands; relative ones are resolved against `package`, the top folder.

    `import_module("a.b")` and `__import__("a.b")` with a literal name count too.
    """
    inside = [package.name, *path.relative_to(package).parent.parts] if path.is_relative_to(package) else []
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return list(_imports(tree, inside, at_top=True, for_types=False))


def _imports(node: ast.AST, inside: list[str], *, at_top: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_top, for_types)
        elif isinstance(child, ast.ImportFrom):
            above = inside[: len(inside) - child.level + 1] if child.level else []
            base = ".".join([*above, *([child.module] if child.module else [])])
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, at_top, for_types)
        elif isinstance(child, ast.Call) and _last_name(child.func) in ("import_module", "__import__"):
            first = child.args[0] if child.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(first.value, child.lineno, at_top, for_types)
        in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(child, ast.If) and _last_name(child.test) == "TYPE_CHECKING"
        yield from _imports(child, inside, at_top=at_top and not in_function, for_types=for_types or type_checking)


def _last_name(expression: ast.expr) -> str:
    match expression:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""
