"""The documents and the repository agree: every command, flag, recipe, link and promise that is written down exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.sources import REPOSITORY

from shoal.cli.main import shoal

PROMISES = REPOSITORY / "tests" / "promises"

CODE = re.compile(r"^```[^\n]*\n(.*?)^```|(?<!`)`([^`\n]+)`(?!`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def tracked_files() -> list[Path]:
    """Every file of the repository that git does not ignore, committed or not."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sorted(path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file())


def documents() -> list[Path]:
    """The pages that people read; docs/design is history, and may speak of what no longer exists."""
    design = REPOSITORY / "docs" / "design"
    return [path for path in tracked_files() if path.suffix == ".md" and not path.is_relative_to(design)]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every shell command in the code of a Markdown text, comments and continued lines resolved.

    Brackets and bars of a synopsis (`shoal up [--servers N]`) are taken away, so its flags are checked like any other.
    """
    for block, inline in CODE.findall(text):
        for line in (block or inline).replace("\\\n", " ").splitlines():
            for part in re.split(r"\s[|;&]+\s|\$\(", line):
                plain = re.sub(r"[\[\]()]|\.\.\.", " ", part).removeprefix("$ ").strip()
                try:
                    words = shlex.split(plain, comments=True)
                except ValueError:  # an apostrophe: prose or output, no command
                    continue
                if words:
                    yield words


def unknown_in(words: list[str]) -> str | None:
    """What does not exist in one command line of shoal (words after `shoal`): a command or a flag."""
    command: click.Command = shoal
    ctx = click.Context(shoal, info_name="shoal")
    rest = list(words)
    while rest and isinstance(command, click.Group) and not rest[0].startswith("-"):
        name = rest.pop(0)
        found = command.get_command(ctx, name) if name in command.list_commands(ctx) else None
        if found is None:
            return f"no command `{ctx.command_path} {name}`"
        command, ctx = found, click.Context(found, info_name=name, parent=ctx)
    known = {flag for parameter in command.get_params(ctx) for flag in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"-h", "--help"}
    for word in rest:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--?[a-z][a-z-]*", flag) and flag not in known:
            return f"`{ctx.command_path}` has no flag {flag}"
    return None


def shoal_problems(text: str) -> list[str]:
    """What a text names of the command line that does not exist."""
    return [
        problem
        for words in command_lines(text)
        if words[0] in ("shoal", ".venv/bin/shoal") and (problem := unknown_in(words[1:]))
    ]


def make_problems(text: str, recipes: set[str]) -> list[str]:
    """What a text names of the Makefile that does not exist."""
    return [
        f"no recipe `make {word}`"
        for words in command_lines(text)
        if words[0] == "make"
        for word in words[1:]
        if "=" not in word and not word.startswith("-") and word not in recipes
    ]


def promise_file(sentence: str) -> str:
    """The name of the file that keeps a promise: the promise's own words."""
    return "test_" + re.sub(r"[^a-z0-9]+", "_", sentence.lower()).strip("_") + ".py"


def promises_in(readme: str) -> list[str]:
    """The sentences in bold that begin the points of the section "Promises"."""
    section = re.search(r"^## Promises\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    return re.findall(r"^[-*] \*\*(.+?)\*\*", section[1], re.MULTILINE) if section else []


def recipes_in(makefile: str) -> set[str]:
    """The targets of a Makefile that people call."""
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


# A place of the machine where a checkout was made, or a package registry: neither is the same for anybody else.
PLACE = re.compile(
    r"(?<![\w.}\])*-])/(work|farm|root|tmp|home/\w+|opt|Users/\w+)(/|\b)"
    r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org|npmjs\.(org|com)"
    r"|--(extra-)?index-url|--find-links"
)


def places(text: str) -> list[str]:
    """The lines of a text that name such a place, with their numbers."""
    return [f"{number}: {line.strip()[:120]}" for number, line in enumerate(text.splitlines(), 1) if PLACE.search(line)]


def test_every_shoal_command_in_the_documents_exists() -> None:
    problems = [f"{page.name}: {each}" for page in documents() for each in shoal_problems(page.read_text())]
    assert not problems, "\n" + "\n".join(problems)


def test_every_make_recipe_in_the_documents_exists() -> None:
    recipes = recipes_in((REPOSITORY / "Makefile").read_text())
    problems = [f"{page.name}: {each}" for page in documents() for each in make_problems(page.read_text(), recipes)]
    assert not problems, "\n" + "\n".join(problems)


def test_every_link_inside_the_repository_leads_somewhere() -> None:
    problems = [
        f"{page.relative_to(REPOSITORY)}: {target}"
        for page in documents()
        for target in LINK.findall(page.read_text())
        if "://" not in target and not target.startswith(("#", "mailto:"))
        if not (page.parent / target.partition("#")[0]).exists()
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_every_promise_of_the_readme_has_a_test_with_its_words_and_the_other_way_round() -> None:
    promised = {promise_file(sentence) for sentence in promises_in((REPOSITORY / "README.md").read_text())}
    kept = {path.name for path in PROMISES.glob("test_*.py")}
    assert promised == kept


def test_no_file_names_a_place_of_one_machine_or_a_package_registry() -> None:
    problems = []
    for path in tracked_files():
        if path == Path(__file__):
            continue  # it names them below, to show that they are found
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, pictures
        problems += [f"{path.relative_to(REPOSITORY)}:{place}" for place in places(text)]
    assert not problems, "\n" + "\n".join(problems)


def test_ci_runs_the_recipe_that_people_run() -> None:
    called = re.findall(r"^\s*make (\S+)", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    assert called == ["test"]


@pytest.mark.parametrize(
    "text", ["`shoal swim`", "`shoal --fast`", "```\nshoal swim  # prints\n```", "`ls | shoal swim`"]
)
def test_a_command_that_does_not_exist_is_found(text: str) -> None:
    assert shoal_problems(text)


@pytest.mark.parametrize("text", ["`shoal --help`", "shoal swim in prose", "```\n$ shoal --version\nshoals swim\n```"])
def test_a_command_that_exists_passes(text: str) -> None:
    assert not shoal_problems(text)


def test_a_recipe_that_does_not_exist_is_found() -> None:
    assert make_problems("```\nmake dinner\n```", {"test"}) == ["no recipe `make dinner`"]
    assert not make_problems("`make test` and `make PYTHON=python3.12 test`", {"test"})


def test_a_promise_is_its_bold_sentence() -> None:
    readme = (
        "# x\n## Promises\n\n- **A lost server does not change the text.** Shown by\n\n## More\n- **No promise.**\n"
    )

    assert [promise_file(each) for each in promises_in(readme)] == ["test_a_lost_server_does_not_change_the_text.py"]


@pytest.mark.parametrize(
    "line",
    [
        "see /" + "work/x",
        "open('/tmp/x')",
        "/root/.cache",
        "pip install --index-url x",
        "https://" + "pypi" + ".org/x",
    ],
)
def test_a_place_of_one_machine_is_found(line: str) -> None:
    assert places(line)


@pytest.mark.parametrize(
    "line", ["a/tmp", "shared/work/", "{base}/work", "the root of it", "GET /v1/models", "and/or/root"]
)
def test_other_paths_pass(line: str) -> None:
    assert not places(line)
