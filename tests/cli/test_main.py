"""The command line as a whole: a light start, and a proper end for every kind of failure."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from shoal import __version__
from shoal.cli import main
from shoal.cli.lazy import Entry, LazyGroup
from shoal.errors import Full, SwarmIncomplete

HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "starlette",
    "uvicorn",
    "httpx",
    "rich",
    "cryptography",
    "msgspec",
    "asyncio",
}


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--raise", "failure", default="")
def fail(failure: str, as_json: bool) -> int | None:
    """Fail as asked."""
    match failure:
        case "full":
            raise Full("Server 7 is full.", hint="Try again in 2 s.", retry_after_s=2.0)
        case "incomplete":
            raise SwarmIncomplete("Blocks 4:8 are hosted by no server.")
        case "interrupt":
            raise KeyboardInterrupt
        case "bug":
            raise EOFError("not planned")
        case "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "journal.bin")
        case "port":
            raise OSError(errno.EADDRINUSE, "error while attempting to bind on address ('127.0.0.1', 80)")
        case "tasks":
            raise ExceptionGroup("tasks", [ExceptionGroup("inner", [Full("Server 7 is full.")]), Full("So is 8.")])
        case "tasks and a bug":
            raise ExceptionGroup("tasks", [Full("Server 7 is full."), EOFError("not planned")])
        case "no":
            return 3
    return None


GROUP = LazyGroup(
    name="shoal",
    table={
        "fail": Entry(f"{__name__}:fail", "Fail as asked."),
        "child": Entry("shoal.no_such_module:child", "Never loaded.", process=True),
        "broken": Entry("shoal.no_such_module:broken", "Never loaded either."),
    },
)


def run(*args: str) -> int:
    return main.run(args, GROUP)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from shoal.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
    )

    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert ended.stdout.startswith("Usage: shoal")
    assert ended.stderr.strip() == "[]"


def test_help_lists_commands_without_importing_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0

    shown = capsys.readouterr().out
    assert "fail" in shown
    assert "Never loaded either." in shown
    assert "child" not in shown


def test_the_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0

    assert capsys.readouterr().out == f"shoal {__version__}\n"


def test_python_dash_m_shoal_is_the_same_program() -> None:
    ended = subprocess.run([sys.executable, "-m", "shoal", "--version"], capture_output=True, text=True, check=True)

    assert ended.stdout == f"shoal {__version__}\n"


def test_a_command_that_succeeds_exits_with_0_and_may_return_another_code() -> None:
    assert run("fail") == 0
    assert run("fail", "--raise", "no") == 3


def test_an_error_is_told_with_its_hint_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--raise", "full") == 5

    told = capsys.readouterr()
    assert told.err == "error: Server 7 is full.\nhint: Try again in 2 s.\n"
    assert told.out == ""


def test_an_error_without_a_hint_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--raise", "incomplete") == 3

    assert capsys.readouterr().err == "error: Blocks 4:8 are hosted by no server.\n"


def test_with_json_an_error_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--json", "--raise", "full") == 5

    told = capsys.readouterr()
    assert json.loads(told.out) == {
        "error": {"code": "full", "message": "Server 7 is full.", "hint": "Try again in 2 s.", "retry_after_s": 2.0}
    }
    assert told.out.count("\n") == 1
    assert told.err == ""


def test_a_full_disk_is_named_with_the_file_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--raise", "disk") == 5

    told = capsys.readouterr().err
    assert "error: No space left on device: journal.bin\n" in told
    assert "hint: Free some space" in told


def test_a_port_in_use_is_named_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--raise", "port") == 1

    told = capsys.readouterr().err
    assert "('127.0.0.1', 80)" in told
    assert "hint: Another program listens there" in told


def test_ctrl_c_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--raise", "interrupt") == 130

    assert "Traceback" not in capsys.readouterr().err


def test_an_error_nobody_planned_keeps_its_traceback() -> None:
    with pytest.raises(EOFError, match="not planned"):
        run("fail", "--raise", "bug")


def test_planned_errors_of_several_tasks_are_told_as_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--raise", "tasks") == 5

    assert capsys.readouterr().err == "error: Server 7 is full.\n"


def test_a_bug_beside_a_planned_error_keeps_its_traceback() -> None:
    with pytest.raises(ExceptionGroup):
        run("fail", "--raise", "tasks and a bug")


def test_a_mistyped_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fial") == 2

    told = capsys.readouterr().err
    assert "error: No such command 'fial'. Did you mean 'fail'?" in told
    assert "hint: `shoal --help`" in told


def test_hidden_commands_are_not_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chlid") == 2

    assert "child" not in capsys.readouterr().err


def test_an_unknown_flag_names_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--colour") == 2

    assert "hint: `shoal fail --help`" in capsys.readouterr().err


def test_with_json_a_usage_error_is_one_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--json", "--colour") == 2

    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2

    assert "Usage: shoal" in capsys.readouterr().err


def test_a_command_that_is_a_process_of_its_own_cannot_unpickle() -> None:
    script = (
        "import pickle\n"
        "from shoal.cli.lazy import Entry, LazyGroup\n"
        "from shoal.cli.main import run\n"
        "group = LazyGroup(name='g', table={'child': Entry('shoal.cli.bench:bench', '', process=True)})\n"
        "pickle.loads(pickle.dumps(OSError()))\n"
        "assert run(['child', '--help'], group) == 0\n"
        "pickle.loads(pickle.dumps(OSError()))\n"
    )

    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert "Refused: Something tried to unpickle builtins.OSError" in ended.stderr


def test_a_reader_that_leaves_early_ends_the_command_quietly() -> None:
    script = "from shoal.cli import output\nfor _ in range(100_000):\n    output.answer('x' * 100)\n"

    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.readline()
        program.stdout.close()
        complaints = program.stderr.read()

    assert complaints == ""
    assert program.returncode == 1


def entries(group: LazyGroup, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Entry]]:
    """Every entry of a group and of the groups in it, with the words that call it."""
    found = []
    for name, entry in group.table.items():
        found.append(((*path, name), entry))
        command = entry.load()
        if isinstance(command, LazyGroup):
            found += entries(command, (*path, name))
    return found


def test_every_command_exists_and_says_of_itself_what_the_list_says() -> None:
    for words, entry in entries(main.shoal):
        command = entry.load()
        first_line = (command.help or "").strip().partition("\n")[0]
        assert first_line == entry.help, f"shoal {' '.join(words)}"


def test_every_command_shows_its_help_without_torch() -> None:
    for words, _ in entries(main.shoal):
        script = (
            "import sys\n"
            "from shoal.cli.main import run\n"
            f"assert run([*{words!r}, '--help']) == 0\n"
            "assert 'torch' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)


def test_the_script_of_the_package_is_main() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'shoal = "shoal.__main__:main"' in declared
    assert callable(importlib.import_module("shoal.__main__").main)
