"""docs/cli.md and docs/api.md are what the commands and the docstrings say today."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from command_line import environment, run_here

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """scripts/make_reference.py."""
    spec = spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli", "api"])
def test_the_reference_is_up_to_date(page: str, reference: ModuleType) -> None:
    written = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert written == getattr(reference, f"{page}_page")(), "run `make reference`"


def test_the_reference_has_every_option_that_help_has(reference: ModuleType) -> None:
    """Typer's own words, not those that the page is made from."""
    commands = reference.cli_page().split("\n## normconvert ")[1:]
    assert len(commands) >= 8
    for section in commands:
        shown = run_here(section.split()[0], "--help", cwd=ROOT, columns=300)
        assert shown.status == 0, shown
        lines = [line.split() for line in shown.out.partition("Options:")[2].splitlines()]
        options = {word.rstrip(",") for words in lines if words for word in words[:2]}
        options = {word for word in options if word.startswith("-")} - {"--help"}
        assert len(options) >= 4
        rows = [line for line in section.splitlines() if line.startswith("| `-")]
        found = {word.strip("`,") for row in rows for word in row.split("|")[1].split()}
        assert options == {word for word in found if word.startswith("-")}


def as_installed(*arguments: str, **env: str) -> str:
    """What the command prints under the name that it is installed by, which completion goes by."""
    code = "import sys; sys.argv[0] = 'normconvert'; from normconvert.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment(**env),
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """The shell asks a process of the command what may follow."""
    words = "normconvert flashnorm --format "
    answer = as_installed(
        _NORMCONVERT_COMPLETE=f"complete_{shell}",
        COMP_WORDS=words,
        COMP_CWORD="3",
        _TYPER_COMPLETE_ARGS=words,
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert "stock" in answer
    assert "native" in answer
    assert "--" not in answer


def test_completion_is_installed_where_the_shell_finds_it(tmp_path: Path) -> None:
    answer = as_installed("--install-completion", "bash", HOME=str(tmp_path), SHELL="/bin/bash")
    assert "completion installed" in answer
    script = tmp_path / ".bash_completions" / "normconvert.sh"
    assert "_NORMCONVERT_COMPLETE=complete_bash" in script.read_text(encoding="utf-8")
    assert str(script) in (tmp_path / ".bashrc").read_text(encoding="utf-8")
