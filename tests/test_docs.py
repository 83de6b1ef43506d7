"""What README.md and docs/ show is what happens: commands, their output, options, links."""

from __future__ import annotations

import ast
import math
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from command_line import environment, run_here
from normconvert.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "make demo": "makes an environment; what it runs in it is run here",
    "make test": "runs these tests",
    "pip install": "changes the environment",
    "export": "concerns two machines",
    "accelerate launch": "wants several GPUs; test_processes.py launches processes",
    "normconvert push": "needs the Hub; test_push.py pushes to a local one",
    "normconvert bench": "measures, for minutes; test_bench.py measures tiny models",
    "python scripts/bench_": "measures, for minutes",
    "python scripts/check_cost.py": "measures, for minutes",
    "python scripts/measure_": "measures, for minutes",
    "python scripts/make_model.py": "writes a model of the size that is measured",
}
"""The commands that no test runs as they stand, by how they begin, and why."""

PYTHON_ELSEWHERE = {
    "api.md": "signatures",
    "add-a-rewrite.md": "test_add_a_rewrite.py runs it",
    "engines.md": "tests/engines run what it shows, where the engines are installed",
}
"""The pages whose Python is not run here, and why."""

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_NOTHING = 1e-12  # of float64's own rounding, which is another one on every machine


_OF_THE_MACHINE = ("of memory; on a disk of",)
"""Parts of lines whose numbers say something about the machine: these are not compared."""


class Shown(NamedTuple):
    """A command of a page and the lines that the page shows below it."""

    command: str
    output: list[str]

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command, comments=True)

    @property
    def is_run(self) -> bool:
        return not any(self.command.startswith(start) for start in NOT_RUN)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of `language`."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shown(page: Path) -> Iterator[Shown]:
    """The commands with a prompt."""
    for block in blocks(page, "console"):
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, *output = command.replace("\\\n", " ").splitlines()
            yield Shown(line, output)


def mentioned(page: Path) -> Iterator[Shown]:
    """The commands in indented blocks, without a prompt."""
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"^ {4}((?:normconvert|python|make) .*)$", text, flags=re.MULTILINE):
        yield Shown(line, [])


COMMANDS = [each for page in PAGES for each in (*shown(page), *mentioned(page))]
TO_RUN = [page for page in PAGES if any(each.is_run for each in shown(page))]


def named(page: Path) -> str:
    return page.name


def assert_same(actual: list[str], expected: list[str]) -> None:
    """Line by line, numbers within a few percent; a line … stands for any number of lines."""
    actual = [line.rstrip() for line in actual]
    place = 0
    for i, line in enumerate(expected):
        if line == "…":
            ahead = _NUMBER.sub("#", expected[i + 1])
            while place < len(actual) and _NUMBER.sub("#", actual[place]) != ahead:
                place += 1
            continue
        assert place < len(actual), f"nothing where {line!r} should be"
        assert _NUMBER.sub("#", actual[place]) == _NUMBER.sub("#", line)
        if any(part in line for part in _OF_THE_MACHINE):
            place += 1
            continue
        for found, known in zip(_NUMBER.findall(actual[place]), _NUMBER.findall(line), strict=True):
            same = math.isclose(float(found), float(known), rel_tol=0.05, abs_tol=_NOTHING)
            assert same if "." in known else found == known, f"{found} in {line!r}"
        place += 1
    assert place == len(actual), f"the page lacks {actual[place]!r}"


@pytest.mark.parametrize("page", TO_RUN, ids=named)
def test_the_commands_do_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    for name in ("models", "configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in shown(page):
        if not command.is_run:
            continue
        program, *arguments = command.words
        assert program == "normconvert", f"say in NOT_RUN why no test runs {command.command!r}"
        result = run_here(*arguments, cwd=tmp_path, columns=80)
        assert result.status == 0, result
        if command.output:
            assert_same(result.out.splitlines(), command.output)
    code = "\n".join(blocks(page, "python"))
    if code and page.name not in PYTHON_ELSEWHERE:
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment(HF_HOME=str(tmp_path / "home"), PYTHONWARNINGS="ignore"),
            check=True,
            timeout=300,
        )


def test_python_is_on_pages_that_are_run() -> None:
    pages = {page for page in PAGES if blocks(page, "python")}
    assert {page.name for page in pages - {*TO_RUN}} <= PYTHON_ELSEWHERE.keys()


def test_every_exception_is_used() -> None:
    for start in NOT_RUN:
        assert any(each.command.startswith(start) for each in COMMANDS), start


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.command[:60])
def test_every_command_exists(command: Shown) -> None:
    program, *arguments = command.words
    if program == "accelerate":
        place = arguments.index("-m")
        assert _options(arguments[:place]) <= options_of_accelerate()
        program, *arguments = arguments[place + 1 :]
    options = _options(arguments)
    if program == "normconvert":
        assert options <= options_of(arguments[0])
    elif program == "python":
        source = (ROOT / arguments[0]).read_text(encoding="utf-8")
        assert all(f'"{option}"' in source for option in options)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, flags=re.MULTILINE)


def _options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("-")}


def options_of_accelerate() -> set[str]:
    """Those of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    return {*launch_command_parser()._option_string_actions}


def options_of(command: str) -> set[str]:
    """All options of one of our commands; none if there is no such command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {sign for each in commands[command].params for sign in each.opts}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_option_in_the_text_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    ours = {sign for each in app.registered_commands for sign in options_of(_name(each))}
    ours |= {"--help", "--version", "--install-completion", "--show-completion"}
    scripts = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("scripts/*.py"))
    for span in re.findall(r"`([^`\n]+)`", text):
        words = span.split()
        if words[0].startswith("--"):
            known = words[0].partition("=")[0] in ours or f'"{words[0]}"' in scripts
            assert known or words[0] in options_of_accelerate(), span
        elif words[0] == "normconvert" and len(words) > 1 and words[1][0].islower():
            assert {word for word in words[2:] if word.startswith("-")} <= options_of(words[1])


def _name(command: typer.models.CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    lost = [
        each for each in targets if not each.startswith("https://") and not _is_there(page, each)
    ]
    assert not lost


def _is_there(page: Path, target: str) -> bool:
    """Whether the file is there, and the heading that comes after #."""
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    if not anchor or not path.exists():
        return path.exists()
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings)
    return anchor in plain


def test_every_table_of_figures_carries_its_command() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for section in page.split("\n## ")[1:]:
        if "\n|---" in section:
            assert re.search(r"^\$ |`scripts/\w+\.py|`normconvert ", section, flags=re.M), section


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=named)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", text):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or f"\ndef {test}(" in source, test


def test_every_message_that_is_explained_occurs() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    ours = page.partition("\n## Loading a native checkpoint")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", ours, flags=re.MULTILINE)
    assert len(messages) > 30
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "normconvert").rglob("*.py"))
    said = [text for source in sources for text in texts(source)]
    for message in messages:
        pattern = ".*".join(re.escape(part) for part in message.split("…"))
        assert any(re.search(pattern, text) for text in said), message


def texts(source: str) -> Iterator[str]:
    """Every string of a module, with … for what an f-string puts in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (each.value if isinstance(each, ast.Constant) else "…" for each in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_name_of_the_package_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for name in re.findall(r"`(normconvert(?:\.\w+)+)[`(]", text):
        if not name.endswith(".json"):
            assert pkgutil.resolve_name(name) is not None
