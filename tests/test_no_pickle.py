"""Nothing of shoal loads or runs what data says: no pickle and its kin, no eval, no code from a model's folder.

The source is read here; tests/support/audit.py watches the running tests, and shoal.cli.unpickling the processes that
listen on a network.
"""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import audit
from support.sources import REPOSITORY, imports_of, python_files

FOLDERS = (REPOSITORY / "src", REPOSITORY / "examples", REPOSITORY / "benchmarks")

MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FUNCTIONS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("eval", "exec", "builtins.eval", "builtins.exec"),
}
METHODS = {"recv_pyobj", "send_pyobj"}
SWITCHES = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}
"""Arguments that may be given only with this literal value."""


def forbidden(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a file that may load code from data."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for each in imports_of(path, path.parent):
        if each.name.split(".")[0] in MODULES or each.name in FUNCTIONS:
            yield each.line, each.name
    names = _names_for_modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in SWITCHES and not _is_literal(keyword.value, SWITCHES[keyword.arg]):
                    yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                if name in SWITCHES and not _is_literal(value, SWITCHES[name]):
                    yield node.lineno, f"{name}={ast.unparse(value)}"
        elif isinstance(node, ast.Attribute) and node.attr in METHODS:
            yield node.lineno, node.attr
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            name = names.get(first, first) + dot + rest
            if name in FUNCTIONS:
                yield node.lineno, name


def _names_for_modules(tree: ast.AST) -> dict[str, str]:
    """`import torch as t` makes t stand for torch."""
    return {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname
    }


def _is_literal(value: ast.expr, allowed: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is allowed


def test_no_source_file_loads_code_from_data() -> None:
    problems = [
        f"{path.relative_to(REPOSITORY)}:{line}: {name}"
        for path in python_files(*FOLDERS)
        for line, name in forbidden(path)
    ]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import marshal",
        "import shelve as s",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "load = torch.load",
        "torch.save({}, 'x')",
        "eval('1')",
        "exec(text)",
        "yaml.load(text)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=chosen)",
        "AutoModel.from_pretrained('x', **{'trust_remote_code': True})",
        "np.load('x', allow_pickle=True)",
        "socket.recv_pyobj()",
        "importlib.import_module('pickle')",
    ],
)
def test_each_way_to_load_code_from_data_is_found(tmp_path: Path, code: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)

    assert list(forbidden(path))


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "from safetensors.torch import load_file, save_file",
        "AutoConfig.from_pretrained('x', trust_remote_code=False)",
        "np.load('x', allow_pickle=False)",
        "json.loads(text)",
    ],
)
def test_harmless_neighbours_are_left_alone(tmp_path: Path, code: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)

    assert not list(forbidden(path))


def test_the_running_tests_notice_when_code_of_shoal_unpickles() -> None:
    planted = types.ModuleType("planted")
    code = compile("def unpickle(loads, data):\n    return loads(data)\n", audit.SHOAL_FOLDER + "planted.py", "exec")
    exec(code, planted.__dict__)

    planted.unpickle(pickle.loads, pickle.dumps(OSError()))

    (seen,) = audit.take()
    assert "planted.py:2 unpickled builtins.OSError" in seen


def test_unpickling_by_others_is_left_alone() -> None:
    pickle.loads(pickle.dumps(OSError()))  # noqa: S301 - a pickle made in this very line

    assert audit.take() == []


def test_a_process_that_listens_cannot_unpickle() -> None:
    script = (
        "import pickle\n"
        "from shoal.cli.unpickling import refuse_unpickling\n"
        "refuse_unpickling()\n"
        "assert pickle.loads(pickle.dumps([1, 'two'])) == [1, 'two']\n"
        "pickle.loads(pickle.dumps(OSError()))\n"
    )

    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert "tried to unpickle builtins.OSError in a process that listens" in ended.stderr
