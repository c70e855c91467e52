"""shoal under `python -O`: no check may hang on an `assert`, because -O takes every assert out.

The rule for the source: an `assert` may only tell the type checker what this very function or object has arranged.
It has the form `assert x is not None`, where x is no argument of the function (what comes from outside comes as an
argument, or from a call, and is checked with `if` and `raise`). Code that reads no input of strangers, the commands,
measurements and simulations, may also assert the type of an argument that it imports lazily.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sources import PACKAGE, REPOSITORY, python_files

OWN_ONLY = {"cli", "sim", "bench", "hostile"}
"""Folders that no stranger speaks to."""


def unsound_asserts(path: Path, folder: str) -> Iterator[tuple[int, str]]:
    """Line and text of every assert that the rule does not allow."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    yield from _walk(tree, frozenset(), folder)


def _walk(node: ast.AST, arguments: frozenset[str], folder: str) -> Iterator[tuple[int, str]]:
    for child in ast.iter_child_nodes(node):
        inside = arguments
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            given = child.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            inside = frozenset(each.arg for each in every if each is not None and each.arg not in ("self", "cls"))
        if isinstance(child, ast.Assert) and not _allowed(child.test, arguments, folder):
            yield child.lineno, ast.unparse(child.test)
        yield from _walk(child, inside, folder)


def _allowed(test: ast.expr, arguments: frozenset[str], folder: str) -> bool:
    match test:
        case ast.Compare(left=ast.Name(id=name), ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return name not in arguments
        case ast.Compare(left=ast.Attribute() as read, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            while isinstance(read, ast.Attribute):
                if not isinstance(read.value, ast.Attribute | ast.Name):
                    return False
                read = read.value  # type: ignore[assignment]
            return isinstance(read, ast.Name) and read.id not in arguments
        case ast.Call(func=ast.Name(id="isinstance" | "callable"), args=[ast.Name(), *_]):
            return folder in OWN_ONLY
    return False


def test_no_assert_in_the_source_guards_anything() -> None:
    problems = [
        f"{path.relative_to(REPOSITORY)}:{line}: assert {text}"
        for path in python_files(PACKAGE)
        for line, text in unsound_asserts(path, path.relative_to(PACKAGE).parts[0])
    ]
    assert not problems, "write `if not ...: raise`:\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "code",
    [
        "def f(size):\n    assert size < 10",
        "def f(x):\n    assert x is not None",
        "def f(x):\n    assert x.field is not None",
        "def f(x):\n    assert isinstance(x, int)",
        "assert read() is not None",
        "assert read().x is not None",
        "assert x",
        "assert x is not None and x > 0",
        "assert False, 'cannot be'",
    ],
)
def test_an_assert_that_could_guard_input_is_found(tmp_path: Path, code: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)
    assert len(list(unsound_asserts(path, "net"))) == 1


@pytest.mark.parametrize(
    ("code", "folder"),
    [
        ("def f(self):\n    assert self._engine is not None", "server"),
        ("def f(x):\n    y = g(x)\n    assert y is not None", "swarm"),
        ("def f(x):\n    assert isinstance(x, int)", "cli"),
    ],
)
def test_what_only_tells_the_type_checker_passes(tmp_path: Path, code: str, folder: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)
    assert not list(unsound_asserts(path, folder))


FAST = (
    *("tests/wire", "tests/net", "tests/admin", "tests/manifest", "tests/hostile/test_fuzz.py"),
    *("tests/hostile/test_routes.py", "tests/gateway/test_access.py", "tests/gateway/test_accounts.py"),
    *("tests/gateway/test_chat_templates.py", "tests/gateway/test_limits.py", "tests/gateway/test_openai_fields.py"),
)
"""Where bytes from outside are checked. (`PYTHONOPTIMIZE=1 make test` runs everything so.)"""


def run_optimised(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest under -O, in which child processes are too. pytest's own asserts in tests still hold: it rewrites them."""
    environment = os.environ | {"PYTHONOPTIMIZE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_the_fast_tests_of_everything_that_reads_input_pass_under_dash_o() -> None:
    ended = run_optimised("-x", "-m", "not slow and not gpu", *FAST)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]


def test_under_dash_o_tests_and_their_helpers_still_assert(tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text("def test_planted() -> None:\n    assert 1 == 2\n")
    ended = run_optimised("--rootdir", str(tmp_path), "-c", os.devnull, str(planted))
    assert ended.returncode == 1
    assert "assert 1 == 2" in ended.stdout
