"""Write docs/cli.md and docs/api.md: the references, from the commands and the docstrings.

python scripts/make_reference.py
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from typer.models import OptionInfo

import normconvert
from normconvert.errors import NormconvertError

DOCS = Path(__file__).parents[1] / "docs"
_WIDTH = 96
_SEE = "See the module's docstring."
_MADE = "Made by `make reference`; `tests/test_reference.py` fails where it is out of date."

CLI_HEAD = f"""# The commands

{_MADE}

`normconvert COMMAND --help` has the same options and texts, at once: nothing heavy is imported for
it. (What stands for an option's value is written there as your Typer writes it.)

Results go to stdout; progress, which only a terminal gets to see, and errors go to stderr.

| exit status | |
|---|---|
| 0 | Done, equivalent, or converted already. |
| 1 | Not equivalent. A converting command has removed its output. |
| 2 | Refused: one sentence on stderr says what is wrong and what to do. Nothing was written. |

[troubleshooting.md](troubleshooting.md) explains the messages, [formats.md](formats.md) what
`--json` prints. `normconvert --install-completion` adds completion of commands, options and their
values to your shell (bash, zsh, fish or PowerShell); `--show-completion` prints what it would add.
"""

API_HEAD = f"""# The Python interface

{_MADE}

Importing `normconvert` imports neither torch nor transformers; they are loaded when they are used.
Everything that the commands refuse is a `NormconvertError` here.
"""

API_PARTS: Mapping[str, str] = {
    "The commands": "normconvert",
    "What they return": "normconvert.ir.report",
    "The plan": "normconvert.ir.plan",
    "What bench measures": "normconvert.ir.bench",
    "Progress": "normconvert.ir.event",
    "The norms": "normconvert.nn",
    "Training": "normconvert.train",
}
_LEFT_OUT = frozenset({"ignore"})  # a default, of no use by itself
_WORD_ROOMS = (
    "normconvert.api",
    "normconvert.ir.plan",
    "normconvert.ir.report",
    "normconvert.ir.bench",
)


def cli_page() -> str:
    """docs/cli.md."""
    from normconvert.cli.app import app

    parts = [CLI_HEAD]
    for command in app.registered_commands:
        callback = command.callback
        assert callback is not None
        parameters = list(_cli_parameters(callback))
        usage = [command.name or callback.__name__]
        usage += [each.signs for each in parameters if not each.is_option]
        rows = [f"| `{each.signs}` | {each.text} | {each.default} |" for each in parameters]
        parts += [f"## normconvert {' '.join(usage)}", _prose(callback)]
        parts.append("\n".join(["| | | default |", "|---|---|---|", *rows]))
    return _page(parts)


class _Parameter(NamedTuple):
    """How a parameter of a command is written, what it is for, and its default."""

    signs: str
    text: str
    default: str
    is_option: bool


def _cli_parameters(callback: Any) -> Iterator[_Parameter]:
    for parameter in inspect.signature(callback, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        if not isinstance(info, OptionInfo):
            name = parameter.name.upper()
            signs = name if parameter.default is parameter.empty else f"[{name}]"
            yield _Parameter(signs, info.help or "", "", False)
            continue
        # Typer takes the first name for a default until it reads the annotation.
        given = (info.default, *(info.param_decls or ()))
        names = [name for name in given if isinstance(name, str)]
        signs = ", ".join(names or [f"--{parameter.name.replace('_', '-')}"])
        default = "" if parameter.default in (None, False) else f"`{parameter.default}`"
        if isinstance(info.show_default, str):
            default = f"`{info.show_default}`"
        if parameter.default is parameter.empty:
            default = "required"
        value = info.metavar or _value(kind).replace("|", "\\|")
        yield _Parameter(f"{signs} {value}".rstrip(), info.help or "", default, True)


def _value(kind: Any) -> str:
    """What stands for an option's value."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is list:
        return _value(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {bool: "", Path: "PATH", str: "TEXT", int: "NUMBER", float: "NUMBER"}[kind]


def api_page() -> str:
    """docs/api.md."""
    parts, known = [API_HEAD], set[Any]()
    for title, name in API_PARTS.items():
        module = import_module(name)
        # The classes of the first part come with those that they are made of.
        members = [
            each
            for each in _members(module)
            if each not in known and (name != "normconvert" or inspect.isfunction(each))
        ]
        known |= {*members}
        parts.append(f"## {title}: `{name}`")
        if name == "normconvert.train":
            parts.append(_prose(module))
        parts += [_entry(member) for member in members]
    return _page([*parts, _words(), _errors()])


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _members(module: types.ModuleType) -> Iterator[Any]:
    """The public classes and functions of a module: `__all__`, or what it defines."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    for name in names:
        value = getattr(module, name)
        if name not in _LEFT_OUT and (inspect.isfunction(value) or inspect.isclass(value)):
            yield value


def _entry(member: Any) -> str:
    """A function or class: its signature, its docstring, its public methods."""
    methods = []
    for name, method in vars(member).items() if inspect.isclass(member) else ():
        function = getattr(method, "fget", None) or getattr(method, "__func__", method)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        words = function.__doc__.partition("\n\n")[0].split()
        signature = name if isinstance(method, property) else _signature(function)[len("def ") :]
        methods.append(f"- `.{signature}`: {' '.join(words)}")
    code = f"```python\n{_signature(member)}\n```"
    parts = [f"### {member.__name__}", code, _prose(member), "\n".join(methods)]
    return "\n\n".join(part for part in parts if part)


def _signature(member: Any) -> str:
    """As in the source, on one line if it fits; a dataclass by its fields."""
    is_class = inspect.isclass(member)
    head = ("class " if is_class else "def ") + member.__name__
    if is_dataclass(member):
        lines = [
            f"    {each.name}: {_annotation(each.type)}{_default(each.default)}"
            for each in fields(member)
        ]
        return "\n".join([f"{head}:", *lines])
    function = member.__dict__.get("__init__") if is_class else member
    signature = inspect.signature(function) if function else inspect.Signature()
    words: list[str] = []
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        if each.name not in ("self", "cls"):
            words.append(f"{each.name}: {_annotation(each.annotation)}{_default(each.default)}")
    returned = signature.return_annotation
    tail = "" if is_class else f" -> {returned}"
    line = f"{head}({', '.join(words)}){tail}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{head}(", *(f"    {word}," for word in words), f"){tail}"])


def _annotation(written: Any) -> str:
    """With the quotation marks of the formatter, which formats the page too."""
    return str(written).replace("'", '"')


def _default(value: Any) -> str:
    if value is MISSING or value is inspect.Parameter.empty:
        return ""
    if isinstance(value, str):
        return f' = "{value}"'
    return f" = {getattr(value, '__name__', None) or repr(value)}"


def _prose(member: Any) -> str:
    """The docstring as Markdown: ``code`` becomes `code`, and what is raised a list."""
    text = inspect.getdoc(member) or ""
    if _SEE in text:
        module = import_module(member.__module__)
        text = text.replace(_SEE, inspect.getdoc(module) or "")
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text, _, raised = text.partition("Raises:\n")
    if not raised:
        return text
    entries = re.split(r"\n(?=\S)", inspect.cleandoc(raised))
    named = (" ".join(entry.split()).partition(": ") for entry in entries)
    return f"{text}Raises:\n\n" + "\n".join(f"- `{name}`: {why}" for name, _, why in named)


def _words() -> str:
    """The type aliases that stand for a choice of words."""
    lines = ["## Words", "", "| | |", "|---|---|"]
    for room in _WORD_ROOMS:
        for name, value in vars(import_module(room)).items():
            if get_origin(value) is Literal:
                choice = ", ".join(f'`"{word}"`' for word in get_args(value))
                lines.append(f"| `{name}` | {choice} |")
    return "\n".join(lines)


def _errors() -> str:
    for module in walk_packages(normconvert.__path__, "normconvert."):
        if module.name != "normconvert.__main__":  # it runs the command
            import_module(module.name)
    lines = ["## Errors", "", "`code` is what `--json` prints.", ""]
    lines += ["| | code | |", "|---|---|---|"]
    found = sorted(_subclasses(NormconvertError), key=lambda each: (each.code, each.__name__))
    errors: list[type[NormconvertError]] = [NormconvertError, *found]
    for each in errors:
        meaning = _prose(each).splitlines()[0]
        lines.append(f"| `{each.__name__}` | `{each.code}` | {meaning} |")
    return "\n".join(lines)


def _subclasses(error: type[NormconvertError]) -> Iterator[type[NormconvertError]]:
    for each in error.__subclasses__():
        if not each.__name__.startswith("_"):
            yield each
        yield from _subclasses(each)


def main() -> None:
    (DOCS / "cli.md").write_text(cli_page(), encoding="utf-8")
    (DOCS / "api.md").write_text(api_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
